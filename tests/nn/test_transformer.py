"""Attention, blocks and stacks: every way of computing them gives the same numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sigmarep.core import entropy
from sigmarep.nn import MultiHeadAttention, TransformerBlock, TransformerConfig, TransformerStack, fold

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (2, 6, 16))
CONTEXT = jax.random.normal(jax.random.key(2), (2, 9, 16))
PADDING = jnp.arange(6)[None] < jnp.asarray([6, 4])[:, None]
SMALL = TransformerConfig(3, 16, 4, 24, norm="post", reparam="sigma", init_std=0.3)


def unstacked(variables, depth):
    """Variables of the unrolled stack from those of the scanned one."""
    return {
        collection: {
            **{name: value for name, value in tree.items() if name != "blocks"},
            **{f"block_{i}": jax.tree.map(lambda x, i=i: x[i], tree["blocks"]) for i in range(depth)},
        }
        for collection, tree in variables.items()
    }


def close(a, b, rtol=1e-4, atol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


@pytest.mark.parametrize("norm", ["pre", "deepnorm"])
def test_scanned_equals_unrolled_in_output_state_and_gradient(norm):
    c = dataclasses.replace(SMALL, norm=norm)
    scanned, unrolled = TransformerStack(c), TransformerStack(dataclasses.replace(c, scan=False))
    stacked = scanned.init(KEY, X)
    apart = unstacked(stacked, 3)

    def loss(model, variables):
        def of(params):
            output, changed = model.apply({**variables, "params": params}, X, mutable=["spectral", "attention"])
            return jnp.sum(jnp.sin(output)), (output, changed)

        (_, auxiliary), gradient = jax.jit(jax.value_and_grad(of, has_aux=True))(variables["params"])
        return *auxiliary, gradient

    output, changed, gradient = loss(scanned, stacked)
    expected, state, other = loss(unrolled, apart)
    close(output, expected)
    close(unstacked(dict(changed), 3), dict(state))
    close(unstacked({"params": gradient}, 3)["params"], other)


@pytest.mark.parametrize(("remat", "scan"), [("full", True), ("full", False), ("dots", True)])
def test_recomputing_changes_neither_gradient_nor_power_step(remat, scan):
    # Dropout too: what is recomputed must draw the same masks.
    c = dataclasses.replace(SMALL, depth=2, scan=scan, dropout=0.3, layer_drop=0.3)
    options = {"deterministic": False, "rngs": {"dropout": KEY}, "mutable": ["spectral"]}
    variables = TransformerStack(c).init(KEY, X)
    results = []
    for word in ("none", remat):
        model = TransformerStack(dataclasses.replace(c, remat=word))

        def loss(params, model=model):
            output, changed = model.apply({**variables, "params": params}, X, **options)
            return jnp.sum(jnp.sin(output)), changed

        results.append(jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"]))
    close(*results)


@pytest.mark.parametrize(
    ("reparam", "qkv", "scan"),
    [
        ("sigma", "fused", True),
        ("sigma", "qk_v", True),
        ("sigma", "separate", True),
        ("sigma", "qk_v", False),
        ("spectral", "qk_v", True),
        ("spectral", "fused", False),
        ("weight", "fused", True),
        ("weight", "separate", False),
    ],
)
def test_folding_gives_the_plain_model_with_the_same_outputs(reparam, qkv, scan):
    c = dataclasses.replace(SMALL, depth=2, scan=scan, qkv=qkv, reparam=reparam)
    model = TransformerStack(c)
    plain = TransformerStack(dataclasses.replace(c, reparam="none"))
    variables = model.init(KEY, X)
    # Two updates' worth of drift, so that u is not exact and γ not 1.
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(KEY, x.shape), variables["params"])
    folded = fold({**variables, "params": params})
    shapes = jax.tree.map(jnp.shape, jax.eval_shape(plain.init, KEY, X)["params"])
    assert jax.tree.map(jnp.shape, folded) == shapes
    close(plain.apply({"params": folded}, X), model.apply({**variables, "params": params}, X), rtol=1e-5, atol=2e-6)


def by_jax(layer, variables, x, context=None, key_padding=None, mask=None, is_causal=False):
    """The layer's result by folded kernels and `jax.nn.dot_product_attention`."""
    folded = fold(variables)
    sources = (x, *(2 * [x if context is None else context]))
    if "qkv" in folded and context is None:
        both = zip(np.moveaxis(folded["qkv"]["kernel"], 1, 0), folded["qkv"]["bias"], strict=True)
    else:
        both = ((folded[name]["kernel"], folded[name]["bias"]) for name in ("query", "key", "value"))
    parts = [
        (jnp.einsum("btd,dnh->btnh", source, kernel) + bias).astype(layer.dtype or jnp.float32)
        for source, (kernel, bias) in zip(sources, both, strict=True)
    ]
    if key_padding is not None:
        mask = key_padding[:, None, None]
    attended = jax.nn.dot_product_attention(*parts, mask=mask, is_causal=is_causal, implementation="xla")
    return jnp.einsum("btnh,nhd->btd", attended, folded["out"]["kernel"]) + folded["out"]["bias"]


