"""Attention of models that know nothing of this package, against NumPy in float64, and the report of such a training."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from sigmarep.core.entropy import entropy_lower_bound
from sigmarep.diagnostics import report, runs
from sigmarep.nn import MultiHeadAttention, layers, observe, reparametrize, trees
from sigmarep.recorder import Recorder

KEY = jax.random.key(0)
WIDTH, HEADS, TOKENS = 8, 2, 5
X = jax.random.normal(jax.random.key(1), (3, TOKENS, WIDTH))
# The last token of the second sequence, and the last two of the third, are padding.
LENGTHS = np.array([5, 4, 3])
MASK = nn.make_attention_mask(np.arange(TOKENS) < LENGTHS[:, None], np.arange(TOKENS) < LENGTHS[:, None])


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, mask=None):
        x = x + nn.MultiHeadDotProductAttention(num_heads=HEADS, name="attention")(nn.LayerNorm()(x), mask=mask)
        return x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(16)(nn.LayerNorm()(x))))


class Encoder(nn.Module):
    """Flax's parts alone."""

    depth: int = 1

    @nn.compact
    def __call__(self, x, mask=None):
        for i in range(self.depth):
            x = Block(name=f"block_{i}")(x, mask)
        return nn.Dense(3, name="head")(nn.LayerNorm()(x))


def reference(params, x, mask, scale=None):
    """Entropy, largest logit, qk-norm and bound of every head, in float64, of attention from x to itself."""
    x, params = np.asarray(x, np.float64), jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    query, key = (np.einsum("btd,dnh->btnh", x, params[n]["kernel"]) + params[n]["bias"] for n in ("query", "key"))
    return of_heads(query, key, mask) | {
        "qk_norm": [
            np.linalg.norm(params["query"]["kernel"][:, n] @ params["key"]["kernel"][:, n].T, 2) for n in range(HEADS)
        ]
    }


