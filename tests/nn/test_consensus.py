"""Consensus against loops over edges in NumPy float64; what it sees, what it refuses, and what a report says of it."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sigmarep.diagnostics import findings, runs
from sigmarep.errors import BadInput
from sigmarep.models import decoding
from sigmarep.nn import TransformerBlock, TransformerConfig, TransformerStack, fold
from sigmarep.nn.consensus import Consensus
from sigmarep.nn.layers import describe
from sigmarep.nn.visibility import CAUSAL, FULL, Visibility
from sigmarep.remedies import set_arm
from sigmarep.tasks import transformer_config
from sigmarep.tasks.language_modeling import model as language_modeling
from sigmarep.tasks.translation import model as translation
from sigmarep.training.config import default_config

HEADS, FEATURES, WIDTH, LENGTH = 2, 4, 8, 11
X = jax.random.normal(jax.random.key(0), (2, LENGTH, WIDTH))
INIT = jax.nn.initializers.normal(0.4)
LAYER = Consensus(HEADS, reparam="none", kernel_init=INIT, bias_init=INIT)
# The first sequence has two tokens of padding at its end, the second two documents.
KEY_MASK = jnp.ones((2, LENGTH), bool).at[0, -2:].set(False)
SEGMENTS = jnp.ones((2, LENGTH), int).at[1, 5:].set(2)
VISIBLE = {
    "full": FULL,
    "causal": CAUSAL,
    "padding": Visibility(key_mask=KEY_MASK),
    "documents": Visibility(segments=SEGMENTS, is_causal=True),
}


# The variables do not depend on rotation or visibility.
PARAMS = jax.jit(LAYER.init)(jax.random.key(1), X)["params"]


@functools.partial(jax.jit, static_argnums=0)
def compiled(layer, x, visibility=FULL):
    return layer.apply({"params": PARAMS}, x, visibility=visibility)


def normalized(kernel, inputs):
    """σReparam's effective kernel at γ = 1."""
    return kernel / np.linalg.norm(kernel.reshape(inputs, -1), 2)


def turned(u, angle_positions, base):
    if not base:
        return u
    half = FEATURES // 2
    result = u.copy()
    for k in range(half):
        angle = angle_positions * base ** (-k / half)
        first, second = u[:, k], u[:, k + half]
        result[:, k] = first * math.cos(angle) - second * math.sin(angle)
        result[:, k + half] = second * math.cos(angle) + first * math.sin(angle)
    return result


def by_hand(params, x, visible, *, causal, base=0.0, window=4, iterations=2):
    """One sequence (T, D); `visible(i, j)` says whether two tokens may be the ends of an edge."""
    p = jax.tree.map(lambda each: np.asarray(each, np.float64), params)
    length = len(x)
    u = np.einsum("td,dnh->tnh", x, p["value"]["kernel"]) + p["value"]["bias"]

    def mlp(pair, name, bias):
        before = pair @ p[f"{name}_hidden"]["kernel"] + p[f"{name}_hidden_bias"]
        hidden = [0.5 * z * (1 + math.erf(z / math.sqrt(2))) for z in before]
        return np.tensordot(hidden, p[name]["kernel"], 1) + bias

    edges = {}
    for i in range(length):
        for j in range(length):
            if i == j or abs(i - j) > window or (causal and j > i) or not visible(i, j):
                continue
            pair = np.concatenate([x[i], x[j]])
            alpha = math.log1p(math.exp(mlp(pair, "strength", p["strength"]["bias"])[0]))
            rows = mlp(pair, "rows", p["rows_bias"])
            rows = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
            edges[i, j] = [alpha * np.eye(FEATURES) + head.T @ head for head in rows]
    for t in range(iterations):
        eta = math.log1p(math.exp(p["step_scale"][t]))
        change = np.zeros_like(u)
        for (i, j), matrices in edges.items():
            difference = turned(u[i], i - j, base) - u[j]
            residual = np.stack([matrix @ each for matrix, each in zip(matrices, difference, strict=True)])
            change[i] += residual
            if not causal:
                change[j] -= residual
        u = u - eta * change
    return np.einsum("tnh,nhd->td", u, p["out"]["kernel"]) + p["out"]["bias"]


