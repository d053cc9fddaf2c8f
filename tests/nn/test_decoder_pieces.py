"""Grouped queries against attention whose keys and values are repeated by hand, and gated MLPs against their formula."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sigmarep.nn import TransformerConfig, TransformerStack
from sigmarep.nn.attention import MultiHeadAttention
from sigmarep.nn.layers import describe
from sigmarep.nn.qk_clip import qk_clipped
from sigmarep.nn.visibility import CAUSAL

X = jax.random.normal(jax.random.key(0), (2, 5, 8))
CONTEXT = jax.random.normal(jax.random.key(1), (2, 7, 8))
INIT = jax.nn.initializers.normal(0.5)
LAYER = MultiHeadAttention(4, num_kv_heads=2, reparam="none", kernel_init=INIT, bias_init=INIT)


def by_hand(params):
    """Parameters of the layer with a head of keys and values for each of queries: heads 0, 0, 1, 1 of the fewer ones."""
    order = np.array([0, 0, 1, 1])
    return params | {
        name: {"kernel": params[name]["kernel"][:, order], "bias": params[name]["bias"][order]}
        for name in ("key", "value")
    }


@pytest.mark.parametrize("fields", [{}, {"qk_norm": "layer", "rotary_base": 100.0}, {"entropy_target": 0.5}], ids=str)
@pytest.mark.parametrize("context", [None, CONTEXT], ids=["self", "context"])
def test_groups_of_queries_share_keys_and_values_and_so_do_their_statistics(fields, context):
    layer = LAYER.clone(**fields)
    params = layer.init(jax.random.key(2), X, context)["params"]
    assert params["key"]["kernel"].shape == params["value"]["kernel"].shape == (8, 2, 2)
    assert params["query"]["kernel"].shape == (8, 4, 2)
    visibility = {} if context is not None else {"visibility": CAUSAL}
    collections = ["attention", "losses"]
    found = layer.apply({"params": params}, X, context, **visibility, mutable=collections)
    expected = layer.clone(num_kv_heads=0).apply(
        {"params": by_hand(params)}, X, context, **visibility, mutable=collections
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)
    assert found[1]["attention"]["qk_norm"].shape == (4,)


def test_the_cache_holds_the_shared_heads_alone_and_tokens_come_out_as_they_do_at_once():
    layer = LAYER.clone(rotary_base=100.0)
    params = layer.init(jax.random.key(2), X)["params"]
    whole = layer.apply({"params": params}, X, visibility=CAUSAL)
    variables = {"params": params}
    for start, end in ((0, 2), (2, 3), (3, 5)):
        positions = jnp.arange(start, end)[None]
        part, changed = layer.apply(variables, X[:, start:end], positions=positions, cache_length=5, mutable=["cache"])
        variables = {"params": params, **changed}
        np.testing.assert_allclose(part, whole[:, start:end], rtol=1e-4, atol=1e-5)
    assert changed["cache"]["cached_key"].shape == (2, 5, 2, 2)


@pytest.mark.parametrize("scan", [False, True])
def test_after_qk_clip_no_logit_of_a_group_is_above_the_threshold_and_those_above_are_at_it(scan):
    config = TransformerConfig(
        depth=1, width=8, num_heads=4, num_kv_heads=2, mlp_dim=8, norm="none", init_std=0.5, scan=scan, use_bias=False
    )
    stack = TransformerStack(config)
    params = stack.init(jax.random.key(1), X)["params"]
    layers = describe(stack.init, jax.random.key(1), X)

    def recorded(params):
        attention = stack.apply({"params": params}, X, mutable=["attention"])[1]["attention"]
        return attention, np.ravel(attention["blocks" if scan else "block_0"]["attention"]["max_logit"])

    attention, before = recorded(params)
    threshold = float(np.sort(before)[1])
    _, after = recorded(qk_clipped(params, attention, layers, threshold))
    np.testing.assert_allclose(after, np.minimum(before, threshold), rtol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads = 3: expected a divisor of num_heads = 4, or 0"),
        ({"num_kv_heads": 2, "qkv": "fused"}, "num_kv_heads = 2: expected qkv = 'separate', not 'fused'"),
    ],
)
def test_heads_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(depth=1, width=8, num_heads=4, mlp_dim=8, **fields)
    with pytest.raises(ValueError, match=message):
        MultiHeadAttention(4, **fields).init(jax.random.key(0), X)


@pytest.mark.parametrize("reparam", ["none", "sigma"])
def test_a_gated_mlp_is_swiglu(reparam):
    """down(silu(gate x) · up x) (Shazeer, 2020), in a block without norms whose attention is taken out."""
    config = TransformerConfig(
        depth=1,
        width=8,
        num_heads=2,
        mlp_dim=6,
        norm="none",
        activation="silu",
        mlp_gate=True,
        scan=False,
        use_bias=False,
    )
    stack = TransformerStack(dataclasses.replace(config, reparam=reparam, init_std=0.5))
    variables = stack.init(jax.random.key(1), X)
    block = variables["params"]["block_0"]
    block["attention"]["out"]["kernel"] = jnp.zeros_like(block["attention"]["out"]["kernel"])
    kernels = {name: np.asarray(block["mlp"][name]["kernel"], np.float64) for name in ("gate", "up", "down")}
    if reparam == "sigma":
        kernels = {name: x / np.linalg.norm(x, 2) for name, x in kernels.items()}
    x = np.asarray(X, np.float64)
    gate = x @ kernels["gate"]
    expected = x + (gate / (1 + np.exp(-gate)) * (x @ kernels["up"])) @ kernels["down"]
    np.testing.assert_allclose(stack.apply(variables, X), expected, rtol=1e-4, atol=1e-4)