@pytest.mark.parametrize("qkv", ["separate", "fused"])
@pytest.mark.parametrize("arguments", [{}, {"is_causal": True}, {"key_padding": PADDING}, {"mask": "random"}])
def test_attention_equals_that_of_jax(arguments, qkv):
    if "mask" in arguments:
        arguments = {"mask": jax.random.bernoulli(KEY, 0.7, (2, 1, 6, 6)) | jnp.eye(6, dtype=bool)}
    layer = MultiHeadAttention(4, qkv=qkv)
    variables = layer.init(KEY, X)
    close(
        jax.value_and_grad(lambda x: jnp.sum(layer.apply(variables, x, **arguments) ** 2))(X),
        jax.value_and_grad(lambda x: jnp.sum(by_jax(layer, variables, x, **arguments) ** 2))(X),
    )


def test_attention_in_half_precision_has_the_gradients_of_jax():
    layer = MultiHeadAttention(4, dtype=jnp.bfloat16)
    variables = layer.init(KEY, X)
    found, expected = (
        jax.grad(lambda x, f=f: jnp.sum(f(x).astype(jnp.float32) ** 2))(X)
        for f in (lambda x: layer.apply(variables, x), lambda x: by_jax(layer, variables, x))
    )
    # Projections are products of bfloat16 in the layer, of float32 in the reference.
    assert np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(expected)
    program = jax.make_jaxpr(jax.grad(lambda x: jnp.sum(layer.apply(variables, x).astype(jnp.float32))))(X)
    products = [each for each in program.eqns if each.primitive.name == "dot_general"]
    assert len(products) > 10
    for each in products:
        rounded = each.params["precision"] == jax.lax.DotAlgorithmPreset.BF16_BF16_F32
        assert rounded or {x.aval.dtype for x in each.invars} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("qkv", ["separate", "fused"])
def test_cross_attention_equals_that_of_jax_and_projects_apart(qkv):
    layer = MultiHeadAttention(4, qkv=qkv)
    variables = layer.init(KEY, X, CONTEXT)
    assert set(variables["params"]) == {"query", "key", "value", "out"}
    close(
        jax.value_and_grad(lambda *x: jnp.sum(layer.apply(variables, *x) ** 2), (0, 1))(X, CONTEXT),
        jax.value_and_grad(lambda *x: jnp.sum(by_jax(layer, variables, *x) ** 2), (0, 1))(X, CONTEXT),
    )


@pytest.mark.parametrize("arguments", [{}, {"is_causal": True}, {"key_padding": PADDING}, {"segments": True}])
def test_beside_a_fused_kernel_the_statistics_are_the_same(monkeypatch, arguments):
    if "segments" in arguments:
        arguments = {"segments": jnp.asarray([[1, 1, 1, 2, 2, 0], [1, 2, 2, 2, 2, 2]])}

    def kernel(query, key, value, *, mask, is_causal):
        return jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=is_causal, implementation="xla")

    # cuDNN's needs a GPU; what stands for it here is the same function by XLA.
    monkeypatch.setattr("sigmarep.nn.attention.cudnn_attention", kernel)
    layer = MultiHeadAttention(4)
    variables = layer.init(KEY, 3 * X)
    plain = layer.apply(variables, 3 * X, mutable=["attention"], **arguments)
    fused = layer.clone(implementation="cudnn").apply(variables, 3 * X, mutable=["attention"], **arguments)
    assert set(plain[1]["attention"]) >= {"entropy", "max_logit", "logit_variance", "bound"}
    close(fused, plain)


