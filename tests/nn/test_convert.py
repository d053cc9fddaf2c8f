"""Linen models that know nothing of σReparam, under it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sigmarep.nn import layers, reparametrize, trees

KEY = jax.random.key(0)
TOKENS = jnp.arange(12).reshape(2, 6) % 7
PICTURES = jax.random.normal(KEY, (2, 8, 8, 4))
SEQUENCES = jax.random.normal(KEY, (2, 5, 6))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x))
        return x + nn.Dense(8)(nn.gelu(nn.Dense(16)(nn.LayerNorm()(x)))), None


class TiedLanguageModel(nn.Module):
    """Scanned and rematerialized blocks; the table of embeddings makes the logits too."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(7, 8)
        stack = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = stack()(embed(tokens), None)
        return embed.attend(nn.LayerNorm()(x))


class Convolutions(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3))(x))
        x = nn.relu(nn.Conv(8, (3, 3), strides=2, feature_group_count=2)(x))
        x = nn.ConvTranspose(4, (2, 2), strides=(2, 2), transpose_kernel=True)(nn.GroupNorm(2)(x))
        return nn.Einsum((4, 3), "bhwc,cd->bd")(x)


class Translator(nn.Module):
    """Encoder and decoder, with cross-attention; one dense layer is shared by both."""

    @nn.compact
    def __call__(self, source, target):
        shared = nn.Dense(8)
        memory = nn.SelfAttention(num_heads=2)(shared(source))
        x = nn.MultiHeadDotProductAttention(num_heads=2)(shared(target), memory)
        return nn.DenseGeneral((2, 3))(x)


def ensemble():
    return nn.vmap(
        nn.Dense, variable_axes={"params": 1}, split_rngs={"params": True}, in_axes=None, out_axes=0, axis_size=3
    )(5)


MODELS = {
    "scanned, rematerialized, tied": (TiedLanguageModel(), (TOKENS,)),
    "convolutions": (Convolutions(), (PICTURES,)),
    "LSTM": (nn.RNN(nn.OptimizedLSTMCell(8)), (SEQUENCES,)),
    "encoder and decoder": (Translator(), (SEQUENCES, SEQUENCES[:, :3])),
    "ensemble": (ensemble(), (SEQUENCES,)),
}


@pytest.fixture(params=MODELS)
def case(request):
    return MODELS[request.param]


def test_the_model_is_the_function_that_it_was_and_trains_to_foldable_weights(case):
    module, inputs = case
    # Fewer would lag behind the recurrent kernels, which begin orthogonal: their eight singular values are all one.
    vectors = 8 if isinstance(module, nn.RNN) else 1
    model = reparametrize(module, *inputs, embeddings=True, power_vectors=vectors)
    plain = jax.jit(module.init)(KEY, *inputs)
    variables = jax.jit(model.convert)(plain)
    before = jax.jit(module.apply)(plain, *inputs)
    evaluated = jax.jit(model.apply)
    np.testing.assert_allclose(evaluated(variables, *inputs), before, rtol=1e-5, atol=1e-5)

    target = jnp.sin(jnp.arange(before.size, dtype=jnp.float32)).reshape(before.shape)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.02))

    @jax.jit
    def step(params, state, moments):
        def loss(params):
            y, updates = model.apply({"params": params, "spectral": state}, *inputs, mutable=["spectral"])
            return jnp.mean((y - target) ** 2), updates["spectral"]

        (value, state), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        updates, moments = optimizer.update(gradients, moments, params)
        return optax.apply_updates(params, updates), state, moments, value

    params, state = variables["params"], variables["spectral"]
    moments = optimizer.init(params)
    losses = []
    for _ in range(50):
        params, state, moments, value = step(params, state, moments)
        losses.append(float(value))
    assert losses[-1] < losses[0]

    trained = {"params": params, "spectral": state}
    folded = jax.jit(model.fold)(trained)
    assert jax.tree.structure(folded) == jax.tree.structure(plain)
    np.testing.assert_allclose(
        evaluated(trained, *inputs), jax.jit(module.apply)(folded, *inputs), rtol=1e-5, atol=1e-6
    )
    for path, layer in model.chosen.items():
        kernel = layer.matrices(leaf(folded["params"], path))
        gamma = leaf(params, "/".join((*path.split("/")[:-1], "gamma")))
        np.testing.assert_allclose(np.linalg.norm(kernel, 2, axis=(-2, -1)), np.abs(gamma), rtol=1e-3)


