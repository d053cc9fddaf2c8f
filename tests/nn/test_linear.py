"""The three layers: drop-in for Flax's, one power step an apply, whatever they are wrapped in."""

import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sigmarep.core import spectral
from sigmarep.nn import SigmaConv, SigmaDense, SigmaDenseGeneral, fold
from sigmarep.nn.layers import describe

KEY = jax.random.key(0)
VECTORS = jax.random.normal(jax.random.key(1), (5, 6))
HEADS = jax.random.normal(jax.random.key(1), (5, 2, 3))
SEQUENCE = jax.random.normal(jax.random.key(1), (2, 11, 4))
IMAGE = jax.random.normal(jax.random.key(1), (2, 9, 8, 4))

PAIRS = [
    (SigmaDense, nn.Dense, {"features": 7}, VECTORS),
    (SigmaDense, nn.Dense, {"features": 7, "use_bias": False}, VECTORS),
    (SigmaDenseGeneral, nn.DenseGeneral, {"features": (2, 3)}, VECTORS),
    (SigmaDenseGeneral, nn.DenseGeneral, {"features": 7, "axis": (-2, -1)}, HEADS),
    (SigmaConv, nn.Conv, {"features": 6, "kernel_size": (3,)}, SEQUENCE),
    (SigmaConv, nn.Conv, {"features": 6, "kernel_size": (3,), "padding": "CAUSAL"}, SEQUENCE),
    (SigmaConv, nn.Conv, {"features": 6, "kernel_size": (7,), "strides": 3, "padding": "SAME"}, SEQUENCE),
    (SigmaConv, nn.Conv, {"features": 6, "kernel_size": (3, 3), "padding": "CIRCULAR"}, IMAGE),
    (SigmaConv, nn.Conv, {"features": 6, "kernel_size": (2, 2), "strides": 2, "padding": "VALID"}, IMAGE),
    (SigmaConv, nn.Conv, {"features": 6, "kernel_size": (3, 3), "kernel_dilation": 2, "padding": 1}, IMAGE),
    (SigmaConv, nn.Conv, {"features": 6, "kernel_size": (3, 3), "feature_group_count": 2}, IMAGE),
]


@pytest.mark.parametrize(("ours", "flax", "arguments", "x"), PAIRS)
def test_without_reparametrisation_the_layer_is_flaxs(ours, flax, arguments, x):
    expected, variables = flax(**arguments).init_with_output(KEY, x)
    found, own = ours(**arguments, reparam="none").init_with_output(KEY, x)
    jax.tree.map(np.testing.assert_array_equal, own, variables)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("ours", "flax", "arguments", "x"), PAIRS)
@pytest.mark.parametrize("reparam", ["sigma", "weight"])
def test_starting_at_the_kernels_own_norm_it_is_flaxs_too(ours, flax, arguments, x, reparam):
    expected = flax(**arguments).init_with_output(KEY, x)[0]
    found = ours(**arguments, reparam=reparam, gamma_init="sigma").init_with_output(KEY, x)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("ours", "flax", "arguments", "x"), PAIRS)
def test_variables_have_fixed_names_shapes_and_types(ours, flax, arguments, x):
    layer = ours(**arguments, dtype=jnp.bfloat16)
    variables = layer.init(KEY, x)
    kernel = flax(**arguments).init(KEY, x)["params"]["kernel"]
    outputs = int(np.prod(arguments["features"]))
    assert set(variables["params"]) == {"kernel", "gamma"} | ({"bias"} if arguments.get("use_bias", True) else set())
    assert variables["params"]["kernel"].shape == kernel.shape
    assert variables["params"]["gamma"].shape == ()
    output, changed = layer.apply(variables, x, mutable=["spectral"])
    assert output.dtype == jnp.bfloat16
    for state in (variables["spectral"], changed["spectral"]):
        shapes = {name: (value.shape, value.dtype) for name, value in state.items()}
        assert shapes == {"u": ((outputs,), jnp.float32), "sigma": ((), jnp.float32)}


@pytest.mark.parametrize(("ours", "flax", "arguments", "x"), PAIRS)
def test_the_effective_norm_is_gamma_and_the_stored_sigma_exact_at_the_start(ours, flax, arguments, x):
    variables = ours(**arguments, gamma_init=1.7).init(KEY, x)
    outputs = int(np.prod(arguments["features"]))
    effective = fold(variables)["kernel"].reshape(-1, outputs)
    np.testing.assert_allclose(np.linalg.norm(effective, 2), 1.7, rtol=1e-5)
    exact = np.linalg.norm(np.asarray(variables["params"]["kernel"], np.float64).reshape(-1, outputs), 2)
    np.testing.assert_allclose(variables["spectral"]["sigma"], exact, rtol=1e-5)


