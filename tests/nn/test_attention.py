"""Attention: its values and gradients, its statistics, and which road it takes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sigmarep.core import entropy
from sigmarep.nn import MultiHeadAttention, fold
from sigmarep.nn.visibility import CAUSAL, FULL, Visibility

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (2, 6, 16))
CONTEXT = jax.random.normal(jax.random.key(2), (2, 9, 16))
REAL = jnp.arange(6)[None] < jnp.asarray([6, 4])[:, None]
PADDED = Visibility(key_mask=REAL)
KINDS = {"causal": CAUSAL, "padded": PADDED}


def close(a, b, rtol=1e-4, atol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def by_jax(layer, variables, x, context=None, visibility=FULL):
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
    mask = visibility.mask if visibility.key_mask is None else visibility.key_mask[:, None, None]
    attended = jax.nn.dot_product_attention(*parts, mask=mask, is_causal=visibility.is_causal, implementation="xla")
    return jnp.einsum("btnh,nhd->btd", attended, folded["out"]["kernel"]) + folded["out"]["bias"]


@pytest.mark.parametrize("qkv", ["separate", "fused"])
@pytest.mark.parametrize("kind", ["full", "causal", "padded", "masked"])
def test_attention_equals_that_of_jax(kind, qkv):
    visibility = KINDS.get(kind, FULL)
    if kind == "masked":
        visibility = Visibility(mask=jax.random.bernoulli(KEY, 0.7, (2, 1, 6, 6)) | jnp.eye(6, dtype=bool))
    layer = MultiHeadAttention(4, qkv=qkv)
    variables = layer.init(KEY, X)
    close(
        jax.value_and_grad(lambda x: jnp.sum(layer.apply(variables, x, visibility=visibility) ** 2))(X),
        jax.value_and_grad(lambda x: jnp.sum(by_jax(layer, variables, x, visibility=visibility) ** 2))(X),
    )


def test_attention_in_half_precision_has_the_gradients_of_jax():
    layer = MultiHeadAttention(4, dtype=jnp.bfloat16)
    variables = layer.init(KEY, X)
    gradient, expected = (
        jax.grad(lambda x, f=f: jnp.sum(f(x).astype(jnp.float32) ** 2))(X)
        for f in (lambda x: layer.apply(variables, x), lambda x: by_jax(layer, variables, x))
    )
    # Projections are products of bfloat16 in the layer, of float32 in the reference.
    assert np.linalg.norm(gradient - expected) < 0.02 * np.linalg.norm(expected)
    program = jax.make_jaxpr(jax.grad(lambda x: jnp.sum(layer.apply(variables, x).astype(jnp.float32))))(X)
    products = [each for each in program.eqns if each.primitive.name == "dot_general"]
    assert len(products) > 10
    for each in products:
        rounded = each.params["precision"] == jax.lax.DotAlgorithmPreset.BF16_BF16_F32
        assert rounded or {x.aval.dtype for x in each.invars} == {jnp.dtype(jnp.bfloat16)}


def _captured(layer, variables, x):
    """Heads of queries, keys and values, and what the output layer reads."""
    captured = {}

    def intercept(next_function, args, kwargs, context):
        result = next_function(*args, **kwargs)
        if context.method_name == "__call__" and context.module.name in ("query", "key", "value", "out"):
            captured[context.module.name] = args[0] if context.module.name == "out" else result
        return result

    with nn.intercept_methods(intercept):
        layer.apply(variables, x)
    return captured


def test_attention_in_float32_rounds_nothing_between_the_projections():
    x = 4 * X.astype(jnp.bfloat16)
    variables = MultiHeadAttention(4, dtype=jnp.bfloat16).init(KEY, x)
    errors = {}
    for float32 in (False, True):
        layer = MultiHeadAttention(4, dtype=jnp.bfloat16, float32=float32, implementation="xla")
        heads = _captured(layer, variables, x)
        query, key, value = (np.asarray(heads[name], np.float64) for name in ("query", "key", "value"))
        logits = np.einsum("btnh,bsnh->bnts", query, key) / 2.0
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        expected = np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), value)
        assert heads["query"].dtype == jnp.bfloat16
        assert heads["out"].dtype == (jnp.float32 if float32 else jnp.bfloat16)
        errors[float32] = np.max(np.abs(np.asarray(heads["out"], np.float64) - expected))
        assert layer.apply(variables, x).dtype == jnp.bfloat16
    assert errors[True] < 1e-5 < 1e-3 < errors[False]


@pytest.mark.parametrize("qkv", ["separate", "fused"])
def test_cross_attention_equals_that_of_jax_and_projects_apart(qkv):
    layer = MultiHeadAttention(4, qkv=qkv)
    variables = layer.init(KEY, X, CONTEXT)
    assert set(variables["params"]) == {"query", "key", "value", "out"}
    close(
        jax.value_and_grad(lambda *x: jnp.sum(layer.apply(variables, *x) ** 2), (0, 1))(X, CONTEXT),
        jax.value_and_grad(lambda *x: jnp.sum(by_jax(layer, variables, *x) ** 2), (0, 1))(X, CONTEXT),
    )


@pytest.mark.parametrize("kind", ["full", "causal", "padded", "segments"])
def test_beside_a_fused_kernel_the_statistics_are_the_same(monkeypatch, kind):
    segments = Visibility(segments=jnp.asarray([[1, 1, 1, 2, 2, 0], [1, 2, 2, 2, 2, 2]]))
    visibility = segments if kind == "segments" else KINDS.get(kind, FULL)

    def kernel(query, key, value, *, mask, is_causal):
        return jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=is_causal, implementation="xla")

    # cuDNN's needs a GPU; what stands for it here is the same function by XLA.
    monkeypatch.setattr("sigmarep.nn.attention.cudnn_attention", kernel)
    layer = MultiHeadAttention(4)
    variables = layer.init(KEY, 3 * X)
    plain = layer.apply(variables, 3 * X, visibility=visibility, mutable=["attention"])
    fused = layer.clone(implementation="cudnn").apply(variables, 3 * X, visibility=visibility, mutable=["attention"])
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
    variables = layer.init(KEY, X, context)
    _, changed = layer.apply(variables, X, context, visibility=KINDS.get(kind, FULL), mutable=["attention"])
    recorded = changed["attention"]
    t, s = 6, 9 if kind == "cross" else 6
    visible = np.ones((2, 1, t, s), bool)
    real = np.ones((2, t), bool)
    if kind == "causal":
        visible &= np.tril(np.ones((t, s), bool))
    if kind == "padded":
        real = np.asarray(REAL)
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
    variables = layer.init(KEY, X, context)
    _, changed = layer.apply(variables, X, context, visibility=KINDS.get(kind, FULL), mutable=["attention"])
    recorded, params = changed["attention"], fold(variables)
    # The norms are found from below, by some per cent here; the bound of Theorem 3.1 then is a little high.
    real = np.asarray(REAL) if kind == "padded" else np.ones(X.shape[:2], bool)
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
    assert np.all(np.isfinite(changed["attention"]["bound"]))
    assert np.all(changed["attention"]["bound"] <= changed["attention"]["entropy"])


class Unrecorded(MultiHeadAttention):
    """The layer with its statistics cut out."""

    def _record(self, *inputs):
        pass

    def _statistics_of_matrix(self, *inputs):
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
    output, changed = layer.apply(variables, X, visibility=Visibility(key_mask=empty), mutable=["attention"])
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
    monkeypatch.setattr("sigmarep.nn.attention.cudnn_supports", lambda query: True)
    layer = MultiHeadAttention(4)
    variables = layer.init(KEY, X)
    calls.clear()
    for fields, arguments in (
        ({"logit_cap": 3.0}, {}),
        ({"weights": "sigmoid"}, {}),
        ({"dropout": 0.1}, {"deterministic": False, "rngs": {"dropout": KEY}}),
        ({"implementation": "xla"}, {}),
        ({}, {"visibility": PADDED}),
        ({}, {"visibility": Visibility(mask=jnp.eye(6, dtype=bool))}),
        ({}, {"visibility": Visibility(segments=jnp.ones((2, 6), int))}),
        ({}, {"context": CONTEXT, "visibility": CAUSAL}),
    ):
        layer.clone(**fields).apply(variables, X, **arguments)
    assert not calls
    layer.apply(variables, X)
    layer.clone(dropout=0.1).apply(variables, X, visibility=CAUSAL)
    assert calls == [(None, False), (None, True)]


def test_causal_cross_attention_counts_from_the_last_key():
    layer = MultiHeadAttention(4)
    variables = layer.init(KEY, X, CONTEXT)
    t, s = X.shape[1], CONTEXT.shape[1]
    assert t != s
    visible = np.tri(t, s, s - t, dtype=bool)
    causal = layer.apply(variables, X, CONTEXT, visibility=CAUSAL, mutable=["attention"])
    close(
        causal,
        layer.apply(variables, X, CONTEXT, visibility=Visibility(mask=jnp.asarray(visible)), mutable=["attention"]),
    )


def test_the_fused_kernel_refuses_what_it_cannot_do():
    layer = MultiHeadAttention(4, dropout=0.5, implementation="cudnn")
    with pytest.raises(ValueError, match="implementation = 'cudnn': attention dropout"):
        layer.init({"params": KEY, "dropout": KEY}, X, deterministic=False)
