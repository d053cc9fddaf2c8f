"""Pieces of a model by their Python names: they take the place of the built-in ones, and are recorded like them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sigmarep.nn import MultiHeadAttention, TransformerConfig, TransformerStack
from sigmarep.nn.visibility import CAUSAL, Visibility
from tests.nn import pieces

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (2, 5, 8))
CONTEXT = jax.random.normal(jax.random.key(2), (2, 3, 8))
CONFIG = TransformerConfig(depth=1, width=8, num_heads=2, mlp_dim=6, scan=False, init_std=0.5)


def heads(params, x, context):
    """Queries, keys and values (B, N, T, H) in float64."""
    return (
        np.einsum("btd,dnh->bnth", np.asarray(source, np.float64), np.asarray(params[name]["kernel"], np.float64))
        + np.asarray(params[name]["bias"])[:, None]
        for name, source in (("query", x), ("key", context), ("value", context))
    )


def output(params, attended):
    return np.einsum("bnth,nhd->btd", attended, np.asarray(params["out"]["kernel"])) + params["out"]["bias"]


def layer(**fields):
    attention = MultiHeadAttention(2, reparam="none", bias_init=jax.nn.initializers.normal(0.3), **fields)
    return attention, attention.init(KEY, X)


def test_activation_and_initializer_by_their_names():
    config = dataclasses.replace(
        CONFIG, norm="none", activation="tests.nn.pieces:squared_relu", kernel_init="tests.nn.pieces:ones"
    )
    stack = TransformerStack(config)
    variables = stack.init(KEY, X)
    np.testing.assert_array_equal(variables["params"]["block_0"]["mlp"]["up"]["kernel"], np.ones((8, 6)))
    # With kernels of ones every query, key, value and hidden unit is the sum of a token's features.
    x = np.asarray(X, np.float64)
    total = x.sum(-1)
    weights = np.exp(4 * total[:, :, None] * total[:, None] / 2)
    attended = np.einsum("bts,bs->bt", weights / weights.sum(-1, keepdims=True), total)
    x = x + 8 * attended[..., None]
    expected = x + 6 * np.maximum(x.sum(-1, keepdims=True), 0) ** 2
    np.testing.assert_allclose(stack.apply(variables, X), expected, rtol=1e-3, atol=1e-3)


def test_norms_by_their_name():
    config = dataclasses.replace(CONFIG, norm_type="tests.nn.pieces.Centered")
    stack = TransformerStack(config)
    variables = stack.init(KEY, X)
    assert set(variables["params"]) == {"block_0"}
    output = stack.apply(variables, X)
    np.testing.assert_allclose(output.mean(-1), 0, atol=1e-5)
    # The first branch reads the normalized tokens, whatever was added to all their features.
    np.testing.assert_allclose(stack.apply(variables, X + 3.0), output, atol=1e-4)


@pytest.mark.parametrize("named", [True, False])
def test_weights_from_outside_attend_and_their_entropy_is_recorded(named):
    attention, variables = layer(weights="tests.nn.pieces.softplus_weights" if named else pieces.softplus_weights)
    attended, changed = attention.apply(variables, X, visibility=CAUSAL, mutable=["attention"])
    query, key, value = heads(variables["params"], X, X)
    logits = query @ np.swapaxes(key, 2, 3) / 2
    weights = np.where(np.tri(5, dtype=bool), np.log1p(np.exp(logits)), 0) / 5
    np.testing.assert_allclose(attended, output(variables["params"], weights @ value), atol=1e-5)
    share = weights / weights.sum(-1, keepdims=True)
    rows = -np.where(share > 0, share * np.log(np.where(share > 0, share, 1)), 0).sum(-1)
    np.testing.assert_allclose(changed["attention"]["entropy"], rows.mean((0, 2)), rtol=1e-4)
    with pytest.raises(ValueError, match=r"entropy_target = 0\.5: needs weights of softmax or sigmoid"):
        attention.clone(entropy_target=0.5).init(KEY, X)


def test_a_kernel_from_outside_attends_and_the_statistics_are_the_same():
    attention, variables = layer()
    visibility = Visibility(key_mask=jnp.arange(5)[None] < jnp.asarray([5, 3])[:, None], is_causal=True)
    plain = attention.apply(variables, X, visibility=visibility, mutable=["attention"])
    kernel = attention.clone(implementation="tests.nn.pieces.by_jax")
    other = kernel.apply(variables, X, visibility=visibility, mutable=["attention"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), other, plain)
    with pytest.raises(
        ValueError, match=r"by_jax': attention dropout, logit_cap and weights other than softmax need 'xla' or 'auto'"
    ):
        kernel.clone(logit_cap=3.0).apply(variables, X)


def test_heads_are_processed_in_self_attention_and_in_attention_to_a_context():
    attention, variables = layer(process_heads="tests.nn.pieces.reversed_positions")
    params = variables["params"]
    for context, given, positions in ((X, None, [[3, 1, 4, 1, 5]]), (X, None, None), (CONTEXT, CONTEXT, None)):
        where = None if positions is None else jnp.asarray(positions)
        attended, changed = attention.apply(variables, X, given, positions=where, mutable=["attention"])
        positions = np.arange(5)[None] if positions is None else np.asarray(positions)
        query, key, value = heads(params, X, context)
        if given is None:
            query, key = (each - positions[:, None, :, None] for each in (query, key))
        else:
            value = 2 * value
        weights = np.exp(query @ np.swapaxes(key, 2, 3) / 2)
        weights = weights / weights.sum(-1, keepdims=True)
        np.testing.assert_allclose(attended, output(params, weights @ value), atol=1e-4)
        rows = -(weights * np.log(weights)).sum(-1)
        np.testing.assert_allclose(changed["attention"]["entropy"], rows.mean((0, 2)), rtol=1e-3)
        assert np.all(changed["attention"]["bound"] <= changed["attention"]["entropy"])


def test_a_norm_of_queries_and_keys_from_outside():
    attention, variables = layer(qk_norm="tests.nn.pieces.Centered")
    query, key, value = heads(variables["params"], X, X)
    query, key = (each - each.mean(-1, keepdims=True) for each in (query, key))
    weights = np.exp(query @ np.swapaxes(key, 2, 3) / 2)
    expected = output(variables["params"], weights / weights.sum(-1, keepdims=True) @ value)
    np.testing.assert_allclose(attention.apply(variables, X), expected, atol=1e-5)
