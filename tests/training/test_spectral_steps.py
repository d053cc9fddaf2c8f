"""SPECTRA, the spectral sphere and magnitude-direction decoupling against SVDs and loops in NumPy float64.

AdamW²'s bound: test_optimizers.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize

from sigmarep.errors import BadInput
from sigmarep.training.optimizers import create_optimizer
from sigmarep.training.schedules import create_schedule
from sigmarep.training.spectral_steps import spectral_sphere
from tests.training.optimizing import RATE, config, described, float32, train
from tests.training.test_relative_steps import adam_directions

RATES = [0.3, 0.2, 0.1]


def parameters(rng):
    kernel = rng.normal(size=(2, 4, 6)) * np.array([1.0, 3.0])[:, None, None]
    return {
        "blocks": {
            "up": {"kernel": kernel, "bias": rng.normal(size=(2, 6))},
            "query": {"kernel": np.ones((2, 6, 2, 2))},
        },
        "head": {"kernel": np.ones((6, 3))},
    }


def drawn(steps=3):
    rng = np.random.default_rng(0)
    params = parameters(rng)
    params["blocks"]["query"]["kernel"] = rng.normal(size=(2, 6, 2, 2))
    return params, [jax.tree.map(lambda x: rng.normal(size=x.shape), params) for _ in range(steps)]


def at(tree, path):
    for name in path:
        tree = tree[name]
    return tree


UP, QUERY, BIAS, HEAD = (
    ("blocks", "up", "kernel"),
    ("blocks", "query", "kernel"),
    ("blocks", "up", "bias"),
    ("head", "kernel"),
)


def trained(made, params, gradients):
    return train(made, params, gradients, schedule=lambda t: jnp.asarray(RATES)[t])


def adam_trained(start, gradients, path):
    """Adam's results for a parameter that is no hidden matrix."""
    steps = adam_directions([at(each, path) for each in gradients], 0.9, 0.999, 1e-6)
    return at(start, path) - sum(rate * u for rate, u in zip(RATES, steps, strict=True))


def bent(x, bound):
    """s to s / √(1 + s²/c²) of the singular values s of x, times √max(1, columns / rows)."""
    left, values, right = np.linalg.svd(x, full_matrices=False)
    bent_values = values / np.sqrt(1 + (values / bound) ** 2)
    return max(1.0, x.shape[1] / x.shape[0]) ** 0.5 * (left * bent_values) @ right


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "lion"])
def test_spectra_bends_the_singular_values_of_directions_before_decay_and_rate(name):
    """X ← (1 − λη)X − αη·H_c(U) (Jiang et al., 2026); under a coupled decay U has it already."""
    params, gradients = drawn()
    made = config(name, weight_decay=0.1 if name in ("adamw", "lion") else 0.0, momentum=0.0, spectral_clip=0.5)
    # Constant from the first step on: no warmup, in which the bound would be another.
    made.learning_rate = RATE
    found = train(made, params, gradients)

    def directions(each):
        if name in ("adam", "adamw"):
            return adam_directions(each, 0.9, 0.999, 1e-6)
        return each if name == "sgd" else lion(each)

    def lion(each):
        moment = 0.0
        for g in each:
            yield np.sign(0.9 * moment + 0.1 * g)
            moment = 0.999 * moment + 0.001 * g

    for path in (UP, QUERY):
        for layer in range(2):
            expected = at(params, path)[layer]
            for u in directions([at(each, path)[layer] for each in gradients]):
                clipped = bent(u.reshape(len(u), -1), 0.5).reshape(u.shape)
                expected = expected - RATE * (clipped + made.weight_decay * expected)
            np.testing.assert_allclose(at(found, path)[layer], expected, rtol=1e-4, atol=1e-5)
    expected = at(params, BIAS) - RATE * sum(directions([at(each, BIAS) for each in gradients]))
    np.testing.assert_allclose(at(found, BIAS), expected, rtol=1e-4, atol=1e-5)


def test_in_the_warmup_the_bound_times_the_learning_rate_is_what_it_is_at_the_peak():
    params, gradients = drawn(4)
    made = config("sgd", weight_decay=0.0, momentum=0.0, spectral_clip=0.5, learning_rate=RATE, schedule="linear")
    schedule = create_schedule(made, total_steps=6, warmup_steps=2)
    found = train(made, params, gradients, schedule=schedule)
    expected = params["blocks"]["up"]["kernel"][1]
    for rate, bound, g in zip((0.5, 1.0, 1.0, 0.75), (1.0, 0.5, 0.5, 0.5), gradients, strict=True):
        expected = expected - RATE * rate * bent(g["blocks"]["up"]["kernel"][1], bound)
    np.testing.assert_allclose(found["blocks"]["up"]["kernel"][1], expected, rtol=1e-4, atol=1e-5)


def sphere_step(w, momentum, rate):
    """One step of arXiv 2601.08393 with exact singular vectors and a root finder for λ."""
    radius = np.sqrt(w.shape[1] / w.shape[0])
    left, values, right = np.linalg.svd(w)
    normal = np.outer(left[:, 0], right[0])

    def msign(x):
        u, _, v = np.linalg.svd(x, full_matrices=False)
        return u @ v

    unit = momentum / np.linalg.norm(momentum)
    multiplier = scipy.optimize.brentq(lambda x: np.sum(normal * msign(unit + x * normal)), -20, 20, xtol=1e-12)
    return radius / values[0] * w - rate * radius * msign(unit + multiplier * normal)