def of_heads(query, key, mask, scale=None):
    query, key = (np.asarray(each, np.float64) for each in (query, key))
    logits = np.einsum("btnh,bsnh->bnts", query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
    seen = np.broadcast_to(np.asarray(mask) != 0, logits.shape)
    exponentials = np.where(seen, np.exp(logits - logits.max(-1, keepdims=True)), 0)
    weights = exponentials / np.maximum(exponentials.sum(-1, keepdims=True), 1e-300)
    entropies = -np.sum(np.where(weights > 0, weights * np.log(np.where(weights > 0, weights, 1)), 0), -1)
    counted = seen.any(-1)
    return {
        "entropy": [entropies[:, n][counted[:, n]].mean() for n in range(query.shape[2])],
        "max_logit": [logits[:, n][seen[:, n]].max() for n in range(query.shape[2])],
    }


def inputs_of_attention(params, x):
    """The input of the first block's attention."""
    x = np.asarray(x, np.float64)
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return normed * params["LayerNorm_0"]["scale"] + params["LayerNorm_0"]["bias"]


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    """Somebody's own loop with four lines of the recorder; the parameters at every write."""
    model = Encoder()
    params = jax.jit(model.init)(KEY, X, MASK)
    tx = optax.adam(1e-2)

    @jax.jit
    def train_step(params, opt_state):
        def loss(params):
            return jnp.mean((model.apply(params, X, MASK) - jnp.sin(X[..., :3])) ** 2)

        value, gradients = jax.value_and_grad(loss)(params)
        updates, opt_state = tx.update(gradients, opt_state)
        return optax.apply_updates(params, updates), opt_state, value

    folder = str(tmp_path_factory.mktemp("run") / "theirs")
    recorder, written, opt_state = Recorder(folder, model.apply, total_steps=20), {}, tx.init(params)
    for step in range(1, 21):
        params, opt_state, loss = train_step(params, opt_state)
        if step % 5 == 0:
            recorder.write(step, {"train/loss": loss}, params, X, MASK)
            written[step] = params
    return folder, written


def test_the_report_explains_a_training_that_this_trainer_never_saw(training, tmp_path):
    folder, written = training
    (place,) = runs.find([folder]).places
    run = runs.read(place)
    assert run.state == "done"
    assert [row["step"] for row in run.rows] == list(written)
    for row, params in zip(run.rows, written.values(), strict=True):
        inside = jax.device_get(params["params"]["block_0"])
        expected = reference(inside["attention"], inputs_of_attention(inside, X), MASK)
        assert row["attention/entropy/block_0/attention"] == pytest.approx(np.mean(expected["entropy"]), rel=1e-5)
        for head, value in enumerate(expected["entropy"]):
            assert row[f"attention/entropy_head/block_0/attention/{head}"] == pytest.approx(value, rel=1e-5)
        assert row["attention/max_logit/block_0/attention"] == pytest.approx(max(expected["max_logit"]), rel=1e-4)
        assert row["attention/qk_norm/block_0/attention"] == pytest.approx(max(expected["qk_norm"]), rel=1e-4)
        assert 0 < row["attention/bound/block_0/attention"] < row["attention/entropy/block_0/attention"]
        assert row["attention/entropy_min"] == row["attention/entropy/block_0/attention"]
        kernel = np.asarray(inside["attention"]["out"]["kernel"], np.float64)
        sigma = np.linalg.norm(kernel.reshape(WIDTH, WIDTH), 2)
        assert row["spectral/sigma/block_0/attention/out"] == pytest.approx(sigma, rel=0.03)
    page = str(tmp_path / "report.html")
    report.write([folder], page, most=1)
    with open(page) as file:
        text = file.read()
    assert "Done after 20 steps" in text
    assert "attention entropy fell below" in text
    assert "block_0/attention" in text


def test_a_training_that_goes_on_drops_the_rows_that_it_writes_again(training, tmp_path):
    recorder = Recorder(str(tmp_path))
    for step in (1, 2, 3):
        recorder.write(step, {"train/loss": math.nan if step == 2 else step})
    Recorder(str(tmp_path)).write(3, {"train/loss": 7.0})
    rows = runs.read(runs.find([str(tmp_path)]).places[0]).rows
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert math.isnan(rows[1]["train/loss"])
    assert rows[2]["train/loss"] == 7.0


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.MultiHeadDotProductAttention(num_heads=HEADS, name="attention")(x), None


def stacked_layers():
    options = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
    return nn.scan(nn.remat(Layer), length=2, **options)(name="layers")


def test_scans_remat_vmap_and_derivatives_give_the_statistics_of_every_layer():
    model = stacked_layers()
    variables = jax.jit(model.init)(KEY, X, None)
    x, expected = X, []
    for i in range(2):
        params = jax.tree.map(lambda leaf, i=i: leaf[i], variables["params"])
        expected.append(reference(params["attention"], x, np.ones((TOKENS, TOKENS))))
        x = Layer().apply({"params": params}, x)[0]

    def output(variables, x):
        return model.apply(variables, x, None)[0]

    def loss(variables):
        return jnp.sum(output(variables, X) ** 2)

    @jax.jit
    def run(variables):
        each = jax.vmap(lambda x: output(variables, x[None]))
        return observe(output)(variables, X), observe(jax.grad(loss))(variables), observe(each)(X)

    (y, statistics), (gradients, within_gradient), (_, per_example) = run(variables)
    np.testing.assert_allclose(y, x, rtol=1e-5, atol=1e-5)
    assert jax.tree.structure(gradients) == jax.tree.structure(variables)
    assert list(statistics) == ["attention"]
    for i in range(2):
        for field, heads in expected[i].items():
            np.testing.assert_allclose(statistics["attention"][field][i], heads, rtol=1e-4)
            np.testing.assert_allclose(within_gradient["attention"][field][i], heads, rtol=1e-4)
    assert per_example["attention"]["entropy"].shape == (2, 3, HEADS)
    np.testing.assert_allclose(
        per_example["attention"]["entropy"].mean(1), statistics["attention"]["entropy"], rtol=1e-4
    )


@pytest.mark.parametrize("case", ["grouped, causal", "window and lengths", "bias and scale", "no batch"])
def test_any_function_that_calls_jaxs_attention_is_seen(case):
    query, key, value = jax.random.normal(KEY, (3, 2, 6, 4, 3))
    options, mask, scale = {}, np.ones((6, 6)), None
    if case == "grouped, causal":
        key, value, options, mask = key[:, :, :2], value[:, :, :2], {"is_causal": True}, np.tril(mask)
    elif case == "window and lengths":
        lengths = jnp.array([6, 4])
        options = {"local_window_size": 1, "key_value_seq_lengths": lengths, "query_seq_lengths": lengths}
        near = abs(np.subtract.outer(np.arange(6), np.arange(6))) <= 1
        real = np.arange(6) < np.asarray(lengths)[:, None]
        mask = (near & real[:, None, :] & real[:, :, None])[:, None]
    elif case == "bias and scale":
        scale, options = 0.9, {"scale": 0.9, "bias": jnp.where(jnp.tri(6, dtype=bool), 0.0, -jnp.inf)[None, None]}
        mask = np.tril(mask)
    else:
        query, key, value = query[0], key[0], value[0]

    def function(query, key, value):
        return jax.nn.dot_product_attention(query, key, value, **options)

    attended, statistics = jax.jit(observe(jax.jit(function)))(query, key, value)
    np.testing.assert_allclose(attended, jax.jit(function)(query, key, value), rtol=1e-5, atol=1e-6)
    repeated = np.repeat(key, query.shape[-2] // key.shape[-2], axis=-2)
    expected = of_heads(*(np.reshape(each, (-1, *each.shape[-3:])) for each in (query, repeated)), mask, scale)
    for name, values in expected.items():
        np.testing.assert_allclose(statistics["attention_0"][name], values, rtol=1e-5)
    if "bias" not in case:
        norms = [
            np.linalg.norm(np.asarray(each, np.float64).reshape(-1, 6, 4, 3)[0, :, 0], 2) for each in (query, repeated)
        ]
        assert statistics["attention_0"]["bound"].shape == (4,)
        assert np.all(statistics["attention_0"]["bound"] <= statistics["attention_0"]["entropy"] + 1e-6)
        if case == "no batch":
            bound = entropy_lower_bound(norms[0] * norms[1] * 3**-0.5, 6)
            np.testing.assert_allclose(statistics["attention_0"]["bound"][0], bound, rtol=1e-3)
    assert jax.nn.dot_product_attention.__module__.startswith("jax")


def test_nnx_is_seen_by_the_paths_of_its_modules():
    class Pair(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
            self.second = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, normalize_qk=True, rngs=rngs)

        def __call__(self, x):
            return self.second(self.first(x))

    model = Pair(nnx.Rngs(0))
    y, statistics = jax.jit(observe(lambda model, x: model(x)))(model, X)
    np.testing.assert_allclose(y, model(X), rtol=1e-5, atol=1e-6)
    assert set(statistics) == {"first", "second"}
    params = {
        n: {"kernel": getattr(model.first, n).kernel[...], "bias": getattr(model.first, n).bias[...]}
        for n in ("query", "key")
    }
    for name, values in reference(params, X, np.ones((TOKENS, TOKENS))).items():
        np.testing.assert_allclose(statistics["first"][name], values, rtol=1e-4)
    assert model.first.attention_fn is nnx.dot_product_attention


def test_models_of_this_package_and_converted_ones_are_seen(tmp_path):
    class Own(nn.Module):
        @nn.compact
        def __call__(self, x):
            return MultiHeadAttention(HEADS, name="attention")(x)

    variables = jax.jit(Own().init)(KEY, X)
    _, statistics = jax.jit(observe(Own().apply))(variables, X)
    _, recorded = Own().apply(variables, X, mutable=["attention"])
    for name in ("entropy", "max_logit", "qk_norm"):
        np.testing.assert_allclose(statistics["attention"][name], recorded["attention"]["attention"][name], rtol=1e-4)

    model = reparametrize(stacked_layers(), X, None)
    variables = jax.jit(model.init)(KEY, X, None)
    row = Recorder(str(tmp_path), model.apply).write(1, {}, variables, X, None)
    kernels = variables["params"]["attention"]["out"]["kernel"].reshape(2, WIDTH, WIDTH)
    for i, norm in enumerate(np.linalg.norm(kernels, 2, axis=(1, 2))):
        assert row[f"spectral/norm/attention_{i}/out"] == pytest.approx(norm, rel=1e-4)


def test_trees_of_other_frameworks_have_their_spectra_written(tmp_path):
    weights = [{"w": jax.random.normal(KEY, (4, 6))}, (jax.random.normal(KEY, (3, 5)),)]
    rules = [("0/w", layers.Axes(inputs=(1,), outputs=(0,)))]
    recorder = Recorder(str(tmp_path), lambda weights: weights[0]["w"].sum(), layers=trees.matrices(weights, rules))
    row = recorder.write(3, {"train/loss": 1.0}, weights)
    for name, matrix in (("0", weights[0]["w"]), ("1", weights[1][0])):
        values = np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)
        assert row[f"spectral/sigma/{name}"] == pytest.approx(values[0], rel=1e-4)
        assert row[f"spectral/stable_rank/{name}"] == pytest.approx((values**2).sum() / values[0] ** 2, rel=1e-3)
