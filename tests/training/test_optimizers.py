"""Optimizers and schedules against their formulas in NumPy float64; stacked layers train as separate ones."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from sigmarep.core import spectral
from sigmarep.errors import BadInput
from sigmarep.training import durations
from sigmarep.training.config import default_config, validate
from sigmarep.training.optimizers import create_optimizer, decay_mask
from sigmarep.training.schedules import create_schedule
from sigmarep.training.spectral_steps import bound_spectral_norm
from tests.training.optimizing import RATE, config, described, float32, train, tree

STEPS = 5


def reference(name, c, w, gradients, decayed):
    """One parameter's trajectory in float64, from the optimizers' papers."""
    m, v = np.zeros_like(w), np.zeros_like(w)
    decay = c.weight_decay if decayed else 0.0
    for t, g in enumerate(gradients, 1):
        coupled = g + decay * w
        if name in ("adam", "adamw", "lamb"):
            h = coupled if name == "adam" else g
            m, v = c.beta1 * m + (1 - c.beta1) * h, c.beta2 * v + (1 - c.beta2) * h**2
            update = (m / (1 - c.beta1**t)) / (np.sqrt(v / (1 - c.beta2**t)) + c.epsilon)
            if name != "adam":
                update = update + decay * w
            if name == "lamb" and decayed:
                update = update * np.linalg.norm(w) / np.linalg.norm(update)
            w = w - RATE * update
        elif name == "sgd":
            m = c.momentum * m + coupled
            w = w - RATE * m
        elif name == "lars":
            ratio = c.trust_coefficient * np.linalg.norm(w) / np.linalg.norm(coupled) if decayed else 1.0
            m = c.momentum * m + RATE * ratio * coupled
            w = w - m
        elif name == "adagrad":
            v = v + coupled**2
            w = w - RATE * coupled / np.sqrt(v + c.epsilon)
        elif name == "lion":
            direction = np.sign(c.beta1 * m + (1 - c.beta1) * g)
            m = c.beta2 * m + (1 - c.beta2) * g
            w = w - RATE * (direction + decay * w)
    return w


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "lars", "lamb", "adagrad", "lion"])
def test_optimizers_equal_their_formulas_with_gamma_and_biases_left_out_of_decay(name):
    made = config(name)
    gradients = [tree(seed) for seed in range(1, STEPS + 1)]
    found = train(made, tree(), gradients)
    mask = decay_mask(found, made.no_decay)
    assert not mask["block_0"]["mlp"]["up"]["gamma"]
    assert not mask["block_0"]["mlp"]["up"]["bias"]
    assert mask["head"]["kernel"]
    expected = jax.tree.map(
        lambda w, decayed, *g: reference(name, made, np.asarray(w), [np.asarray(x) for x in g], decayed),
        tree(),
        mask,
        *gradients,
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)


NAMES = ["adamw", "adam", "sgd", "lars", "lamb", "adagrad", "lion", "muon", "spectral_sphere"]
SHAPES = {
    "attention": {
        "query": {"kernel": (8, 2, 4), "gamma": ()},
        "qkv": {"kernel": (8, 3, 2, 4)},
        "out": {"kernel": (2, 4, 8), "bias": (8,)},
    },
    "mlp": {"up": {"kernel": (8, 12)}},
}


def draw(rng):
    return jax.tree.map(lambda shape: rng.normal(size=shape), SHAPES, is_leaf=lambda x: isinstance(x, tuple))


@pytest.mark.parametrize(
    ("name", "fields"), [*((name, {}) for name in NAMES), ("adam", {"relative_gradients": True})], ids=str
)
def test_stacked_layers_train_as_separate_ones(name, fields):
    rng = np.random.default_rng(0)
    apart = [{"encoder": {f"block_{i}": draw(rng) for i in range(3)}} for _ in range(STEPS + 1)]

    def stacked(separate):
        layers = separate["encoder"].values()
        return {"encoder": {"blocks": jax.tree.map(lambda *x: np.stack(x), *layers)}}

    made = config(name, **fields)
    found = train(made, stacked(apart[0]), [stacked(g) for g in apart[1:]])
    expected = stacked(jax.device_get(train(made, apart[0], apart[1:])))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), found, expected)


def test_muon_orthogonalises_inputs_by_outputs_and_leaves_the_rest_to_adam():
    rng = np.random.default_rng(0)

    def tree_of_a_model():
        # Speech has a convolution as its first layer: its kernel (window, inputs, outputs) is no matrix of a block.
        ends = {"patch_embedding": (2, 2, 1, 8), "front_end": (7, 5, 8), "head": (8, 3)}
        return {
            "encoder": {"block_0": draw(rng)},
            **{name: {"kernel": rng.normal(size=shape)} for name, shape in ends.items()},
        }

    params, gradient = tree_of_a_model(), tree_of_a_model()
    made = config("muon", weight_decay=0.0)
    new = train(made, params, [gradient], schedule=lambda _: 1.0)
    block, old = new["encoder"]["block_0"], params["encoder"]["block_0"]
    for path, outputs in (
        (("attention", "query"), 8),
        (("attention", "qkv"), 24),
        (("attention", "out"), 8),
        (("mlp", "up"), 12),
    ):
        change = np.asarray(block[path[0]][path[1]]["kernel"]) - old[path[0]][path[1]]["kernel"]
        values = np.linalg.svd(change.reshape(-1, outputs), compute_uv=False) / (0.2 * np.sqrt(max(8, outputs)))
        # Five Newton-Schulz steps bring the singular values near 1, not to it.
        assert np.all((values > 0.5) & (values < 1.4)), (path, values)
    adam = train(config("adam", weight_decay=0.0), params, [gradient], schedule=lambda _: 1.0)
    for get in (
        lambda t: t["patch_embedding"]["kernel"],
        lambda t: t["front_end"]["kernel"],
        lambda t: t["head"]["kernel"],
        lambda t: t["encoder"]["block_0"]["attention"]["query"]["gamma"],
        lambda t: t["encoder"]["block_0"]["attention"]["out"]["bias"],
    ):
        np.testing.assert_allclose(np.sign(get(new) - get(float32(params))), np.sign(get(adam) - get(float32(params))))


def test_relative_gradients_are_those_of_a_kernel_with_gamma_times_its_norm():
    made = config("sgd", weight_decay=0.0, momentum=0.0, relative_gradients=True)
    params, gradient = tree(), tree(1)
    found = train(made, params, [gradient])
    norm = np.linalg.norm(params["block_0"]["mlp"]["up"]["kernel"])
    # A zero kernel has no norm to be measured by, and learns all the same.
    zero = params | {"block_0": {"mlp": {"up": {**params["block_0"]["mlp"]["up"], "kernel": np.zeros((4, 6))}}}}
    learned = train(made, zero, [gradient])["block_0"]["mlp"]["up"]["kernel"]
    np.testing.assert_allclose(learned, -RATE * gradient["block_0"]["mlp"]["up"]["kernel"], rtol=1e-5)
    # The head has no γ, as a plain layer has none.
    for path, new in jax.tree_util.tree_leaves_with_path(found):
        w, g = (jax.tree_util.tree_leaves_with_path(each) for each in (params, gradient))
        at = [other for other, _ in w].index(path)
        factor = norm if path[-1].key == "kernel" and path[0].key == "block_0" else 1.0
        np.testing.assert_allclose(new, w[at][1] - RATE * factor * g[at][1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("name", ["adam", "muon"])
def test_with_relative_gradients_steps_that_outgrow_the_start_train_alike_at_any_rate(name, relative):
    """A layer under σReparam learns another; with a start of next to nothing its rate is only the unit W is measured in."""
    rng = np.random.default_rng(0)
    x, target = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((64, 8), (8, 8)))
    target = target / np.linalg.norm(target, 2)

    def loss(params):
        layer = params["block_0"]["mlp"]
        kernel, sigma = layer["kernel"], spectral.spectral_norm(layer["kernel"])
        return jnp.mean((x @ (layer["gamma"] * kernel / sigma - target)) ** 2)

    def losses(rate):
        params = {"block_0": {"mlp": {"kernel": jnp.asarray(1e-3 * np.eye(8), jnp.float32), "gamma": jnp.float32(1.0)}}}
        fields = {"weight_decay": 0.0, "epsilon": 1e-20, "relative_gradients": relative}
        made = config(name, learning_rate=rate, non_matrix_learning_rate=0.01, **fields)
        schedule = create_schedule(made, total_steps=60)
        optimizer = create_optimizer(made, schedule=schedule, params=params, layers=described(params))

        def step(carry, _):
            params, state = carry
            value, gradient = jax.value_and_grad(loss)(params)
            updates, state = optimizer.update(gradient, state, params)
            return (jax.tree.map(jnp.add, params, updates), state), value

        return jax.lax.scan(step, (params, optimizer.init(params)), length=60)[1]

    slow, fast = (np.asarray(jax.jit(losses, static_argnums=0)(rate)) for rate in (1.0, 100.0))
    if relative:
        np.testing.assert_allclose(slow, fast, rtol=0.02, atol=5e-3)
        assert max(slow[-1], fast[-1]) < 0.01
    else:
        # Moments that hold the gradients of the small kernel alone: the layer hardly learns.
        assert min(slow[-1], fast[-1]) > 0.2


@pytest.mark.parametrize("name", ["adam", "muon"])
def test_all_but_the_matrices_of_blocks_have_a_rate_of_their_own(name):
    rng = np.random.default_rng(0)
    params, gradient = (
        {"encoder": {"block_0": draw(rng)}, "head": {"kernel": draw(rng)["mlp"]["up"]["kernel"]}} for _ in "ab"
    )

    def change(**fields):
        new = train(config(name, weight_decay=0.0, **fields), params, [gradient])
        return jax.tree.map(np.subtract, jax.device_get(new), float32(params))

    one, own = change(), change(learning_rate=RATE, non_matrix_learning_rate=RATE / 4)
    assert jax.tree_util.tree_leaves_with_path(one)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(own), strict=True):
        matrix = path[-1].key == "kernel" and path[0].key == "encoder"
        np.testing.assert_allclose(b, a if matrix else a / 4, rtol=1e-3, atol=1e-7)


def test_gradients_are_clipped_by_their_global_norm():
    made = config("sgd", weight_decay=0.0, clip_norm=0.5, momentum=0.0)
    found = train(made, tree(), [tree(1)])
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(tree(1))))
    jax.tree.map(
        lambda new, w, g: np.testing.assert_allclose(new, w - RATE * g * 0.5 / norm, rtol=1e-5, atol=1e-6),
        found,
        tree(),
        tree(1),
    )


@pytest.mark.parametrize("field", ["no_decay", "scale_parameters", "non_matrices"])
def test_a_rule_that_is_no_expression_is_refused(field):
    whole = default_config("image_classification")
    whole.optimizer[field] = ("(",)
    with pytest.raises(
        BadInput, match=rf"config\.optimizer\.{field} = \('\(',\): expected a tuple of regular expressions"
    ):
        validate(whole)


@pytest.mark.parametrize("field", ["no_decay", "scale_parameters", "non_matrices"])
def test_a_rule_that_finds_no_parameter_is_refused(field):
    made = config("adamw", **{field: ("kernel$", "gama$")})
    with pytest.raises(BadInput, match=rf"config\.optimizer\.{field} = .*: 'gama\$' finds none of the parameters"):
        create_optimizer(made, schedule=lambda _: 1.0, params=tree(), layers=described(tree()))


def schedule_of(name, warmup, total=100, **fields):
    made = config("sgd", learning_rate=2.0, schedule=name, **fields)
    schedule = create_schedule(made, total_steps=total, warmup_steps=warmup)
    return np.asarray([schedule(i) for i in range(total)])


@pytest.mark.parametrize("warmup", [0, 10])
@pytest.mark.parametrize("name", ["constant", "cosine", "linear", "step", "rsqrt"])
def test_schedules_equal_their_formulas(name, warmup):
    found = schedule_of(name, warmup, end_factor=0.1, step_at=(0.5, 0.8), step_factor=0.2)
    for i, rate in enumerate(found):
        p = (i - warmup) / (100 - warmup)
        factor = {
            "constant": 1.0,
            "cosine": 0.1 + 0.9 * (1 + np.cos(np.pi * p)) / 2,
            "linear": 1 - 0.9 * p,
            "step": 0.2 ** ((i >= 50) + (i >= 80)),
            "rsqrt": np.sqrt(max(warmup, 1) / max(i + 1, warmup, 1)),
        }[name]
        np.testing.assert_allclose(rate, 2.0 * ((i + 1) / warmup if i < warmup else factor), rtol=1e-5)


def test_a_warmup_longer_than_the_run_is_refused():
    with pytest.raises(BadInput, match="longer than the run of 100 steps"):
        schedule_of("cosine", 101)


def block(**fields):
    return ml_collections.ConfigDict({f"total_{unit}": None for unit in durations.UNITS} | fields)


@pytest.mark.parametrize(
    ("fields", "steps"),
    [
        ({"total_steps": 7.0}, 7),
        ({"total_epochs": 2.0}, 20),
        ({"total_epochs": 0.5}, 5),
        ({"total_examples": 640.0}, 10),
        ({"total_examples": 1.0}, 1),
        ({"total_steps": 0.0}, 0),
        ({}, None),
    ],
)
def test_durations_in_every_unit(fields, steps):
    assert durations.steps(block(**fields), "total", batch_size=64, num_examples=640) == steps


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"total_steps": 7.0, "total_epochs": 2.0}, "config.total_steps and config.total_epochs are both set"),
        ({"total_steps": -1.0}, "config.total_steps = -1: expected a finite number"),
        ({"total_epochs": float("inf")}, "config.total_epochs = inf: expected a finite number"),
        ({"total_steps": 1.5}, "config.total_steps = 1.5: expected a whole number"),
    ],
)
def test_impossible_durations_are_refused(fields, message):
    with pytest.raises(BadInput, match=message):
        durations.steps(block(**fields), "total", batch_size=64, num_examples=640)


@pytest.mark.parametrize("stacked", [False, True])
def test_an_update_is_shortened_to_a_multiple_of_its_matrixs_spectral_norm(stacked):
    rng = np.random.default_rng(0)
    kernels = rng.normal(size=(3, 8, 2, 5)) * np.array([1.0, 5.0, 0.0])[:, None, None, None]
    changes = rng.normal(size=(3, 8, 2, 5))
    names = ["blocks"] if stacked else ["block_0", "block_1", "block_2"]

    def tree_of(each):
        parts = [each] if stacked else list(each)
        return {name: {"query": {"kernel": x, "bias": 100 * x[..., 0]}} for name, x in zip(names, parts, strict=True)}

    params, updates = float32(tree_of(kernels)), float32(tree_of(changes))
    bound = bound_spectral_norm(0.5, described(params))
    state = bound.init(params)
    for _ in range(10):
        found, state = bound.update(updates, state, params)
    norms = [np.linalg.norm(x.reshape(8, 10), 2) for x in kernels]
    lengths = [np.linalg.norm(x.reshape(8, 10), 2) for x in changes]
    factors = [min(1.0, 0.5 * norm / length) if norm else 1.0 for norm, length in zip(norms, lengths, strict=True)]
    assert factors[0] < 1
    expected = tree_of(changes * np.array(factors)[:, None, None, None])
    for name in names:
        np.testing.assert_allclose(found[name]["query"]["kernel"], expected[name]["query"]["kernel"], rtol=0.05)
        np.testing.assert_array_equal(found[name]["query"]["bias"], updates[name]["query"]["bias"])


def test_every_update_of_a_bounded_optimizer_is_within_the_bound():
    made = config("adamw", spectral_bound=0.01)
    params = float32(tree())
    optimizer = create_optimizer(made, schedule=lambda _: RATE, params=params, layers=described(params))
    state = optimizer.init(params)
    for seed in range(1, 4):
        updates, state = optimizer.update(float32(tree(seed)), state, params)
        norm, change = (
            np.linalg.norm(np.asarray(x["block_0"]["mlp"]["up"]["kernel"], np.float64), 2) for x in (params, updates)
        )
        # Both norms are found from below, by some power steps.
        assert 0.8 < change / (0.01 * norm) < 1.1
        params = jax.tree.map(jnp.add, params, updates)


def test_rates_of_mup_fall_with_the_inputs_of_hidden_and_output_kernels():
    rng = np.random.default_rng(0)
    shapes = {
        "table": {"kernel": (9, 8)},
        "block_0": {"query": {"kernel": (8, 2, 4)}, "down": {"kernel": (32, 8), "bias": (8,)}},
        "head": {"kernel": (8, 3)},
    }
    params = jax.tree.map(rng.standard_normal, shapes, is_leaf=lambda x: isinstance(x, tuple))
    gradients = [jax.tree.map(lambda x: rng.normal(size=x.shape), params) for _ in range(2)]
    made = config("adam", weight_decay=0.0)
    plain = train(made, params, gradients)
    made.rate_inputs = 16
    scaled = train(made, params, gradients)
    moved, slowly = (jax.tree.map(np.subtract, each, params) for each in (plain, scaled))
    factors = {
        "table": {"kernel": 1.0},
        "block_0": {"query": {"kernel": 2.0}, "down": {"kernel": 0.5, "bias": 1.0}},
        "head": {"kernel": 2.0},
    }
    jax.tree.map(lambda a, b, f: np.testing.assert_allclose(b, f * a, rtol=1e-3, atol=1e-5), moved, slowly, factors)


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "muon"])
def test_gains_learn_at_their_part_of_the_rate(name):
    params, gradients = tree(), [tree(seed) for seed in range(1, 4)]
    # Without decay the update of a parameter does not depend on where it is.
    made = config(name, weight_decay=0.0)
    plain = train(made, params, gradients)
    made.scale_parameters_factor = 0.25
    slow = train(made, params, gradients)
    start = float32(params)
    moved = [jax.tree.map(jnp.subtract, end, start) for end in (plain, slow)]
    for whole, part in zip(*map(jax.tree_util.tree_leaves_with_path, moved), strict=True):
        factor = 1.0 if whole[0][-1].key == "kernel" else 0.25
        np.testing.assert_allclose(part[1], factor * whole[1], rtol=1e-3, atol=1e-7)