def weights_of(layer, variables, x, context, visible):
    """Float64 attention weights and logits from the folded parameters."""
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), fold(variables))
    q, k = (
        np.einsum("btd,dnh->btnh", np.asarray(y, np.float64), params[name]["kernel"]) + params[name]["bias"]
        for name, y in (("query", x), ("key", context))
    )
    if layer.qk_norm != "none":
        centre = layer.qk_norm == "layer"
        q, k = (y - centre * y.mean(-1, keepdims=True) for y in (q, k))
        q, k = (
            y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-6) * params[f"{name}_norm"]["scale"]
            for name, y in (("query", q), ("key", k))
        )
    logits = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1])
    if layer.logit_cap:
        logits = layer.logit_cap * np.tanh(logits / layer.logit_cap)
    logits = np.where(visible, logits, -np.inf)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True), logits, params


@pytest.mark.parametrize("kind", ["self", "causal", "padded", "cross", "layer", "rms", "capped"])
def test_recorded_statistics_equal_the_full_attention_matrix(kind):
    fields = {"layer": {"qk_norm": "layer"}, "rms": {"qk_norm": "rms"}, "capped": {"logit_cap": 0.5}}.get(kind, {})
    layer = MultiHeadAttention(4, gamma_init=3.0, **fields)
    context = CONTEXT if kind == "cross" else None
    arguments = {"is_causal": True} if kind == "causal" else {"key_padding": PADDING} if kind == "padded" else {}
    variables = layer.init(KEY, X, context)
    _, changed = layer.apply(variables, X, context, mutable=["attention"], **arguments)
    recorded = changed["attention"]
    t, s = 6, 9 if kind == "cross" else 6
    visible = np.ones((2, 1, t, s), bool)
    real = np.ones((2, t), bool)
    if kind == "causal":
        visible &= np.tril(np.ones((t, s), bool))
    if kind == "padded":
        real = np.asarray(PADDING)
        visible &= real[:, None, None, :]
    p, logits, params = weights_of(layer, variables, X, X if context is None else context, visible)
    rows = -np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0).sum(-1)
    most = np.log(np.broadcast_to(visible, p.shape).sum(-1))
    share = np.where(most > 0, rows / np.where(most > 0, most, 1), 1.0)
    for h in range(4):
        np.testing.assert_allclose(recorded["entropy"][h], rows[:, h][real].mean(), rtol=1e-4)
        np.testing.assert_allclose(recorded["entropy_normalised"][h], share[:, h][real].mean(), rtol=1e-4)
        np.testing.assert_allclose(recorded["max_logit"][h], logits[:, h][real].max(), rtol=1e-4)
        variance = np.array([np.var(row[np.isfinite(row)]) for row in logits[:, h][real]])
        np.testing.assert_allclose(recorded["logit_variance"][h], variance.mean(), rtol=1e-4)
        product = params["query"]["kernel"][:, h] @ params["key"]["kernel"][:, h].T
        np.testing.assert_allclose(recorded["qk_norm"][h], np.linalg.norm(product, 2), rtol=1e-4)


@pytest.mark.parametrize("qkv", ["fused", "qk_v", "separate"])
@pytest.mark.parametrize("reparam", ["none", "sigma", "weight"])
def test_the_query_key_norm_is_found_in_every_layout(qkv, reparam):
    layer = MultiHeadAttention(4, qkv=qkv, reparam=reparam)
    variables = dict(layer.init(KEY, X))
    if "spectral" in variables:
        # Vectors from which one step is not enough: σ is then that of the step which the layer made, and of no other.
        state = {name: {**each, "u": jnp.ones_like(each["u"])} for name, each in variables["spectral"].items()}
        variables["spectral"] = state
    _, changed = layer.apply(variables, X, mutable=["spectral", "attention"])
    params = fold(variables)
    fused = {"fused": "qkv", "qk_v": "qk"}.get(qkv)
    pair = [params[fused]["kernel"][:, i] for i in (0, 1)] if fused else [params[n]["kernel"] for n in ("query", "key")]
    expected = [np.linalg.norm(pair[0][:, h] @ pair[1][:, h].T, 2) for h in range(4)]
    np.testing.assert_allclose(changed["attention"]["qk_norm"], expected, rtol=1e-4)


