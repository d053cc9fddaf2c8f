"""Norms and branch scales against their formulas, and QK-clip against the logits of the next pass."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sigmarep.core import entropy
from sigmarep.nn import TransformerConfig, TransformerStack
from sigmarep.nn.attention import MultiHeadAttention
from sigmarep.nn.layers import describe
from sigmarep.nn.norms import BranchScale, DynamicErf, DynamicTanh
from sigmarep.nn.qk_clip import qk_clipped
from sigmarep.nn.seq_vcr import seq_vcr
from sigmarep.nn.visibility import CAUSAL, FULL, Visibility

CONFIG = TransformerConfig(depth=2, width=8, num_heads=2, mlp_dim=8, init_std=0.5)
X = jax.random.normal(jax.random.key(0), (3, 5, 8))


def test_dynamic_tanh_is_its_formula_and_starts_with_alpha_one_half():
    layer = DynamicTanh()
    variables = layer.init(jax.random.key(0), X)
    assert float(variables["params"]["alpha"]) == 0.5
    params = {"alpha": jnp.float32(1.7), "scale": jnp.arange(8.0), "bias": jnp.arange(8.0)[::-1]}
    expected = np.arange(8) * np.tanh(1.7 * np.asarray(X, np.float64)) + np.arange(8)[::-1]
    np.testing.assert_allclose(layer.apply({"params": params}, X), expected, rtol=1e-5, atol=1e-5)


def test_dynamic_erf_is_its_formula_and_starts_with_alpha_one_half_and_no_shift():
    layer = DynamicErf()
    start = layer.init(jax.random.key(0), X)["params"]
    assert {name: float(start[name]) for name in ("alpha", "shift")} == {"alpha": 0.5, "shift": 0.0}
    params = {"alpha": jnp.float32(1.7), "shift": jnp.float32(-0.4)}
    params |= {"scale": jnp.arange(8.0), "bias": jnp.arange(8.0)[::-1]}
    erf = np.vectorize(math.erf)(1.7 * np.asarray(X, np.float64) - 0.4)
    expected = np.arange(8) * erf + np.arange(8)[::-1]
    np.testing.assert_allclose(layer.apply({"params": params}, X), expected, rtol=1e-5, atol=1e-5)


def test_peri_ln_normalizes_the_input_and_the_output_of_every_branch():
    config = dataclasses.replace(CONFIG, norm="peri", scan=False, reparam="none", use_bias=False, activation="relu")
    stack = TransformerStack(config)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), stack.init(jax.random.key(1), X)
    )
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params["params"])

    def normalized(x, norm):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * norm["scale"] + norm["bias"]

    def attention(x, p):
        query, key, value = (np.einsum("btd,dnh->bnth", x, p[name]["kernel"]) for name in ("query", "key", "value"))
        weights = np.exp(query @ np.swapaxes(key, 2, 3) / np.sqrt(4))
        weights = weights / weights.sum(-1, keepdims=True)
        return np.einsum("bnth,nhd->btd", weights @ value, p["out"]["kernel"])

    def mlp(x, p):
        return np.maximum(x @ p["up"]["kernel"], 0) @ p["down"]["kernel"]

    x = np.asarray(X, np.float64)
    for block in (p["block_0"], p["block_1"]):
        for name, branch in (("attention", attention), ("mlp", mlp)):
            y = branch(normalized(x, block[f"{name}_norm"]), block[name])
            x = x + normalized(y, block[f"{name}_end_norm"])
    np.testing.assert_allclose(stack.apply(params, X), normalized(x, p["norm"]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("kind", "shape", "start"), [("layer_scale", (8,), 1e-4), ("rezero", (), 0.0)])
def test_a_branch_scale_starts_small(kind, shape, start):
    layer = BranchScale(kind)
    variables = layer.init(jax.random.key(0), X)
    assert variables["params"]["scale"].shape == shape
    np.testing.assert_allclose(layer.apply(variables, X), start * np.asarray(X), rtol=1e-6)


@pytest.mark.parametrize("norm", ["none", "pre", "post"])
def test_rezero_makes_a_stack_the_identity_or_its_norms_at_the_start(norm):
    config = dataclasses.replace(CONFIG, norm=norm, branch_scale="rezero", scan=norm == "pre")
    stack = TransformerStack(config)
    variables = stack.init(jax.random.key(1), X)
    x = np.asarray(X, np.float64)
    normal = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(stack.apply(variables, X), x if norm == "none" else normal, atol=1e-4)


@pytest.mark.parametrize(
    ("norm_type", "leaves"),
    [
        ("dyt", {"alpha", "scale", "bias"}),
        ("derf", {"alpha", "shift", "scale", "bias"}),
        ("rms", {"scale"}),
    ],
)
def test_the_type_of_norm_is_that_of_every_norm(norm_type, leaves):
    config = dataclasses.replace(CONFIG, norm_type=norm_type, scan=False)
    params = TransformerStack(config).init(jax.random.key(1), X)["params"]
    norms = [params["norm"], *(params[f"block_{i}"][f"{kind}_norm"] for i in (0, 1) for kind in ("attention", "mlp"))]
    assert all(set(norm) == leaves for norm in norms)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("qkv", ["separate", "qk_v", "fused"])
def test_after_qk_clip_the_heads_that_were_above_the_threshold_are_at_it(qkv, scan):
    stack = TransformerStack(dataclasses.replace(CONFIG, depth=1, norm="none", qkv=qkv, scan=scan, reparam="none"))
    params = stack.init(jax.random.key(1), X)["params"]
    layers = describe(stack.init, jax.random.key(1), X)
    # Biases take part in the logits as well.
    params = jax.tree.map(lambda x: x + 0.3, params)

    def recorded(params):
        y, found = stack.apply({"params": params}, X, mutable=["attention"])
        block = found["attention"]["blocks" if scan else "block_0"]["attention"]
        return y, found["attention"], np.ravel(block["max_logit"])

    _, attention, before = recorded(params)
    threshold = float(before.mean())
    clipped = qk_clipped(params, attention, layers, threshold)
    _, _, after = recorded(clipped)
    assert (before > threshold).tolist().count(True) == 1
    np.testing.assert_allclose(after, np.minimum(before, threshold), rtol=1e-5)

    def changed(old, new):
        return {path for path, x in leaves(old).items() if not np.array_equal(x, leaves(new)[path])}

    def leaves(tree):
        return {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}

    assert all("attention" in path and "out" not in path and "value" not in path for path in changed(params, clipped))
    # Values that share a kernel with queries and keys are left alone.
    if qkv == "fused":
        path = ("blocks",) if scan else ("block_0",)
        kernels = [tree[path[0]]["attention"]["qkv"]["kernel"] for tree in (params, clipped)]
        np.testing.assert_array_equal(*(kernel[..., 2, :, :] for kernel in kernels))


REAL = jnp.asarray([[True] * 5, [True] * 3 + [False] * 2, [True] * 4 + [False]])


@pytest.mark.parametrize("kind", ["full", "causal", "padded"])
def test_sigmoid_attention_is_its_formula_and_so_is_its_entropy(kind):
    layer = MultiHeadAttention(2, weights="sigmoid", reparam="none", kernel_init=jax.nn.initializers.normal(1.0))
    visibility = {"causal": CAUSAL, "padded": Visibility(key_mask=REAL)}.get(kind, FULL)
    variables = layer.init(jax.random.key(2), X)
    found, changed = layer.apply(variables, X, visibility=visibility, mutable=["attention"])
    params = jax.tree.map(np.asarray, variables["params"])
    query, key, value = (np.einsum("btd,dnh->bnth", X, params[name]["kernel"]) for name in ("query", "key", "value"))
    visible = np.ones((3, 1, 5, 5), bool)
    if kind == "causal":
        visible = visible & np.tril(np.ones((5, 5), bool))
    if kind == "padded":
        visible = visible & np.asarray(REAL)[:, None, None]
    logits = query @ np.swapaxes(key, 2, 3) / 2
    weights = np.where(visible, 1 / (1 + visible.sum(-1, keepdims=True) * np.exp(-logits)), 0.0)
    expected = np.einsum("bnth,nhd->btd", weights @ value, params["out"]["kernel"])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    share = weights / weights.sum(-1, keepdims=True)
    rows = -np.where(share > 0, share * np.log(np.where(share > 0, share, 1.0)), 0.0).sum(-1)
    real = np.asarray(REAL) if kind == "padded" else np.ones((3, 5), bool)
    recorded = changed["attention"]
    for h in range(2):
        np.testing.assert_allclose(recorded["entropy"][h], rows[:, h][real].mean(), rtol=1e-4)
        largest = np.where(visible, logits, -np.inf)[:, h][real].max()
        np.testing.assert_allclose(recorded["max_logit"][h], largest, rtol=1e-4)
    assert np.all(recorded["bound"] <= recorded["entropy"])


def test_sigmoid_attention_needs_no_padding_to_be_the_same():
    layer = MultiHeadAttention(2, weights="sigmoid", reparam="none")
    variables = layer.init(jax.random.key(2), X)
    padded = layer.apply(variables, X, visibility=Visibility(key_mask=jnp.arange(5)[None] < jnp.asarray([[3]] * 3)))
    np.testing.assert_allclose(padded[:, :3], layer.apply(variables, X[:, :3]), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="weights other than softmax need 'xla' or 'auto'"):
        layer.clone(implementation="cudnn").apply(variables, X)


def attention_by_numpy(params, x, scale=1.0):
    """Attended values (B, N, T, H), weights and logits (B, N, T, S) in float64, the logits of head n times scale[n]."""
    query, key, value = (
        np.einsum("btd,dnh->bnth", np.asarray(x, np.float64), np.asarray(params[name]["kernel"], np.float64))
        + np.asarray(params[name]["bias"], np.float64)[:, None]
        for name in ("query", "key", "value")
    )
    logits = np.reshape(scale, (-1, 1, 1)) * (query @ np.swapaxes(key, 2, 3)) / np.sqrt(query.shape[-1])
    weights = np.exp(logits)
    weights = weights / weights.sum(-1, keepdims=True)
    return weights @ value, weights, logits


def test_a_temperature_of_each_head_is_learned_from_a_start_that_changes_nothing():
    plain = MultiHeadAttention(2, reparam="none", bias_init=jax.nn.initializers.normal(0.3))
    layer = plain.clone(head_temperature=True)
    variables, expected = layer.init(jax.random.key(2), X), plain.init(jax.random.key(2), X)
    params = variables["params"]
    assert set(params) == {*expected["params"], "head_log_scale"}
    np.testing.assert_array_equal(params["head_log_scale"], np.zeros(2))
    np.testing.assert_array_equal(layer.apply(variables, X), plain.apply(expected, X))

    params = params | {"head_log_scale": jnp.log(jnp.asarray([3.0, 0.25]))}
    output, changed = layer.apply({"params": params}, X, mutable=["attention"])
    attended, weights, logits = attention_by_numpy(params, X, scale=[3.0, 0.25])
    out = np.einsum("bnth,nhd->btd", attended, params["out"]["kernel"]) + np.asarray(params["out"]["bias"])
    np.testing.assert_allclose(output, out, rtol=1e-4, atol=1e-5)
    recorded = changed["attention"]
    np.testing.assert_allclose(recorded["entropy"], -(weights * np.log(weights)).sum(-1).mean((0, 2)), rtol=1e-4)
    np.testing.assert_allclose(recorded["max_logit"], logits.max((0, 2, 3)), rtol=1e-4)
    assert np.all(recorded["bound"] <= recorded["entropy"])
    # The bound is that of logits of the same size: those of queries whose kernel and bias have the factor.
    scaled = {
        **{name: each for name, each in params.items() if name != "head_log_scale"},
        "query": {
            "kernel": params["query"]["kernel"] * jnp.asarray([3.0, 0.25])[:, None],
            "bias": params["query"]["bias"] * jnp.asarray([3.0, 0.25])[:, None],
        },
    }
    same = plain.apply({"params": scaled}, X, mutable=["attention"])[1]["attention"]
    np.testing.assert_allclose(recorded["bound"], same["bound"], rtol=1e-4)
    gradient = jax.grad(lambda params: jnp.sum(layer.apply({"params": params}, X) ** 2))(params)
    assert np.all(gradient["head_log_scale"] != 0)


@pytest.mark.parametrize(("gate", "features"), [("headwise", 1), ("elementwise", 4)])
def test_gated_attention_is_its_formula(gate, features):
    layer = MultiHeadAttention(2, reparam="none", attention_gate=gate, bias_init=jax.nn.initializers.normal(0.3))
    params = layer.init(jax.random.key(2), X)["params"]
    assert params["gate"]["kernel"].shape == (8, 2, features)
    attended, weights, _ = attention_by_numpy(params, X)
    gates = np.einsum("btd,dnh->bnth", X, params["gate"]["kernel"]) + np.asarray(params["gate"]["bias"])[:, None]
    attended = attended / (1 + np.exp(-gates))
    expected = np.einsum("bnth,nhd->btd", attended, params["out"]["kernel"]) + np.asarray(params["out"]["bias"])
    output, changed = layer.apply({"params": params}, X, mutable=["attention"])
    np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-5)
    entropies = -(weights * np.log(weights)).sum(-1).mean((0, 2))
    np.testing.assert_allclose(changed["attention"]["entropy"], entropies, rtol=1e-4)


def driven(scan, **fields):
    config = dataclasses.replace(CONFIG, entropy_target=0.5, reparam="none", init_std=1.0, scan=scan, **fields)
    stack = TransformerStack(config)
    variables = stack.init(jax.random.key(3), X)
    return stack, variables["params"], variables["losses"]


def of_layer(tree, scan, i):
    found = tree["blocks" if scan else f"block_{i}"]["attention"]
    return jax.tree.map(lambda x: np.asarray(x[i] if scan else x), found)


@pytest.mark.parametrize("scan", [False, True])
def test_the_entropy_target_moves_the_factor_and_nothing_else(scan):
    stack, params, losses = driven(scan)

    def sown(params):
        _, changed = stack.apply({"params": params, "losses": losses}, X, mutable=["losses"])
        return sum(map(jnp.sum, jax.tree.leaves(changed["losses"])))

    _, changed = stack.apply({"params": params, "losses": losses}, X, mutable=["losses", "attention"])
    gradient = jax.grad(sown)(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.any(leaf != 0) == ("log_scale" in str(path)), path
    for i in range(2):
        recorded = of_layer(changed["attention"], scan, i)
        share = recorded["entropy_normalised"].mean()
        np.testing.assert_allclose(
            of_layer(changed["losses"], scan, i)["entropy_target"], (share - 0.5) ** 2, rtol=1e-4
        )

        def moved(by, i=i):
            def add(x):
                return x.at[i].add(by) if scan else x + by

            layer = params["blocks" if scan else f"block_{i}"]
            layer = layer | {"attention": layer["attention"] | {"log_scale": add(layer["attention"]["log_scale"])}}
            changed = stack.apply(
                {"params": params | {"blocks" if scan else f"block_{i}": layer}, "losses": losses},
                X,
                mutable=["losses"],
            )[1]["losses"]
            return float(of_layer(changed, scan, i)["entropy_target"])

        numeric = (moved(0.01) - moved(-0.01)) / 0.02
        np.testing.assert_allclose(of_layer(gradient, scan, i)["log_scale"], numeric, rtol=2e-2, atol=1e-5)


def test_the_factor_multiplies_the_logits_and_takes_no_gradient_from_the_task():
    stack, params, losses = driven(False, depth=1)
    attention = params["block_0"]["attention"] | {"log_scale": jnp.log(3.0)}
    params = params | {"block_0": params["block_0"] | {"attention": attention}}
    plain = TransformerStack(dataclasses.replace(stack.config, entropy_target=0.0, attention_temperature=1 / 3))
    without = {name: x for name, x in attention.items() if name != "log_scale"}
    expected = plain.apply({"params": params | {"block_0": params["block_0"] | {"attention": without}}}, X)
    np.testing.assert_allclose(stack.apply({"params": params, "losses": losses}, X), expected, rtol=1e-4, atol=1e-5)
    gradient = jax.grad(lambda p: jnp.sum(stack.apply({"params": p, "losses": losses}, X) ** 2))(params)
    assert gradient["block_0"]["attention"]["log_scale"] == 0


def test_gradient_descent_on_the_factor_reaches_the_target():
    stack, params, losses = driven(True)

    @jax.jit
    def step(params):
        def sown(params):
            _, changed = stack.apply({"params": params, "losses": losses}, X, mutable=["losses"])
            return sum(map(jnp.sum, jax.tree.leaves(changed["losses"])))

        return jax.tree.map(lambda x, g: x - 3.0 * g, params, jax.grad(sown)(params))

    for _ in range(60):
        params = step(params)
    _, changed = stack.apply({"params": params, "losses": losses}, X, mutable=["attention"])
    found = changed["attention"]["blocks"]["attention"]["entropy_normalised"].mean(axis=1)
    np.testing.assert_allclose(found, 0.5, atol=0.02)


@pytest.mark.parametrize("shape", [(4, 3, 9), (9, 3, 4)])
def test_seq_vcr_is_its_formula_with_few_and_with_many_sequences(shape):
    states = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    b, t, d = shape
    total = 0.0
    for i in range(t):
        covariance = np.cov(states[:, i], rowvar=False)
        off_diagonal = (covariance**2).sum() - (np.diag(covariance) ** 2).sum()
        total += np.maximum(0, 1 - np.sqrt(np.diag(covariance) + 1e-3)).sum() + 0.004 * off_diagonal
    np.testing.assert_allclose(seq_vcr(jnp.asarray(states)), total / (t * d), rtol=1e-4)
    # Padding changes nothing, whatever stands there; a position with one token alone is left out.
    padded = np.concatenate([states, 100 * np.ones((b, 2, d), np.float32)], axis=1)
    real = np.ones((b, t + 2), bool)
    real[:, t:], real[0, t] = False, True
    np.testing.assert_allclose(seq_vcr(jnp.asarray(padded), jnp.asarray(real)), total / (t * d), rtol=1e-4)


@pytest.mark.parametrize("scan", [False, True])
def test_a_stack_sows_seq_vcr_of_its_last_block(scan):
    stack = TransformerStack(dataclasses.replace(CONFIG, seq_vcr=2.0, norm="none", scan=scan))
    variables = stack.init(jax.random.key(3), X)
    output, changed = stack.apply(variables, X, mutable=["losses"])
    np.testing.assert_allclose(changed["losses"]["seq_vcr"], 2.0 * seq_vcr(output), rtol=1e-5)
    assert "losses" not in TransformerStack(CONFIG).init(jax.random.key(3), X)


@pytest.mark.parametrize("masked", [False, True])
def test_the_entropy_of_sigmoid_weights_is_that_of_the_matrix_over_blocks(masked):
    rng = np.random.default_rng(0)
    query, key = (jnp.asarray(rng.normal(size=(2, n, 3, 4)).astype(np.float32)) for n in (5, 11))
    mask = jnp.asarray(rng.random((2, 1, 5, 11)) < 0.6) if masked else None
    logits = jnp.einsum("btnh,bsnh->bnts", query, key) / 2
    visible = jnp.ones((1, 1, 5, 11), bool) if mask is None else mask
    weights = entropy.sigmoid_weights(logits, visible)
    share = weights / weights.sum(-1, keepdims=True)
    for found in (
        entropy.attention_statistics(query, key, mask=mask, sigmoid=True, block_size=4),
        entropy.statistics_of_logits(logits, mask, sigmoid=True),
    ):
        np.testing.assert_allclose(found.entropy, entropy.entropy_of_weights(share), rtol=1e-4)
        np.testing.assert_allclose(found.max_logit, jnp.where(visible, logits, -jnp.inf).max(-1), rtol=1e-5)