def leaf(tree, path):
    for each in path.split("/"):
        tree = tree[each]
    return tree


def test_a_training_apply_stores_one_power_step_and_an_evaluation_none():
    model = reparametrize(Translator(), SEQUENCES, SEQUENCES)
    variables = model.init(KEY, SEQUENCES, SEQUENCES)
    params = jax.tree.map(lambda x: x + 0.1, variables["params"])
    variables = {**variables, "params": params}
    y, updates = model.apply(variables, SEQUENCES, SEQUENCES, mutable=["spectral"])
    np.testing.assert_array_equal(model.apply(variables, SEQUENCES, SEQUENCES), y)
    kernel = np.asarray(params["Dense_0"]["kernel"], np.float64)
    v = kernel @ np.asarray(variables["spectral"]["Dense_0"]["u"], np.float64)
    z = kernel.T @ (v / np.linalg.norm(v))
    np.testing.assert_allclose(updates["spectral"]["Dense_0"]["sigma"], np.linalg.norm(z), rtol=1e-5)
    np.testing.assert_allclose(updates["spectral"]["Dense_0"]["u"], z / np.linalg.norm(z), rtol=1e-5, atol=1e-6)


def test_other_collections_and_random_numbers_go_through():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x))
            return nn.Dropout(0.5, deterministic=not train)(x)

    model = reparametrize(Net(), SEQUENCES, train=False)
    variables = model.init(KEY, SEQUENCES, train=False)
    assert set(variables) == {"params", "batch_stats", "spectral"}
    plain = {"params": model.fold(variables)["params"], "batch_stats": variables["batch_stats"]}
    options = {"train": True, "rngs": {"dropout": KEY}}
    y, updates = model.apply(variables, SEQUENCES, mutable=["batch_stats", "spectral"], **options)
    expected, others = Net().apply(plain, SEQUENCES, mutable=["batch_stats"], **options)
    np.testing.assert_allclose(y, expected, rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, updates["batch_stats"], others["batch_stats"])
    assert set(updates) == {"batch_stats", "spectral"}
    y, updates = model.apply(variables, SEQUENCES, mutable=True, **options)
    assert "batch_stats" in updates
    assert "spectral" in updates


def test_what_stays_plain_is_named_with_its_reason():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            x = nn.Embed(7, 8, name="words")(tokens)
            x = nn.Dense(8, name="first")(nn.LayerNorm(name="norm")(x))
            x = nn.DenseGeneral(4, batch_dims=(0,), axis=-1, name="each")(x)
            return nn.Dense(3, name="head")(x) + self.param("free", nn.initializers.zeros, (1, 3, 3))[0, 0]

    model = reparametrize(Net(), TOKENS, exclude=["head"])
    lines = {line.split()[0]: line for line in model.table().splitlines()}
    assert lines["first/kernel"].endswith("sigma")
    assert lines["head/kernel"].endswith("plain: excluded")
    assert lines["words/embedding"].endswith("plain: a table of embeddings")
    assert "independent matrices" in lines["each/kernel"]
    assert "no layer says" in lines["free"]
    assert lines["first/bias"].endswith("plain")
    assert set(reparametrize(Net(), TOKENS, include=["head", "words"]).chosen) == {"words/embedding", "head/kernel"}
    for wrong, message in (
        ({"include": ["nothing"]}, "is left to reparametrize"),
        ({"exclude": ["nothing"]}, "'nothing' finds none of"),
        ({"norms": "none"}, "norms = 'none': expected keep or remove"),
    ):
        with pytest.raises(ValueError, match=message):
            reparametrize(Net(), TOKENS, **wrong)