@pytest.mark.parametrize("kind", ["self", "causal", "padded", "cross", "biased"])
def test_the_recorded_bound_is_the_theorems(kind):
    layer = MultiHeadAttention(
        4, use_bias=kind == "biased", bias_init=jax.nn.initializers.normal(0.1), gamma_init=0.3, temperature=0.7
    )
    context = CONTEXT if kind == "cross" else None
    arguments = {"is_causal": True} if kind == "causal" else {"key_padding": PADDING} if kind == "padded" else {}
    variables = layer.init(KEY, X, context)
    _, changed = layer.apply(variables, X, context, mutable=["attention"], **arguments)
    recorded, params = changed["attention"], fold(variables)
    # The norms are found from below, by some per cent here; the bound of Theorem 3.1 then is a little high.
    real = np.asarray(PADDING) if kind == "padded" else np.ones(X.shape[:2], bool)
    keys, bounds = np.asarray(X if context is None else context), np.zeros((4, *X.shape[:2]))
    for h in range(4):
        for b in range(len(X)):
            pair = []
            for name, inputs in (("query", X[b][real[b]]), ("key", keys[b][real[b]] if context is None else keys[b])):
                kernel = np.asarray(params[name]["kernel"])[:, h]
                if kind == "biased":
                    kernel = np.concatenate([kernel, np.asarray(params[name]["bias"])[h][None]])
                    inputs = np.concatenate([inputs, np.ones((len(inputs), 1))], axis=1)
                pair.append((kernel, np.linalg.norm(inputs, 2), len(inputs)))
            (query, x_norm, _), (key, y_norm, count) = pair
            sigma = np.linalg.norm(query @ key.T, 2) * x_norm * y_norm / 2 / 0.7
            visible = np.arange(1, 7) if kind == "causal" else np.full(6, count)
            bounds[h, b] = entropy.entropy_lower_bound(sigma, visible)
        np.testing.assert_allclose(recorded["bound"][h], bounds[h][real].mean(), rtol=0.05)
    assert np.all(recorded["bound"] <= recorded["entropy"])


@pytest.mark.parametrize("fields", [{"qk_norm": "layer"}, {"qk_norm": "rms"}, {"rotary_base": 100.0}])
def test_the_bound_holds_for_queries_and_keys_that_are_changed_after_their_projection(fields):
    layer = MultiHeadAttention(4, gamma_init=2.0, **fields)
    variables = layer.init(KEY, X)
    _, changed = layer.apply(variables, X, mutable=["attention"])
    bound, found = changed["attention"]["bound"], changed["attention"]["entropy"]
    assert np.all(np.isfinite(bound))
    assert np.all(bound <= found)


class Unrecorded(MultiHeadAttention):
    """The layer with its statistics cut out."""

    def _record(self, *inputs):
        pass

    def _statistics_of(self, *inputs):
        pass


def test_nothing_is_computed_for_statistics_that_nobody_asks_for():
    variables = MultiHeadAttention(4).init(KEY, X)
    assert "attention" not in variables

    def program(kind, mutable):
        return str(jax.make_jaxpr(lambda v: kind(4).apply(v, X, mutable=mutable))(variables))

    assert program(MultiHeadAttention, ["spectral"]) == program(Unrecorded, ["spectral"])
    assert program(MultiHeadAttention, ["attention"]) != program(Unrecorded, ["attention"])


def test_an_example_without_a_real_token_is_left_out_of_the_statistics():
    layer = MultiHeadAttention(4)
    variables = layer.init(KEY, X)
    empty = jnp.asarray([[True] * 6, [False] * 6])
    output, changed = layer.apply(variables, X, key_padding=empty, mutable=["attention"])
    alone = layer.apply(variables, X[:1], mutable=["attention"])[1]
    assert np.all(np.isfinite(output))
    close(changed, alone)


def test_entropy_is_taken_before_dropout():
    layer = MultiHeadAttention(4, dropout=0.5)
    variables = layer.init(KEY, X)
    noisy = layer.apply(variables, X, deterministic=False, rngs={"dropout": KEY}, mutable=["attention"])
    quiet = layer.apply(variables, X, mutable=["attention"])
    assert not np.allclose(noisy[0], quiet[0])
    close(noisy[1], quiet[1])


