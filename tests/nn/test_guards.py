"""Mistakes with σReparam are named, by errors or by `check`, and derivatives go forward too."""

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sigmarep.core import spectral
from sigmarep.nn import (
    MultiHeadAttention,
    SigmaDense,
    SigmaDenseGeneral,
    check,
    decay_mask,
    fold,
    reparametrize,
    trees,
)

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (5, 6))


@pytest.mark.parametrize("transform", ["scan", "vmap"])
def test_a_transformation_that_does_not_carry_the_spectral_collection_is_named_with_its_remedy(transform):
    def stack(**axes):
        options = {"variable_axes": {"params": 0, **axes}, "split_rngs": {"params": True}}
        if transform == "vmap":
            return nn.vmap(SigmaDense, in_axes=None, axis_size=2, **options)(6)

        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return SigmaDense(6)(x), None

        scanned = nn.scan(Layer, length=2, **options)()
        return types.SimpleNamespace(init=lambda key, x: scanned.init(key, x, None))

    with pytest.raises(
        ValueError, match=r"'spectral' does not reach it; .* variable_axes={'params': 0, 'spectral': 0}"
    ):
        stack().init(KEY, X)
    assert set(stack(spectral=0).init(KEY, X)) == {"params", "spectral"}


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (SigmaDense(0), r"^SigmaDense: features = 0: expected at least 1"),
        (SigmaDenseGeneral((2, 0)), r"^SigmaDenseGeneral: features = \(2, 0\): expected at least 1"),
        (SigmaDenseGeneral(3, axis=5), r"axis = 5: expected axes of its input of shape \(5, 6\), -2 to 1"),
    ],
)
def test_sizes_and_axes_that_cannot_be_are_named(layer, message):
    with pytest.raises(ValueError, match=message):
        layer.init(KEY, X)


def test_folding_parameters_alone_says_what_is_expected():
    with pytest.raises(
        ValueError, match=r"^variables: expected \{'params': …, 'spectral': …\}, got bias, gamma, kernel$"
    ):
        fold(dict(sorted(SigmaDense(3).init(KEY, X)["params"].items())))


@pytest.mark.parametrize("spec", [("x",), (None, "y"), ("x", "y")])
def test_a_block_of_vectors_works_on_a_mesh_of_explicit_axes(spec):
    kernel = jax.random.normal(KEY, (16, 12))
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)

    @jax.jit
    def run(kernel):
        vectors = jnp.eye(12)[:3]
        return spectral.reparametrize(kernel, jnp.float32(2.0), vectors[0], basis=vectors[1:])

    expected = run(kernel)
    with jax.set_mesh(mesh):
        result = run(jax.device_put(kernel, NamedSharding(mesh, PartitionSpec(*spec))))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), result, expected)


@pytest.fixture(scope="module")
def trained():
    """Variables of two layers, and of them with kernels that the power iteration did not see."""
    model = nn.Sequential([SigmaDense(8), nn.relu, SigmaDense(4)])
    variables = model.init(KEY, X)
    moved = jax.tree.map(lambda x: x + jax.random.normal(KEY, x.shape) * (x.ndim > 1), variables["params"])
    return variables, {"params": moved, "spectral": variables["spectral"]}


def test_a_sound_training_has_nothing_to_say(trained):
    variables, _ = trained
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, weight_decay=0.1, mask=decay_mask))
    state = types.SimpleNamespace(params=variables["params"], spectral=variables["spectral"], tx=tx)
    ema = jax.tree.map(lambda x: 0.99 * x, variables["params"])
    assert check(state, ema=ema, checkpoint=variables) == []
    assert decay_mask(variables["params"])["layers_0"] == {"kernel": True, "bias": False, "gamma": False}


def test_a_stale_sigma_is_found_with_the_number_that_an_evaluation_divides_by(trained):
    _, stale = trained
    (sentence,) = check(stale)
    norm = max(
        np.linalg.norm(fold(stale)[name]["kernel"], 2) / stale["params"][name]["gamma"] for name in stale["params"]
    )
    assert "mutable=['spectral']" in sentence
    assert f"effective norm is {norm:.3g} |γ|" in sentence
    # Power steps catch up.
    model = nn.Sequential([SigmaDense(8), nn.relu, SigmaDense(4)])
    for _ in range(30):
        stale = {**stale, **model.apply(stale, X, mutable=["spectral"])[1]}
    assert check(stale) == []


