"""Steps measured by the size of the weights against their formulas in NumPy float64; trust ratios: test_optimizers.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sigmarep.errors import BadInput
from sigmarep.nn import TransformerConfig, TransformerStack
from sigmarep.nn.layers import describe
from sigmarep.training.optimizers import create_optimizer
from tests.training.optimizing import RATE, config, described, float32


def adam_directions(gradients, beta1, beta2, epsilon):
    """Adam's updates before the rate, of one parameter's gradients."""
    first = second = 0.0
    for t, g in enumerate(gradients, 1):
        first, second = beta1 * first + (1 - beta1) * g, beta2 * second + (1 - beta2) * g**2
        yield first / (1 - beta1**t) / (np.sqrt(second / (1 - beta2**t)) + epsilon)


def test_hyperball_moves_on_the_sphere_of_the_initial_norm_by_the_rate_times_that_norm():
    """W ← R · Norm(W − η R · Norm(u)) with R = ‖W₀‖_F, for every layer of a stack (Wen et al., 2026)."""
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(2, 4, 6)) * np.array([1.0, 7.0])[:, None, None]
    params = {
        "blocks": {"up": {"kernel": kernel, "bias": rng.normal(size=(2, 6))}},
        "head": {"kernel": np.ones((6, 3))},
    }
    gradients = [jax.tree.map(lambda x: rng.normal(size=x.shape), params) for _ in range(3)]
    made = config("adam", weight_decay=0.0, hyperball=True)
    rates = [0.3, 0.2, 0.1]
    layers = described(params)
    optimizer = create_optimizer(made, schedule=lambda t: jnp.asarray(rates)[t], params=float32(params), layers=layers)
    new, state = float32(params), optimizer.init(float32(params))
    for each in gradients:
        updates, state = optimizer.update(float32(each), state, new)
        new = jax.tree.map(jnp.add, new, updates)

    norm = np.linalg.norm
    for layer in range(2):
        expected, radius = kernel[layer], norm(kernel[layer])
        each_gradient = [each["blocks"]["up"]["kernel"][layer] for each in gradients]
        for rate, u in zip(rates, adam_directions(each_gradient, 0.9, 0.999, 1e-6), strict=True):
            expected = expected - rate * radius * u / norm(u)
            expected = radius * expected / norm(expected)
        np.testing.assert_allclose(new["blocks"]["up"]["kernel"][layer], expected, rtol=1e-4, atol=1e-5)
    # An output kernel, and a bias, are Adam's.
    for path in (("head", "kernel"), ("blocks", "up", "bias")):
        start, found, each_gradient = params, new, gradients
        for name in path:
            start, found, each_gradient = start[name], found[name], [each[name] for each in each_gradient]
        steps = [r * u for r, u in zip(rates, adam_directions(each_gradient, 0.9, 0.999, 1e-6), strict=True)]
        np.testing.assert_allclose(found, start - sum(steps), rtol=1e-4, atol=1e-5)
    made.layer_decay = 0.5
    with pytest.raises(
        BadInput, match=r"config\.optimizer\.hyperball = True: expected no layer_decay, query_key_rates"
    ):
        create_optimizer(made, schedule=lambda _: RATE, params=params, layers=layers)


@pytest.mark.parametrize("scan", [False, True])
def test_unit_kernels_are_unit_vectors_along_the_residual_stream_after_every_step(scan):
    """Weights of an output that read the stream, weights of an input that add to it (Loshchilov et al., 2024)."""
    transformer = TransformerConfig(depth=2, width=8, num_heads=2, mlp_dim=6, mlp_gate=True, norm="sphere", scan=scan)
    layers = describe(TransformerStack(transformer).init, jax.random.key(0), jnp.ones((1, 3, 8)))
    rng = np.random.default_rng(0)
    params, gradients = (jax.tree.map(lambda p: rng.normal(size=p.shape), layers.variables["params"]) for _ in range(2))
    made = config("sgd", weight_decay=0.0, momentum=0.0, unit_kernels=True)
    optimizer = create_optimizer(made, schedule=lambda _: RATE, params=float32(params), layers=layers)
    updates, _ = optimizer.update(float32(gradients), optimizer.init(float32(params)), float32(params))
    found = jax.tree.map(np.add, params, updates)
    plain = jax.tree.map(lambda w, g: w - RATE * g, params, gradients)
    lead = int(scan)
    along = {"query": 0, "key": 0, "value": 0, "up": 0, "gate": 0, "out": 2, "down": 1}
    for path, end in jax.tree_util.tree_leaves_with_path(plain):
        names = [entry.key for entry in path]
        expected = end
        if names[-1] == "kernel":
            axis = along[names[-2]] + lead
            expected = end / np.linalg.norm(end, axis=axis, keepdims=True)
        actual = found
        for name in names:
            actual = actual[name]
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5, err_msg="/".join(names))


def test_steps_of_queries_and_keys_are_divided_by_each_others_norm_relative_to_the_start():
    """η_Q ∝ 1/‖W_K‖ and η_K ∝ 1/‖W_Q‖ (Anson and Aitchison, 2025), for every layer of a stack."""
    x = jnp.ones((1, 3, 8))
    transformer = TransformerConfig(depth=2, width=8, num_heads=2, mlp_dim=8, norm="none")
    layers = describe(TransformerStack(transformer).init, jax.random.key(0), x)
    params = layers.variables["params"]
    rng = np.random.default_rng(0)
    params, gradients = (jax.tree.map(lambda p: rng.normal(size=p.shape), params) for _ in range(2))
    made = config("sgd", weight_decay=0.0, momentum=0.0, query_key_rates=True)
    optimizer = create_optimizer(made, schedule=lambda _: RATE, params=float32(params), layers=layers)
    state = optimizer.init(float32(params))
    # The second layer's queries are three times as large as at the start, the first layer's keys a half.
    later = jax.tree.map(np.copy, params)
    attention = later["blocks"]["attention"]
    attention["query"]["kernel"][1] *= 3.0
    attention["key"]["kernel"][0] *= 0.5
    updates, _ = optimizer.update(float32(gradients), state, float32(later))
    expected = jax.tree.map(lambda g: -RATE * g, gradients)
    expected["blocks"]["attention"]["key"]["kernel"][1] /= 3.0
    expected["blocks"]["attention"]["query"]["kernel"][0] /= 0.5
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), updates, expected)


def test_queries_and_keys_of_one_kernel_have_no_rates_of_their_own():
    transformer = TransformerConfig(depth=1, width=8, num_heads=2, mlp_dim=8, qkv="fused")
    layers = describe(TransformerStack(transformer).init, jax.random.key(0), jnp.ones((1, 3, 8)))
    made = config("sgd", query_key_rates=True)
    with pytest.raises(BadInput, match=r"query_key_rates = True: expected config\.model\.qkv = 'separate'"):
        create_optimizer(made, schedule=lambda _: RATE, params=layers.variables["params"], layers=layers)