@pytest.mark.parametrize(("ours", "flax", "arguments", "x"), PAIRS)
def test_wesar_starts_as_flaxs_layer_with_kernels_of_one_deviation(ours, flax, arguments, x):
    expected, plain = flax(**arguments).init_with_output(KEY, x)
    layer = ours(**arguments, reparam="scale", common_std=0.01)
    found, variables = layer.init_with_output(KEY, x)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    kernel, own = (np.asarray(each["params"]["kernel"], np.float64) for each in (variables, plain))
    np.testing.assert_allclose(np.sqrt(np.mean(kernel**2)), 0.01, rtol=1e-5)
    scale = np.sqrt(np.mean(own**2)) / 0.01
    np.testing.assert_allclose(variables["params"]["kernel_scale"], scale, rtol=1e-5)
    assert set(variables) == {"params"}
    # Ŵ = αW, and so are the gradients: α·G for W and ⟨G, W⟩ for α.
    params = variables["params"] | {"kernel_scale": jnp.float32(0.3)}
    cotangent = jax.random.normal(jax.random.key(7), found.shape)
    gradients = jax.grad(lambda p: jnp.vdot(layer.apply({"params": p}, x), cotangent))(params)
    folded = fold({"params": params})
    np.testing.assert_allclose(folded["kernel"], 0.3 * kernel, rtol=1e-5)
    g = jax.grad(lambda p: jnp.vdot(flax(**arguments).apply({"params": p}, x), cotangent))(folded)["kernel"]
    np.testing.assert_allclose(gradients["kernel"], 0.3 * np.asarray(g), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(gradients["kernel_scale"], np.sum(np.asarray(g) * kernel), rtol=1e-3, atol=1e-5)


def test_wesar_leaves_a_kernel_of_zeros_and_can_freeze_its_scale():
    layer = SigmaDense(3, reparam="scale", kernel_init=nn.initializers.zeros, gamma_trainable=False)
    params = layer.init(KEY, VECTORS)["params"]
    np.testing.assert_array_equal(params["kernel"], 0.0)
    assert float(params["kernel_scale"]) == 1.0
    params = params | {"kernel": jnp.ones_like(params["kernel"])}
    gradients = jax.grad(lambda p: jnp.sum(layer.apply({"params": p}, VECTORS)))(params)
    assert float(gradients["kernel_scale"]) == 0.0
    assert np.any(gradients["kernel"] != 0)


def test_stacked_layers_of_wesar_fold_each_by_its_own_scale():
    several = nn.vmap(SigmaDense, variable_axes={"params": -1}, split_rngs={"params": True})(4, reparam="scale")
    x = jax.random.normal(KEY, (3, 2, 5))
    described = describe(several.init, KEY, x)
    params = several.init(KEY, x)["params"]
    folded = fold({"params": params}, layers=described)
    assert params["kernel"].shape == (5, 4, 3)
    expected = params["kernel"] * params["kernel_scale"]
    np.testing.assert_allclose(folded["kernel"], expected, rtol=1e-6)


def test_spectral_normalisation_has_no_gamma_and_weight_normalisation_one_an_output():
    assert set(SigmaDense(7, reparam="spectral").init(KEY, VECTORS)["params"]) == {"kernel", "bias"}
    weight = SigmaDenseGeneral((2, 3), reparam="weight").init(KEY, VECTORS)
    assert weight["params"]["gamma"].shape == (6,)
    assert "spectral" not in weight


def test_a_frozen_gamma_receives_no_gradient():
    for trainable in (True, False):
        layer = SigmaDense(7, gamma_trainable=trainable)
        variables = layer.init(KEY, VECTORS)

        def loss(params, layer=layer, variables=variables):
            return jnp.sum(layer.apply({**variables, "params": params}, VECTORS) ** 2)

        gradient = jax.grad(loss)(variables["params"])["gamma"]
        assert (gradient != 0) == trainable


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"reparam": "sgima"}, "reparam = 'sgima': expected one of none, sigma, spectral, weight, scale"),
        ({"gamma_init": "two"}, "gamma_init = 'two': expected 'one', 'sigma' or a number"),
    ],
)
def test_unknown_words_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        SigmaDense(7, **fields).init(KEY, VECTORS)


def test_missing_spectral_variables_are_said_to_be_missing():
    layer = SigmaDense(7)
    params = layer.init(KEY, VECTORS)["params"]
    with pytest.raises(ValueError, match="no spectral variables were given"):
        layer.apply({"params": params}, VECTORS)
    # In training they are made from the kernel: plain parameters can be taken over.
    _, changed = layer.apply({"params": params}, VECTORS, mutable=["spectral"])
    assert set(changed["spectral"]) == {"u", "sigma"}