def test_weight_decay_of_gamma_is_found_before_it_has_happened(trained):
    variables, _ = trained
    warmup = optax.linear_schedule(0.0, 1e-2, 10)
    (sentence,) = check(variables, optimizer=optax.adamw(warmup, weight_decay=1e-3))
    assert "layers_0/gamma, layers_2/gamma at a gradient of zero" in sentence
    shrunk = jax.tree_util.tree_map_with_path(
        lambda path, x: x * 1e-3 if path[-1].key == "gamma" else x, variables["params"]
    )
    (sentence,) = check({**variables, "params": shrunk})
    assert "has all but vanished" in sentence


def test_missing_and_averaged_collections_are_found(trained):
    variables, moved = trained
    (sentence,) = check({"params": variables["params"]})
    assert "missing for layers_0, layers_2" in sentence
    (sentence,) = check(variables, checkpoint={"params": variables["params"]})
    assert "The checkpoint has no collection 'spectral'" in sentence
    averaged = jax.tree.map(lambda x: 0.5 * x, variables["spectral"])
    (sentence,) = check(variables, ema={"params": variables["params"], "spectral": averaged})
    assert sentence.startswith("In the averaged weights: u of layers_0/kernel, layers_2/kernel is not of length 1")
    (sentence,) = check(variables, ema=moved["params"])
    assert sentence.startswith("In the averaged weights, with the training's u: σ is stale")
    with pytest.raises(ValueError, match="state: expected variables"):
        check({"kernel": X})


def test_converted_models_and_plain_trees_are_checked_by_their_layers():
    model = reparametrize(nn.ConvTranspose(3, (2, 2), transpose_kernel=True), jnp.ones((1, 4, 4, 2)))
    variables = jax.jit(model.init)(KEY, jnp.ones((1, 4, 4, 2)))
    assert check(variables, layers=model.chosen) == []
    weights = {"w": jax.random.normal(KEY, (6, 4))}
    chosen = trees.matrices(weights)
    params, state = trees.init(weights, chosen)
    assert check({"params": params, "spectral": state}, layers=chosen, optimizer=optax.sgd(1e-2)) == []
    stale = params._replace(weights={"w": jax.random.normal(jax.random.key(5), (6, 4))})
    (sentence,) = check({"params": stale, "spectral": state}, layers=chosen)
    assert sentence.startswith("σ is stale in w")


def test_the_check_compiles_one_program_once(trained):
    from sigmarep.nn.check import _measure

    variables, moved = trained
    check(variables)
    before = _measure._cache_size()
    check(moved)
    assert _measure._cache_size() == before


@pytest.mark.parametrize("power_vectors", [1, 3])
def test_derivatives_forward_equal_those_backward(power_vectors):
    layer = SigmaDense(3, power_vectors=power_vectors)
    variables = layer.init(KEY, X)
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(KEY, x.shape), variables["params"])

    def output(params):
        return jnp.sin(layer.apply({**variables, "params": params}, X[:2]))

    direction = jax.tree.map(jnp.cos, params)

    @jax.jit
    def both(params):
        along = jax.jvp(output, (params,), (direction,))[1]
        linear = jax.linearize(output, params)[1](direction)
        return jax.jacrev(output)(params), jax.jacfwd(output)(params), along, linear

    backward, forward, along, linear = both(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), forward, backward)
    expected = sum(
        jnp.sum(a * b, axis=range(2, a.ndim)) for a, b in zip(*map(jax.tree.leaves, (backward, direction)), strict=True)
    )
    for tangent in (along, linear):
        np.testing.assert_allclose(tangent, expected, rtol=1e-4, atol=1e-5)


def test_forward_derivatives_pass_through_scans_and_checkpoints():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + MultiHeadAttention(2, reparam="sigma")(x), None

    axes = {"params": 0, "spectral": 0}
    model = nn.scan(nn.remat(Block), variable_axes=axes, split_rngs={"params": True}, length=2)()
    variables = jax.jit(model.init)(KEY, X[None], None)

    def loss(params):
        return jnp.sum(model.apply({**variables, "params": params}, X[None], None)[0] ** 2)

    direction = jax.tree.map(jnp.cos, variables["params"])
    backward = jax.jit(jax.grad(loss))(variables["params"])
    forward = jax.jit(lambda p, d: jax.jvp(loss, (p,), (d,))[1])(variables["params"], direction)
    expected = sum(jax.tree.leaves(jax.tree.map(jnp.vdot, backward, direction)))
    np.testing.assert_allclose(forward, expected, rtol=1e-4)
