"""Products with the Hessian against the dense Hessian, and the iterations against numpy's eigenvalues."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sigmarep.core import curvature
from sigmarep.core.spectral import reparametrize


def symmetric(eigenvalues, seed=0):
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.normal(size=(len(eigenvalues),) * 2))
    return (q * eigenvalues) @ q.T


@pytest.mark.parametrize("eigenvalues", [np.linspace(-3, 9, 40), np.r_[50.0, np.zeros(39)], np.r_[-7.0, np.ones(39)]])
def test_lanczos_finds_the_eigenvalues_of_a_matrix(eigenvalues):
    matrix = jnp.asarray(symmetric(eigenvalues), jnp.float32)
    start = jax.random.normal(jax.random.key(0), (40,))
    found = curvature.lanczos(lambda v: matrix @ v, start, 40)
    values = curvature.ritz_values(found)
    distinct = np.unique(np.round(eigenvalues, 6))
    np.testing.assert_allclose([values.max(), values.min()], [distinct[-1], distinct[0]], rtol=1e-4, atol=1e-4)
    used = len(values)
    np.testing.assert_allclose(found.basis[:used] @ found.basis[:used].T, np.eye(used), atol=1e-4)


def test_few_iterations_find_an_eigenvalue_that_stands_apart():
    eigenvalues = np.r_[30.0, np.linspace(-1, 1, 199)]
    matrix = jnp.asarray(symmetric(eigenvalues), jnp.float32)
    start = jax.random.normal(jax.random.key(1), (200,))
    values = curvature.ritz_values(curvature.lanczos(lambda v: matrix @ v, start, 6))
    assert values[0] == pytest.approx(30.0, rel=1e-5)


def test_power_iteration_finds_the_eigenvalue_of_largest_magnitude_and_goes_on_from_its_vector():
    matrix = jnp.asarray(symmetric(np.r_[-12.0, np.linspace(-5, 5, 29)]), jnp.float32)
    start = jax.random.normal(jax.random.key(2), (30,))
    value, vector = curvature.power_iteration(lambda v: matrix @ v, start, 40)
    assert float(value) == pytest.approx(-12.0, rel=1e-5)
    moved = matrix + 0.01 * jnp.asarray(symmetric(np.linspace(-1, 1, 30), seed=3), jnp.float32)
    again, _ = curvature.power_iteration(lambda v: moved @ v, vector, 1)
    largest = np.linalg.eigvalsh(np.asarray(moved, np.float64))[0]
    assert float(again) == pytest.approx(largest, rel=1e-5)


def loss_of_two_layers(reparametrised):
    key = jax.random.split(jax.random.key(0), 3)
    x, y = jax.random.normal(key[0], (20, 6)), jax.random.normal(key[1], (20, 3))
    shapes = ((6, 5), (5, 3))
    at = 0.5 * jax.random.normal(key[2], (6 * 5 + 5 * 3 + 2,))
    vectors = [jnp.linalg.svd(at[:30].reshape(6, 5))[2][0], jnp.linalg.svd(at[30:45].reshape(5, 3))[2][0]]

    def loss(flat):
        kernels = [flat[:30].reshape(shapes[0]), flat[30:45].reshape(shapes[1])]
        if reparametrised:
            kernels = [
                reparametrize(kernel, 1 + gamma, u).kernel
                for kernel, gamma, u in zip(kernels, flat[45:], vectors, strict=True)
            ]
        return jnp.mean((jnp.tanh(x @ kernels[0]) @ kernels[1] - y) ** 2)

    return loss, at


@pytest.mark.parametrize("reparametrised", [False, True])
def test_sharpness_is_the_dense_hessians(reparametrised):
    loss, at = loss_of_two_layers(reparametrised)
    # Reverse over reverse, where the product is forward over reverse.
    dense = np.asarray(jax.jacrev(jax.jacrev(loss))(at), np.float64)
    product = curvature.hessian_product(loss, at)
    start = jax.random.normal(jax.random.key(5), at.shape)
    np.testing.assert_allclose(product(start), dense @ np.asarray(start, np.float64), rtol=1e-3, atol=1e-4)
    values = curvature.ritz_values(jax.jit(lambda: curvature.lanczos(product, start, 30))())
    expected = np.linalg.eigvalsh(dense)[::-1]
    np.testing.assert_allclose(values[:3], expected[:3], rtol=1e-3)
    diagonal = jnp.linspace(0.1, 3.0, at.size)
    root = np.asarray(diagonal, np.float64) ** -0.5
    scaled = curvature.preconditioned(product, diagonal)
    values = curvature.ritz_values(curvature.lanczos(scaled, start, 40))
    np.testing.assert_allclose(values[0], np.linalg.eigvalsh(root[:, None] * dense * root)[-1], rtol=1e-3)


def test_descent_on_a_quadratic_is_stable_below_the_threshold_alone():
    def last(rate, momentum):
        x = velocity = 1.0
        for _ in range(400):
            velocity = momentum * velocity + (1 - momentum) * 3.0 * x
            x -= rate * velocity
        return abs(x)

    for momentum in (0.0, 0.9):
        rate = (2 + 2 * momentum) / ((1 - momentum) * 3.0)
        assert curvature.threshold(rate, momentum) == pytest.approx(3.0)
        assert last(0.97 * rate, momentum) < 0.1 < 10 < last(1.03 * rate, momentum)
    assert curvature.threshold(0.0) == float("inf")