def test_auto_takes_the_fused_kernel_where_it_serves(monkeypatch):
    calls = []

    def kernel(query, key, value, *, mask, is_causal):
        calls.append((mask, is_causal))
        return value

    monkeypatch.setattr("sigmarep.nn.attention.cudnn_attention", kernel)
    monkeypatch.setattr("sigmarep.nn.attention.cudnn_serves", lambda query: True)
    layer = MultiHeadAttention(4)
    variables = layer.init(KEY, X)
    calls.clear()
    for fields, arguments in (
        ({"logit_cap": 3.0}, {}),
        ({"weights": "sigmoid"}, {}),
        ({"dropout": 0.1}, {"deterministic": False, "rngs": {"dropout": KEY}}),
        ({"implementation": "xla"}, {}),
        ({}, {"key_padding": PADDING}),
        ({}, {"mask": jnp.eye(6, dtype=bool)}),
        ({}, {"segments": jnp.ones((2, 6), int)}),
        ({}, {"context": CONTEXT, "is_causal": True}),
    ):
        layer.clone(**fields).apply(variables, X, **arguments)
    assert not calls
    layer.apply(variables, X)
    layer.clone(dropout=0.1).apply(variables, X, is_causal=True)
    assert calls == [(None, False), (None, True)]


def test_causal_cross_attention_counts_from_the_last_key():
    layer = MultiHeadAttention(4)
    variables = layer.init(KEY, X, CONTEXT)
    t, s = X.shape[1], CONTEXT.shape[1]
    assert t != s
    visible = np.tri(t, s, s - t, dtype=bool)
    found = layer.apply(variables, X, CONTEXT, is_causal=True, mutable=["attention"])
    close(found, layer.apply(variables, X, CONTEXT, mask=jnp.asarray(visible), mutable=["attention"]))


def test_the_fused_kernel_refuses_what_it_cannot_do():
    layer = MultiHeadAttention(4, dropout=0.5, implementation="cudnn")
    with pytest.raises(ValueError, match="implementation = 'cudnn': attention dropout"):
        layer.init({"params": KEY, "dropout": KEY}, X, deterministic=False)


def test_deepnorm_constants_equal_the_papers():
    # DeepNet, encoder only: α⁴ = 2N and β⁴ = 1/(8N).
    for depth, alpha, beta in (
        (6, 1.861210, 0.379918),
        (18, 2.449490, 0.288675),
        (50, 3.162278, 0.223607),
        (100, 3.760603, 0.188030),
    ):
        c = dataclasses.replace(SMALL, norm="deepnorm", depth=depth)
        np.testing.assert_allclose([c.alpha, c.beta], [alpha, beta], rtol=1e-6)
    plain, scaled = (
        TransformerBlock(dataclasses.replace(SMALL, norm=norm, reparam="none", qkv="fused")).init(KEY, X)["params"]
        for norm in ("post", "deepnorm")
    )
    beta = dataclasses.replace(SMALL, norm="deepnorm").beta
    ratio = scaled["attention"]["qkv"]["kernel"] / plain["attention"]["qkv"]["kernel"]
    np.testing.assert_allclose(ratio[:, 0], 1.0, rtol=1e-5)
    np.testing.assert_allclose(ratio[:, 2], beta, rtol=1e-5)
    for path in (("attention", "out"), ("mlp", "up"), ("mlp", "down")):
        a, b = (tree[path[0]][path[1]]["kernel"] for tree in (scaled, plain))
        np.testing.assert_allclose(a / b, beta, rtol=1e-5)


def test_drop_path_drops_branches_of_single_examples_and_rescales_the_others():
    c = dataclasses.replace(SMALL, norm="none", drop_path=0.5, reparam="none")
    block = TransformerBlock(c)
    x = jnp.broadcast_to(X[:1], (400, 6, 16))
    variables = block.init(KEY, x)
    # A silent MLP leaves one branch to look at.
    variables["params"]["mlp"]["down"]["kernel"] *= 0
    branch = block.apply(variables, x, 0.0) - x
    dropped = block.apply(variables, x, 0.75, deterministic=False, rngs={"dropout": KEY})
    kept = np.any(np.abs(dropped - x) > 1e-6, axis=(1, 2))
    np.testing.assert_allclose(dropped - x, kept[:, None, None] * branch * 4, atol=1e-4)
    # 400 draws at 1/4: three standard deviations are 0.065.
    assert abs(kept.mean() - 0.25) < 0.065
    np.testing.assert_array_equal(block.apply(variables, x, 0.75) - x, branch)