@pytest.mark.parametrize("base", [0.0, 100.0], ids=["still", "rotary"])
@pytest.mark.parametrize("seen", VISIBLE)
def test_the_layer_is_the_loop_over_edges(seen, base):
    layer, visibility = LAYER.clone(rotary_base=base), VISIBLE[seen]
    result = compiled(layer, X, visibility)
    for b in range(2):

        def visible(i, j, b=b):
            if seen == "padding":
                return bool(KEY_MASK[b, i]) and bool(KEY_MASK[b, j])
            return seen != "documents" or int(SEGMENTS[b, i]) == int(SEGMENTS[b, j])

        expected = by_hand(PARAMS, np.asarray(X[b], np.float64), visible, causal=visibility.is_causal, base=base)
        np.testing.assert_allclose(result[b], expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("length", [1, 3])
def test_sequences_shorter_than_the_window_have_the_edges_that_there_are(length):
    result = compiled(LAYER, X[:1, :length])
    expected = by_hand(PARAMS, np.asarray(X[0, :length], np.float64), lambda i, j: True, causal=False)
    np.testing.assert_allclose(result[0], expected, rtol=2e-4, atol=2e-4)


def test_a_later_token_changes_no_earlier_output_of_a_causal_layer():
    changed = X.at[:, 6].add(1.0)
    one, other = (np.asarray(compiled(LAYER, x, CAUSAL)) for x in (X, changed))
    np.testing.assert_array_equal(one[:, :6], other[:, :6])
    assert np.all(np.any(one[:, 6:10] != other[:, 6:10], axis=-1))
    # Without causality the tokens before it move, as far as two steps along edges of length 4 reach.
    one, other = (np.asarray(compiled(LAYER, x)) for x in (X, changed))
    assert np.all(np.any(one != other, axis=-1))


@pytest.mark.parametrize("causal", [False, True])
def test_real_tokens_do_not_depend_on_padding_nor_on_another_document(causal):

    def run(x, **seen):
        return np.asarray(compiled(LAYER, x, Visibility(is_causal=causal, **seen)))

    one, other = run(X, key_mask=KEY_MASK), run(X.at[0, -2:].set(9.0), key_mask=KEY_MASK)
    np.testing.assert_array_equal(one[0, :-2], other[0, :-2])
    np.testing.assert_allclose(one[0, :-2], run(X[:1, :-2])[0], rtol=1e-5, atol=1e-5)
    one, other = run(X, segments=SEGMENTS), run(X.at[1, :5].set(9.0), segments=SEGMENTS)
    np.testing.assert_array_equal(one[1, 5:], other[1, 5:])
    np.testing.assert_allclose(one[1, 5:], run(X[1:, 5:])[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("base", [0.0, 100.0])
def test_decoding_token_by_token_gives_what_the_whole_sequence_gives(base):
    layer = LAYER.clone(rotary_base=base)
    whole, cache = compiled(layer, X, CAUSAL), {}
    decode = jax.jit(
        lambda cache, x: layer.apply({"params": PARAMS, **cache}, x, cache_length=LENGTH, mutable=["cache"])
    )
    for start, end in [(0, 3), *((i, i + 1) for i in range(3, LENGTH))]:
        part, cache = decode(cache, X[:, start:end])
        np.testing.assert_allclose(part, whole[:, start:end], rtol=1e-4, atol=1e-5)


def test_under_sigma_every_dense_has_a_unit_kernel_and_the_panel_sees_it():
    config = TransformerConfig(
        depth=2, width=WIDTH, num_heads=HEADS, mlp_dim=8, token_mixing="consensus", reparam="sigma", init_std=0.5
    )
    stack = TransformerStack(config)
    variables = jax.eval_shape(stack.init, jax.random.key(1), X)
    names = ("value", "strength_hidden", "strength", "rows_hidden", "rows", "out")
    modules = {layer.module for layer in describe(stack.init, jax.random.key(1), X).values()}
    assert {f"blocks/attention/{name}" for name in names} <= modules
    assert set(variables["spectral"]["blocks"]["attention"]) == set(names)
    layer = LAYER.clone(reparam="sigma")
    variables = jax.jit(layer.init)(jax.random.key(1), X)
    inputs = {"value": WIDTH, "strength_hidden": 2 * WIDTH, "rows_hidden": 2 * WIDTH, "out": WIDTH}
    plain = {
        name: {**each, "kernel": normalized(np.asarray(each["kernel"], np.float64), inputs.get(name, 16))}
        if "kernel" in each
        else each
        for name, each in variables["params"].items()
        if name in names
    }
    plain |= {name: each for name, each in variables["params"].items() if name not in names}
    result = jax.jit(layer.apply)(variables, X)
    expected = by_hand(plain, np.asarray(X[0], np.float64), lambda i, j: True, causal=False)
    np.testing.assert_allclose(result[0], expected, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(jax.jit(LAYER.apply)({"params": fold(variables)}, X), result, rtol=1e-4, atol=1e-4)


def test_a_block_hands_the_fields_on_and_records_no_attention():
    config = TransformerConfig(depth=1, width=WIDTH, num_heads=HEADS, mlp_dim=8, token_mixing="consensus", norm="none")
    block = TransformerBlock(config)
    variables = jax.jit(block.init)(jax.random.key(1), X)
    params = variables["params"]
    params["mlp"]["down"]["kernel"] = jnp.zeros_like(params["mlp"]["down"]["kernel"])
    result, recorded = block.apply({"params": params}, X, visibility=CAUSAL, mutable=["attention"])
    assert not recorded
    layer = Consensus(HEADS, reparam="none")
    np.testing.assert_allclose(
        result, X + layer.apply({"params": params["attention"]}, X, visibility=CAUSAL), rtol=1e-5, atol=1e-5
    )


REFUSED = {
    "num_kv_heads": (1, "0"),
    "qkv": ("fused", "'separate'"),
    "qk_norm": ("layer", "'none'"),
    "logit_cap": (10.0, "0.0"),
    "attention_dropout": (0.1, "0.0"),
    "attention_implementation": ("flash", "'auto' or 'xla'"),
    "attention_weights": ("sigmoid", "'softmax'"),
    "attention_temperature": (2.0, "1.0"),
    "head_temperature": (True, "False"),
    "entropy_target": (0.5, "0.0"),
    "attention_gate": ("headwise", "'none'"),
    "process_heads": ("tests.nn.pieces.reversed_positions", "'none'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_of_attention_alone_is_refused(name):
    value, accepted = REFUSED[name]
    fields = {"depth": 1, "width": 8, "num_heads": 2, "mlp_dim": 8, "token_mixing": "consensus", name: value}
    with pytest.raises(ValueError) as caught:
        TransformerConfig(**fields)
    assert str(caught.value) == f"{name} = {value!r}: expected {accepted} with token_mixing = 'consensus'"


def test_a_context_and_a_matrix_of_visible_keys_are_refused():
    with pytest.raises(ValueError, match="token_mixing = 'consensus': cannot attend to a context"):
        LAYER.init(jax.random.key(1), X, X)
    with pytest.raises(
        ValueError, match=r"visibility\.mask of shape .*: token_mixing = 'consensus' has no matrix to mask"
    ):
        LAYER.init(jax.random.key(1), X, visibility=Visibility(mask=jnp.ones((LENGTH, LENGTH), bool)))
    with pytest.raises(ValueError, match="num_heads = 3: does not divide the width 8"):
        LAYER.clone(num_heads=3).init(jax.random.key(1), X)
    config = default_config("translation")
    set_arm(config, "consensus")
    with pytest.raises(BadInput, match=r"config\.model\.token_mixing = 'consensus': cannot attend to a context"):
        translation.create_module(config, 20)


def test_its_portable_form_and_a_language_model_with_rotary_positions_are_made():
    config = default_config("language_modeling")
    set_arm(config, "consensus")
    config.model.update(width=16, depth=2, num_heads=2, mlp_dim=16, positions="rotary")
    assert transformer_config.portable(transformer_config.create_transformer(config)).token_mixing == "consensus"
    model = language_modeling.create_module(config, 20)
    tokens = jax.random.randint(jax.random.key(2), (1, 12), 4, 20)
    params = jax.jit(model.init)(jax.random.key(3), tokens)["params"]
    apply = jax.jit(model.apply)
    one, other = (apply({"params": params}, each) for each in (tokens, tokens.at[:, 8].set(5)))
    np.testing.assert_array_equal(one[:, :8], other[:, :8])

    def step(token, position, cache):
        options = {"positions": jnp.full((1, 1), position), "cache_length": 12, "mutable": ["cache"]}
        logits, cache = model.apply({"params": params, **cache}, token[:, None], **options)
        return logits[:, 0], cache

    cache, step = decoding.empty_cache(step, 1), jax.jit(step)
    for i in range(12):
        logits, cache = step(tokens[:, i], i, cache)
        np.testing.assert_allclose(logits, one[:, i], rtol=1e-4, atol=1e-4)


def test_the_report_says_that_its_entropy_is_not_defined(tmp_path):
    config = {"model": {"token_mixing": "consensus"}}
    for name, stored in (("mixed", config), ("attends", {"model": {"token_mixing": "attention"}})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(stored))
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.0}\n')
    told = {}
    for place in runs.find([str(tmp_path)]).places:
        run = runs.read(place)
        told[run.name] = [sentence.text for sentence in findings.sentences(run, findings.facts(run))]
    assert "Attention entropy is not defined for layers without attention weights." in told["mixed"]
    assert "No attention entropy was recorded." in told["attends"]