def test_norms_are_removed_by_a_word():
    model = reparametrize(TiedLanguageModel(), TOKENS, norms="remove")
    variables = jax.jit(model.init)(KEY, TOKENS)
    assert not any("LayerNorm" in line for line in model.table().splitlines())

    class Bare(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            class Block(nn.Module):
                @nn.compact
                def __call__(self, x, _=None):
                    x = x + nn.MultiHeadDotProductAttention(num_heads=2)(x)
                    return x + nn.Dense(8)(nn.gelu(nn.Dense(16)(x))), None

            embed = nn.Embed(7, 8)
            stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            x, _ = stack(name="ScanCheckpointBlock_0")(embed(tokens), None)
            return embed.attend(x)

    expected = Bare().apply({"params": model.fold(variables)["params"]}, TOKENS)
    np.testing.assert_allclose(model.apply(variables, TOKENS), expected, rtol=1e-5, atol=1e-6)


def test_gamma_may_begin_at_one_and_missing_variables_are_named():
    model = reparametrize(Translator(), SEQUENCES, SEQUENCES, gamma_init=1.0, power_vectors=2)
    variables = jax.jit(model.init)(KEY, SEQUENCES, SEQUENCES)
    folded = model.fold(variables)["params"]
    assert np.linalg.norm(folded["Dense_0"]["kernel"], 2) == pytest.approx(1, rel=1e-5)
    assert variables["spectral"]["Dense_0"]["basis"].shape == (1, 8)
    with pytest.raises(ValueError, match="have no collection 'spectral'"):
        model.apply({"params": variables["params"]}, SEQUENCES, SEQUENCES)
    plain = Translator().init(KEY, SEQUENCES, SEQUENCES)
    with pytest.raises(ValueError, match=r"params/.*/gamma is missing"):
        model.apply({**plain, "spectral": variables["spectral"]}, SEQUENCES, SEQUENCES)


def test_plain_trees_of_any_framework_take_the_pair():
    """A tree of lists and tuples whose matrices have their outputs first, and a stack of two."""
    rng = np.random.default_rng(0)
    weights = {"dense": [(jnp.asarray(rng.normal(size=(5, 4)), jnp.float32), jnp.zeros(5))]}
    weights["stack"] = jnp.asarray(rng.normal(size=(2, 3, 4)), jnp.float32)
    rules = [("dense", layers.Axes(inputs=(1,), outputs=(0,))), ("stack", layers.Axes(inputs=(1,), outputs=(2,)))]
    chosen = trees.matrices({"dense": [(weights["dense"][0][0],)], "stack": weights["stack"]}, rules)
    assert set(chosen) == {"dense/0/0", "stack"}
    params, state = trees.init(weights, chosen)
    effective, state = trees.apply(params, state, chosen)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), effective, weights)
    assert state["dense/0/0"]["u"].shape == (5,)
    assert state["stack"]["u"].shape == (2, 4)
    doubled = params._replace(gamma=jax.tree.map(lambda x: 2 * x, params.gamma))
    effective, _ = jax.jit(lambda p, s: trees.apply(p, s, chosen))(doubled, state)
    np.testing.assert_allclose(effective["stack"], 2 * weights["stack"], rtol=1e-4)
    np.testing.assert_array_equal(effective["dense"][0][1], weights["dense"][0][1])


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (layers.Axes(inputs=(0,), outputs=(3,)), "do not fit"),
        (layers.Axes(inputs=(), outputs=(1,)), "do not fit"),
    ],
)
def test_rules_that_do_not_fit_are_refused(axes, message):
    with pytest.raises(ValueError, match=message):
        trees.matrices({"w": jnp.zeros((3, 4))}, [("w", axes)])


def test_layers_that_the_tree_lacks_are_refused():
    chosen = trees.matrices({"w": jnp.zeros((3, 4))})
    with pytest.raises(ValueError, match="'w' is not among the weights"):
        trees.init({"other": jnp.zeros((3, 4))}, chosen)
    with pytest.raises(ValueError, match="gamma_init = 'one'"):
        trees.init({"w": jnp.zeros((3, 4))}, chosen, gamma_init="one")