@pytest.mark.parametrize("nesterov", [False, True])
def test_steps_on_the_spectral_sphere_are_tangent_to_it(nesterov):
    """On the average of gradients, of which optax's trace is a multiple, and with so many power steps that all converge."""
    params, gradients = drawn()
    layers = {name: layer for name, layer in described(params).items() if layer.role == "hidden"}
    sphere = spectral_sphere(lambda t: jnp.asarray(RATES)[t], layers, iterations=200)
    optimizer = optax.chain(optax.trace(0.9, nesterov=nesterov), optax.scale(-1.0), sphere)
    found = float32(params)
    state = optimizer.init(found)
    for each in gradients:
        updates, state = optimizer.update(float32(each), state, found)
        found = jax.tree.map(jnp.add, found, updates)
    for path in (UP, QUERY):
        for layer in range(2):
            start = at(params, path)[layer]
            expected, average = start.reshape(len(start), -1), 0.0
            for rate, each in zip(RATES, gradients, strict=True):
                g = at(each, path)[layer].reshape(expected.shape)
                average = 0.9 * average + 0.1 * g
                expected = sphere_step(expected, 0.9 * average + 0.1 * g if nesterov else average, rate)
            np.testing.assert_allclose(at(found, path)[layer].reshape(expected.shape), expected, atol=2e-3)


def test_matrices_are_on_the_sphere_of_mup_and_all_else_is_adams():
    params, gradients = drawn()
    found = trained(config("spectral_sphere", weight_decay=0.0), params, gradients)
    for path in (BIAS, HEAD):
        np.testing.assert_allclose(at(found, path), adam_trained(params, gradients, path), rtol=1e-4, atol=1e-5)
    settled = train(config("spectral_sphere", weight_decay=0.0), params, [gradients[0]] * 40, schedule=lambda _: 0.0)
    for layer in range(2):
        np.testing.assert_allclose(np.linalg.norm(at(settled, UP)[layer], 2), np.sqrt(6 / 4), rtol=1e-4)


def test_decay_reaches_what_is_on_no_sphere_alone():
    params, gradients = drawn(1)
    plain, decayed = (train(config("spectral_sphere", weight_decay=x), params, gradients) for x in (0.0, 0.5))
    np.testing.assert_array_equal(at(plain, UP), at(decayed, UP))
    np.testing.assert_allclose(at(plain, HEAD) - at(decayed, HEAD), RATE * 0.5 * at(params, HEAD), rtol=1e-4)


def softplus(x):
    return np.log1p(np.exp(x))


def test_magnitudes_and_directions_are_learned_apart():
    """Algorithm 2 of arXiv 2606.25971 on every layer of a stack: Adam for Ŵ on its sphere and for the raw gains."""
    params, gradients = drawn()
    made = config("adam", weight_decay=0.0, learning_rate=0.3, magnitude_learning_rate=0.6)
    found = trained(made, params, gradients)
    for path in (UP, QUERY):
        for layer in range(2):
            start = at(params, path)[layer]
            direction = start.reshape(len(start), -1)
            radius = np.linalg.norm(direction)
            raw = [np.full(size, np.log(np.e - 1)) for size in direction.shape]
            seen = [[], [], []]
            for rate, each in zip(RATES, gradients, strict=True):
                g = at(each, path)[layer].reshape(direction.shape)
                r, c = map(softplus, raw)
                sigmoids = [1 / (1 + np.exp(-x)) for x in raw]
                seen[0].append(r[:, None] * g * c)
                seen[1].append(np.sum(direction * g * c, axis=1) * sigmoids[0])
                seen[2].append(np.sum(direction * g * r[:, None], axis=0) * sigmoids[1])
                steps = [list(adam_directions(x, 0.9, 0.999, 1e-6))[-1] for x in seen]
                direction = direction - rate * steps[0]
                direction = direction * radius / np.linalg.norm(direction)
                raw = [x - 2 * rate * step for x, step in zip(raw, steps[1:], strict=True)]
            r, c = map(softplus, raw)
            expected = (r[:, None] * direction * c).reshape(start.shape)
            np.testing.assert_allclose(at(found, path)[layer], expected, rtol=1e-4, atol=1e-4)
    for path in (BIAS, HEAD):
        np.testing.assert_allclose(at(found, path), adam_trained(params, gradients, path), rtol=1e-4, atol=1e-5)


def test_a_zero_matrix_stays_without_a_direction():
    params, gradients = drawn(2)
    params["blocks"]["up"]["kernel"] = np.zeros((2, 4, 6))
    found = train(config("adam", weight_decay=0.0, magnitude_learning_rate=0.1), params, gradients)
    np.testing.assert_array_equal(at(found, UP), 0.0)
    # On the spectral sphere it takes the step.
    found = train(config("spectral_sphere", weight_decay=0.0), params, gradients[:1])
    np.testing.assert_allclose(np.linalg.norm(at(found, UP)[0], 2), RATE * np.sqrt(6 / 4), rtol=1e-3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hyperball": True, "magnitude_learning_rate": 0.1}, "hyperball = True: expected no magnitude_learning_rate"),
        (
            {"magnitude_learning_rate": 0.1, "layer_decay": 0.5},
            "magnitude_learning_rate = 0.1: expected no layer_decay",
        ),
        ({"name": "spectral_sphere", "spectral_bound": 0.1}, "name = 'spectral_sphere': expected no layer_decay"),
        ({"name": "lars", "spectral_clip": 1.0}, "spectral_clip = 1.0: expected a name of adamw, adam"),
    ],
)
def test_what_cannot_go_together_is_refused(fields, message):
    params = float32(drawn()[0])
    made = config(**({"name": "adam"} | fields))
    with pytest.raises(BadInput, match=f"config.optimizer.{message}"):
        create_optimizer(made, schedule=lambda _: RATE, params=params, layers=described(params))
