"""Orthonormal bases and eigenvectors without LAPACK, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sigmarep.core import small, spectral

EPS = float(jnp.finfo(jnp.float32).eps)


def gaussian(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def kernel_of(kind, inputs, outputs):
    """A float64 matrix of norm 1, or of zeros."""
    matrix = {
        "random": lambda: gaussian(inputs, outputs),
        "rank 2": lambda: gaussian(inputs, 2) @ gaussian(2, outputs, seed=1),
        "rank 1": lambda: gaussian(inputs, 1) @ gaussian(1, outputs, seed=1),
        "zero": lambda: np.zeros((inputs, outputs)),
    }[kind]()
    return matrix / max(np.linalg.norm(matrix, 2), 1e-300)


KINDS = ("random", "rank 2", "rank 1", "zero")
SCALES = (1e-18, 1.0, 1e18)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_orthonormal_to_a_few_roundings_and_span_what_they_came_from(kind):
    for scale in SCALES:
        vectors = jnp.asarray(kernel_of(kind, 4, 50) * scale, jnp.float32)
        rows = np.asarray(small.orthonormal_rows(vectors), np.float64)
        np.testing.assert_allclose(rows @ rows.T, np.eye(4), atol=4 * EPS)
        exact = np.asarray(vectors, np.float64)
        outside = exact - exact @ rows.T @ rows
        assert np.linalg.norm(outside) <= 8 * EPS * np.linalg.norm(exact)


def test_rows_of_very_different_lengths_are_orthonormal():
    vectors = gaussian(4, 30) * np.asarray([1e30, 1.0, 1e-30, 1e-38])[:, None]
    rows = np.asarray(small.orthonormal_rows(jnp.asarray(vectors, jnp.float32)), np.float64)
    np.testing.assert_allclose(rows @ rows.T, np.eye(4), atol=4 * EPS)


def test_as_many_rows_as_there_are_axes_are_a_whole_basis():
    rows = np.asarray(small.orthonormal_rows(jnp.ones((5, 5))), np.float64)
    np.testing.assert_allclose(rows @ rows.T, np.eye(5), atol=4 * EPS)


def test_nan_stays_nan():
    assert np.isnan(small.orthonormal_rows(jnp.ones((3, 5)).at[1, 2].set(jnp.nan))[1:]).all()
    assert np.isnan(small.eigenvectors(jnp.eye(3).at[0, 0].set(jnp.nan))).any()


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8, 16])
def test_eigenvectors_are_those_of_float64(size):
    factors = gaussian(20, size, 2 * size)
    matrices = jnp.asarray(factors @ np.swapaxes(factors, 1, 2), jnp.float32)
    vectors = np.asarray(jax.vmap(small.eigenvectors)(matrices), np.float64)
    exact = np.asarray(matrices, np.float64)
    np.testing.assert_allclose(np.swapaxes(vectors, 1, 2) @ vectors - np.eye(size), 0, atol=10 * EPS)
    turned = np.swapaxes(vectors, 1, 2) @ exact @ vectors
    values = np.linalg.eigvalsh(exact)[:, ::-1]
    expected = values[:, :, None] * np.eye(size)
    np.testing.assert_allclose((turned - expected) / values[:, :1, None], 0, atol=10 * EPS)


@pytest.mark.parametrize("matrix", [np.zeros((4, 4)), np.eye(4), np.ones((4, 4)), np.diag([1.0, 3.0, 2.0, 0.0])])
def test_eigenvectors_of_equal_and_zero_eigenvalues_are_orthonormal(matrix):
    vectors = np.asarray(small.eigenvectors(jnp.asarray(matrix, jnp.float32)), np.float64)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(4), atol=4 * EPS)
    values = np.linalg.eigvalsh(matrix)[::-1]
    np.testing.assert_allclose(vectors.T @ matrix @ vectors, np.diag(values), atol=8 * EPS)


def stepped(kernel, steps):
    """The step after some steps of a block of four from vectors that have nothing to do with the kernel."""
    block = jnp.asarray(np.linalg.qr(gaussian(kernel.shape[1], 4, seed=3))[0].T, jnp.float32)
    step = spectral.power_step(kernel, block[0], block[1:])
    for _ in range(steps - 1):
        step = spectral.power_step(kernel, step.u, step.basis)
    return step


def test_a_block_of_stacked_kernels_of_any_scale_finds_their_norms():
    kernels = np.stack([kernel_of(kind, 12, 8) * scale for kind in KINDS for scale in SCALES])
    steps = jax.jit(jax.vmap(lambda kernel: stepped(kernel, 40)))(jnp.asarray(kernels, jnp.float32))
    exact = np.linalg.norm(np.asarray(kernels, np.float32).astype(np.float64), 2, axis=(1, 2))
    np.testing.assert_allclose(steps.sigma, exact, rtol=2e-6)
    left = np.linalg.norm(np.asarray(steps.v, np.float64), axis=-1)
    np.testing.assert_allclose(left, 1.0, atol=4 * EPS)


def with_lapack(kernel, block):
    """The step by QR and an eigenproblem of NumPy in float32, as LAPACK computes it."""
    left = np.linalg.qr(kernel @ block.T)[0]
    rows = left.T @ kernel
    rows = np.linalg.eigh(rows @ rows.T)[1][:, ::-1].T @ rows
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / lengths, lengths[0, 0]


def test_sigma_follows_a_moving_kernel_as_closely_as_with_lapack():
    kernel = gaussian(96, 64)
    block = np.linalg.svd(kernel)[2][:4].astype(np.float32)
    other = block
    step = jax.jit(spectral.power_step)
    errors, errors_of_lapack = [], []
    for i in range(60):
        kernel = kernel + 0.01 * gaussian(96, 64, seed=i + 10)
        matrix, exact = kernel.astype(np.float32), np.linalg.norm(kernel, 2)
        found = step(matrix, block[0], block[1:])
        block = np.concatenate([found.u[None], found.basis])
        other, sigma = with_lapack(matrix, other)
        errors.append(abs(float(found.sigma) / exact - 1))
        errors_of_lapack.append(abs(float(sigma) / exact - 1))
    print(f"error of sigma after 60 steps: {errors[-1]:.3g}, with LAPACK {errors_of_lapack[-1]:.3g}")
    assert errors[-1] <= 1.05 * errors_of_lapack[-1] + 4 * EPS
    assert max(errors) <= 1.05 * max(errors_of_lapack) + 4 * EPS
