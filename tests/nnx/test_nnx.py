"""NNX's layers and models under σReparam."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from sigmarep import nn
from sigmarep.nn import trees
from sigmarep.nnx import (
    SigmaConv,
    SigmaEmbed,
    SigmaLinear,
    SigmaLinearGeneral,
    Spectral,
    as_variables,
    fold,
    layers,
    reparametrize,
)

KEY = jax.random.key(0)
SEQUENCES = jax.random.normal(KEY, (2, 5, 6))
TOKENS = jnp.arange(12).reshape(2, 6) % 7
PICTURES = jax.random.normal(KEY, (2, 8, 8, 4))


class Encoder(nnx.Module):
    """The embedding makes the logits too; one layer is shared by two places."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(7, 8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.shared = self.again = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        x = x + self.attention(self.norm(x))
        return self.embed.attend(self.again(nnx.gelu(self.shared(x))))


class Convolutions(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Conv(4, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.second = nnx.Conv(8, 6, (3, 3), strides=2, feature_group_count=2, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.relu(self.norm(self.first(x))))


class Scanned(nnx.Module):
    """Three blocks, stacked by `vmap` and called by `scan`."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def make(rngs):
            return nnx.Linear(6, 6, rngs=rngs)

        self.blocks = make(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def apply(x, block):
            return x + nnx.relu(block(x))

        return apply(x, self.blocks)


def recurrent(rngs):
    return nnx.RNN(nnx.OptimizedLSTMCell(6, 4, rngs=rngs))


def mamba(rngs):
    package = pytest.importorskip("mamba2_jax")
    config = package.Mamba2Config(
        vocab_size=7, hidden_size=16, state_size=4, head_dim=8, chunk_size=8, num_hidden_layers=1
    )
    return Logits(package.Mamba2ForCausalLM(config, rngs=rngs))


class Logits(nnx.Module):
    def __init__(self, model):
        self.model = model

    def __call__(self, tokens):
        return self.model(tokens)["logits"]


MODELS = {
    "encoder": (Encoder, TOKENS, 1),
    "convolutions": (Convolutions, PICTURES, 1),
    "scanned": (Scanned, SEQUENCES, 1),
    # Its recurrent kernels begin orthogonal, with four singular values of one.
    "recurrent": (recurrent, SEQUENCES, 4),
    "mamba2-jax": (mamba, TOKENS, 1),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_the_function_that_it_was_and_trains_to_foldable_weights(name):
    make, x, vectors = MODELS[name]
    model, plain = make(nnx.Rngs(0)), make(nnx.Rngs(0))
    for each in (model, plain):
        each.eval()
    evaluate = jax.jit(lambda model, x: model(x))
    before = evaluate(plain, x)
    # That package reads the table of its embedding, for the logits, and the kernel of its convolution past their layers.
    mamba = name == "mamba2-jax"
    table = reparametrize(model, embeddings=not mamba, exclude=["conv"] if mamba else [], power_vectors=vectors)
    assert {path for path, reason in table.items() if reason != "sigma"} == {
        path for path in table if mamba and ("conv" in path or "embed" in path)
    }
    model.eval()
    np.testing.assert_allclose(evaluate(model, x), before, rtol=1e-5, atol=1e-5)

    target = jnp.sin(jnp.arange(before.size, dtype=jnp.float32)).reshape(before.shape)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.02))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def update(model, optimizer):
        value, gradients = nnx.value_and_grad(lambda model: jnp.mean((model(x) - target) ** 2))(model)
        optimizer.update(model, gradients)
        return value

    model.train()
    losses = [float(update(model, optimizer)) for _ in range(50)]
    assert losses[-1] < losses[0]

    model.eval()
    expected = evaluate(model, x)
    np.testing.assert_array_equal(evaluate(model, x), expected)
    params, state = as_variables(model)
    described = layers(model)
    assert nn.check({"params": params, "spectral": state}, layers=described) == []
    fold(model)
    assert jax.tree.structure(nnx.state(model, nnx.Param)) == jax.tree.structure(nnx.state(plain, nnx.Param))
    assert not jax.tree.leaves(nnx.state(model, Spectral))
    np.testing.assert_allclose(evaluate(model, x), expected, rtol=1e-5, atol=1e-5)
    folded, _ = as_variables(model)
    for path, layer in described.items():
        if table[layer.module] != "sigma":
            continue
        gamma = leaf(params, f"{layer.module}/gamma")
        norm = np.linalg.norm(layer.matrices(leaf(folded, path)), 2, axis=(-2, -1))
        np.testing.assert_allclose(norm, np.abs(gamma), rtol=1e-3)


def leaf(tree, path):
    for name in path.split("/"):
        tree = tree[name]
    return tree


@pytest.mark.parametrize(
    ("ours", "linen", "arguments", "x"),
    [
        (lambda **o: SigmaLinear(6, 3, **o), nn.SigmaDense(3), (), SEQUENCES),
        (lambda **o: SigmaLinearGeneral(6, (2, 3), **o), nn.SigmaDenseGeneral((2, 3)), (), SEQUENCES),
        (lambda **o: SigmaConv(4, 5, (3, 3), **o), nn.SigmaConv(5, (3, 3)), (), PICTURES),
        (lambda **o: SigmaEmbed(7, 8, **o), nn.SigmaEmbed(7, 8), (), TOKENS),
    ],
)
def test_a_layer_computes_what_linens_does_and_stores_the_same_step(ours, linen, arguments, x):
    layer = ours(rngs=nnx.Rngs(0))
    params, state = as_variables(layer)
    name = layer.matrix_name
    moved = params | {name: params[name] + 0.1 * jax.random.normal(KEY, params[name].shape)}
    getattr(layer, name)[...] = moved[name]
    expected, updates = linen.apply({"params": moved, "spectral": state}, x, mutable=["spectral"])
    layer.eval()
    np.testing.assert_allclose(layer(x), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(layer.u[...], state["u"])
    layer.train()
    np.testing.assert_allclose(layer(x), expected, rtol=1e-5, atol=1e-6)
    for name, value in updates["spectral"].items():
        np.testing.assert_allclose(as_variables(layer)[1][name], value, rtol=1e-5, atol=1e-6)


def test_what_stays_plain_is_named_and_wrong_words_are_refused():
    class Own(nnx.Linear):
        pass

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.embed, self.own = nnx.Embed(7, 8, rngs=rngs), Own(8, 8, rngs=rngs)
            self.each = nnx.LinearGeneral(8, 4, batch_axis={0: 2}, rngs=rngs)
            self.first, self.head = nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)

    table = reparametrize(Net(nnx.Rngs(0)), exclude=["head"])
    assert table["first"] == "sigma"
    assert table["head"] == "excluded"
    assert table["embed"] == "a table of embeddings"
    assert table["own"].startswith("Own is none of")
    assert table["each"].startswith("independent matrices")
    with pytest.raises(ValueError, match=r"no layer of Net is left .*first: not included"):
        reparametrize(Net(nnx.Rngs(0)), include=["nothing"])
    for wrong, message in (
        ({"reparam": "sgima"}, "reparam = 'sgima': expected sigma or spectral"),
        ({"gamma_init": "two"}, "gamma_init = 'two': expected 'one', 'sigma' or a number"),
        ({"power_vectors": 0}, "power_vectors = 0: expected at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            SigmaLinear(3, 3, rngs=nnx.Rngs(0), **wrong)
    assert SigmaLinear(3, 3, reparam="spectral", rngs=nnx.Rngs(0)).gamma is None


def test_the_pair_of_functions_takes_an_nnx_model_with_one_step_for_a_shared_layer():
    model = Encoder(nnx.Rngs(0))
    graph, params, others = nnx.split(model, nnx.Param, ...)
    chosen = layers(model)
    weights, state = trees.init(as_variables(model)[0], chosen)

    @jax.jit
    def loss(weights, state):
        effective, state = trees.apply(weights, state, chosen)
        merged = nnx.merge(graph, nnx.State(jax.tree.map(jnp.asarray, effective)), others)
        return jnp.sum(merged(TOKENS)), state

    del params
    np.testing.assert_allclose(loss(weights, state)[0], jnp.sum(model(TOKENS)), rtol=1e-4)
    gradients = jax.grad(loss, has_aux=True)(weights, state)[0]
    assert all(np.any(each != 0) for each in gradients.gamma.values())