def moved(layer, x):
    """Variables whose u is not the leading singular vector any more."""
    variables = layer.init(KEY, x)
    kernel = variables["params"]["kernel"]
    kernel = kernel + 0.3 * jax.random.normal(jax.random.key(5), kernel.shape)
    return {**variables, "params": {**variables["params"], "kernel": kernel}}


LAYER = SigmaDense(7)


def one_step(variables):
    kernel = variables["params"]["kernel"]
    return spectral.power_step(kernel, variables["spectral"]["u"])


def test_training_stores_one_power_step_and_evaluation_nothing():
    variables = moved(LAYER, VECTORS)
    first = LAYER.apply(variables, VECTORS)
    np.testing.assert_array_equal(first, LAYER.apply(variables, VECTORS))
    trained, changed = LAYER.apply(variables, VECTORS, mutable=["spectral"])
    np.testing.assert_array_equal(first, trained)
    np.testing.assert_allclose(changed["spectral"]["u"], one_step(variables).u, rtol=1e-6)
    np.testing.assert_allclose(changed["spectral"]["sigma"], one_step(variables).sigma, rtol=1e-6)


class Twice(nn.Module):
    """A layer shared by two views of a batch."""

    @nn.compact
    def __call__(self, x):
        layer = SigmaDense(6, name="shared")
        return layer(x) + layer(-x)


def test_a_layer_called_twice_in_one_apply_takes_one_step():
    model = Twice()
    single = moved(SigmaDense(6), VECTORS)
    variables = {name: {"shared": single[name]} for name in single}
    _, changed = model.apply(variables, VECTORS, mutable=["spectral"])
    np.testing.assert_allclose(changed["spectral"]["shared"]["u"], one_step(single).u, rtol=1e-6)


def training_apply(variables):
    def apply(params, x):
        return LAYER.apply({**variables, "params": params}, x, mutable=["spectral"])

    return apply


def loss_of(apply):
    """Value, spectral state and gradient of a loss on `VECTORS`."""

    def loss(params):
        output, changed = apply(params, VECTORS)
        return jnp.sum(jnp.sin(output)), changed

    return jax.value_and_grad(loss, has_aux=True)


def test_every_example_of_a_vmap_makes_the_same_step():
    variables = moved(LAYER, VECTORS)
    apply = training_apply(variables)

    def mapped(params, x):
        output, changed = jax.vmap(apply, (None, 0))(params, x)
        return output, jax.tree.map(lambda a: a[2], changed)

    expected = loss_of(apply)(variables["params"])
    found = loss_of(mapped)(variables["params"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint], ids=["jit", "remat"])
def test_wrapping_changes_neither_numbers_nor_steps(wrap):
    variables = moved(LAYER, VECTORS)
    apply = training_apply(variables)
    expected = loss_of(apply)(variables["params"])
    found = loss_of(wrap(apply))(variables["params"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)


def test_microbatches_from_one_state_make_one_step_and_sum_to_the_whole_batch():
    variables = moved(LAYER, VECTORS)
    apply = training_apply(variables)

    def gradient(x):
        def loss(params):
            output, changed = apply(params, x)
            return jnp.sum(jnp.sin(output)), changed["spectral"]

        return jax.grad(loss, has_aux=True)(variables["params"])

    (first, state), (second, again), (whole, expected) = gradient(VECTORS[:2]), gradient(VECTORS[2:]), gradient(VECTORS)
    for found in (state, again):
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    jax.tree.map(lambda a, b, c: np.testing.assert_allclose(a + b, c, rtol=1e-4, atol=1e-5), first, second, whole)


def test_a_batch_over_eight_devices_gives_the_numbers_of_one():
    variables = moved(LAYER, VECTORS)
    x = jax.random.normal(KEY, (16, 6))

    @jax.jit
    def run(variables, x):
        def loss(params):
            output, changed = LAYER.apply({**variables, "params": params}, x, mutable=["spectral"])
            return jnp.mean(jnp.sin(output)), changed

        return jax.value_and_grad(loss, has_aux=True)(variables["params"])

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    replicated = jax.device_put(variables, NamedSharding(mesh, PartitionSpec()))
    found = run(replicated, jax.device_put(x, NamedSharding(mesh, PartitionSpec("data"))))
    assert len(found[0][1]["spectral"]["u"].sharding.device_set) == 8
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, run(variables, x))