def test_the_rate_of_drop_path_rises_from_none_in_the_first_block_to_the_last():
    c = dataclasses.replace(SMALL, depth=2, norm="none", drop_path=0.9, reparam="none")
    x = jnp.broadcast_to(X[:1], (200, 6, 16))
    stack = TransformerStack(c)
    variables = stack.init(KEY, x[:1])
    first = TransformerBlock(c).apply({"params": jax.tree.map(lambda a: a[0], variables["params"]["blocks"])}, x)
    dropped = stack.apply(variables, x, deterministic=False, rngs={"dropout": KEY})
    only_first = np.all(np.isclose(dropped, first, atol=1e-5), axis=(1, 2))
    # Both branches of the last block dropped: 0.81 of the examples, ± three standard deviations.
    assert abs(only_first.mean() - 0.81) < 0.085


def test_layer_drop_leaves_whole_blocks_out_without_rescaling():
    c = dataclasses.replace(SMALL, norm="none", layer_drop=0.5, reparam="none")
    block = TransformerBlock(c)
    variables = block.init(KEY, X)
    full = block.apply(variables, X)
    kept = []
    for seed in range(40):
        output = block.apply(variables, X, deterministic=False, rngs={"dropout": jax.random.key(seed)})
        is_kept, is_dropped = np.allclose(output, full, atol=1e-5), np.allclose(output, X, atol=1e-6)
        assert is_kept != is_dropped
        kept.append(is_kept)
    assert 8 < sum(kept) < 32


@pytest.mark.parametrize("scan", [True, False])
def test_layer_drop_draws_for_every_block_anew(scan):
    stack = TransformerStack(
        dataclasses.replace(SMALL, depth=2, norm="none", layer_drop=0.5, reparam="none", scan=scan)
    )
    variables = stack.init(KEY, X)
    run = jax.jit(lambda key: stack.apply(variables, X, deterministic=False, rngs={"dropout": key}))
    outputs = {round(float(jnp.sum(jnp.abs(run(jax.random.key(seed))))), 2) for seed in range(40)}
    # Each of two blocks kept or left out.
    assert len(outputs) == 4


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("norm", "prenorm", "expected one of none, pre, post, deepnorm"),
        ("reparam", "sigmoid", "expected one of none, sigma, spectral, weight"),
        ("qkv", "joint", "expected one of separate, fused, qk_v"),
        ("activation", "gelo", "expected one of gelu"),
        ("remat", "some", "expected one of none, full, dots"),
        ("num_heads", 5, "does not divide width = 16"),
        ("depth", 0, "at least 1"),
        ("mlp_dim", -4, "at least 1"),
        ("qk_norm", "l2", "expected one of none, layer, rms"),
        ("attention_implementation", "flash", "expected one of auto, xla, cudnn"),
        ("kernel_init", "zeros", "expected one of trunc_normal, normal"),
        ("drop_path", -0.1, "from 0 to below 1"),
        ("dropout", 1.0, "from 0 to below 1"),
        ("gamma_init", "two", "'one', 'sigma' or a number"),
    ],
)
def test_impossible_configurations_are_refused_by_name(field, value, message):
    with pytest.raises(ValueError, match=f"{field} = .*{message}"):
        dataclasses.replace(SMALL, **{field: value})


def test_a_block_of_power_vectors_is_the_same_scanned_unrolled_and_folded():
    c = dataclasses.replace(SMALL, power_vectors=3)
    scanned, unrolled = TransformerStack(c), TransformerStack(dataclasses.replace(c, scan=False))
    stacked = scanned.init(KEY, X)
    stacked["params"] = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(KEY, x.shape), stacked["params"])
    output, changed = scanned.apply(stacked, X, mutable=["spectral"])
    expected, state = unrolled.apply(unstacked(stacked, 3), X, mutable=["spectral"])
    close(output, expected)
    # The sign of a vector of the basis is nobody's choice.
    close(jax.tree.map(jnp.abs, unstacked(dict(changed), 3)), jax.tree.map(jnp.abs, dict(state)), atol=1e-3)
    plain = TransformerStack(dataclasses.replace(c, reparam="none"))
    close(plain.apply({"params": fold(stacked)}, X), scanned.apply(stacked, X))