@pytest.mark.parametrize("spec", [PartitionSpec("x", None), PartitionSpec(None, "x"), PartitionSpec("x", "y")])
def test_a_sharded_kernel_gives_the_unsharded_numbers(spec):
    layer, x = SigmaDense(16), jax.random.normal(KEY, (5, 8))
    variables = moved(layer, x)
    expected = layer.apply(variables, x, mutable=["spectral"])
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    kernel = jax.device_put(variables["params"]["kernel"], NamedSharding(mesh, spec))
    sharded = {**variables, "params": {**variables["params"], "kernel": kernel}}
    found = jax.jit(lambda v: layer.apply(v, x, mutable=["spectral"]))(sharded)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)


def trained(optimizer, steps):
    """Trains one layer; returns the kernels that the steps saw, their stored σ, the last variables and gradient."""
    layer = SigmaDense(24)
    x = jax.random.normal(KEY, (64, 16))
    target = jnp.tanh(x @ jax.random.normal(jax.random.key(3), (16, 24)))
    variables = layer.init(KEY, x)

    @jax.jit
    def step(carry, _):
        params, state, opt_state = carry

        def loss(params):
            output, changed = layer.apply({"params": params, "spectral": state}, x, mutable=["spectral"])
            return jnp.mean((output - target) ** 2), changed["spectral"]

        gradient, state = jax.grad(loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        carry = (optax.apply_updates(params, updates), state, opt_state)
        return carry, (params["kernel"], state["sigma"], gradient["kernel"])

    start = (variables["params"], variables["spectral"], optimizer.init(variables["params"]))
    (params, state, _), (kernels, sigmas, gradients) = jax.lax.scan(step, start, None, steps)
    return np.asarray(kernels, np.float64), sigmas, {"params": params, "spectral": state}, gradients


def exact_norms(kernels):
    return np.linalg.svd(kernels, compute_uv=False)[:, 0]


def test_sgd_never_leaves_the_power_iteration_behind():
    kernels, sigmas, variables, gradients = trained(optax.sgd(0.1), 200)
    np.testing.assert_allclose(sigmas, exact_norms(kernels), rtol=1e-5)
    np.testing.assert_allclose(
        np.linalg.norm(fold(variables)["kernel"], 2), abs(variables["params"]["gamma"]), rtol=1e-5
    )
    cosines = np.sum(kernels * gradients, (1, 2)) / (
        np.linalg.norm(kernels, axis=(1, 2)) * np.linalg.norm(gradients, axis=(1, 2))
    )
    assert np.abs(cosines).max() < 1e-5


def test_adam_may_outrun_it_but_sigma_stays_below_the_svds_and_catches_up():
    # Fast updates let a second singular value overtake the one that u follows; one step an update cannot jump at once.
    cooling = optax.adam(optax.cosine_decay_schedule(1e-2, 200))
    kernels, sigmas, variables, _ = trained(cooling, 400)
    exact = exact_norms(kernels)
    assert np.all(sigmas <= exact * (1 + 1e-5))
    np.testing.assert_allclose(sigmas[-1], exact[-1], rtol=1e-5)
    np.testing.assert_allclose(
        np.linalg.norm(fold(variables)["kernel"], 2), abs(variables["params"]["gamma"]), rtol=1e-5
    )


def test_importing_the_layers_brings_neither_the_trainer_nor_the_data():
    code = (
        "import sys, sigmarep.nn; print([m for m in sys.modules if m.split('.')[0] in "
        + repr({"tensorflow_datasets", "orbax", "grain", "optax", "ml_collections", "tensorflow", "absl"})
        + "])"
    )
    # Flax itself may import some of them: compare with what Flax alone brings.
    base = code.replace("sigmarep.nn", "flax.linen")
    ours, flax = (
        subprocess.run([sys.executable, "-c", c], capture_output=True, text=True, check=True) for c in (code, base)
    )
    assert ours.stdout == flax.stdout


@pytest.mark.parametrize(("power_vectors", "rows"), [(1, None), (4, 3), (100, 5)])
def test_further_power_vectors_are_variables_of_fixed_shape(power_vectors, rows):
    layer = SigmaDense(7, power_vectors=power_vectors)
    variables = layer.init(KEY, VECTORS)
    _, changed = layer.apply(variables, VECTORS, mutable=["spectral"])
    for state in (variables["spectral"], changed["spectral"]):
        shapes = {name: value.shape for name, value in state.items()}
        assert shapes == {"u": (7,), "sigma": ()} | ({} if rows is None else {"basis": (rows, 7)})
    np.testing.assert_allclose(np.linalg.norm(fold(variables)["kernel"], 2), 1.0, rtol=1e-5)
    with pytest.raises(ValueError, match="power_vectors = 0: expected at least 1"):
        SigmaDense(7, power_vectors=0).init(KEY, VECTORS)
