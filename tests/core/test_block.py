"""Block power iteration: the same derivatives, and a σ that is followed where one vector lags."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sigmarep.core import norms, spectral


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def start(matrix, vectors, seed=1):
    """Orthonormal rows that have nothing to do with `matrix`."""
    rows = np.linalg.qr(np.random.default_rng(seed).normal(size=(matrix.shape[1], vectors)))[0].T
    return jnp.asarray(rows[0], jnp.float32), jnp.asarray(rows[1:], jnp.float32)


def reference(matrix, block):
    """The step in float64: Ritz values and right Ritz vectors of span(W Uᵀ), by an SVD instead of an eigenproblem."""
    matrix, block = np.asarray(matrix, np.float64), np.asarray(block, np.float64)
    left = np.linalg.qr(matrix @ block.T)[0]
    _, values, right = np.linalg.svd(left.T @ matrix, full_matrices=False)
    return values, right


@pytest.mark.parametrize(("shape", "vectors"), [((9, 6), 2), ((6, 9), 4), ((5, 5), 5), ((40, 30), 4)])
def test_a_step_equals_float64(shape, vectors):
    matrix = random(*shape)
    u, basis = start(matrix, vectors)
    step = spectral.power_step(matrix, u, basis)
    values, right = reference(matrix, jnp.concatenate([u[None], basis]))
    np.testing.assert_allclose(step.sigma, values[0], rtol=1e-5)
    for found, expected in zip(np.concatenate([step.u[None], step.basis]), right, strict=True):
        np.testing.assert_allclose(abs(found @ expected), 1.0, rtol=1e-4)
    np.testing.assert_allclose(step.v @ matrix @ step.u, step.sigma, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(step.v), 1.0, rtol=1e-5)


def test_sigma_never_exceeds_the_norm_and_a_block_is_nearer_to_it():
    matrix = random(50, 40)
    exact = np.linalg.norm(np.asarray(matrix, np.float64), 2)
    u, basis = start(matrix, 4)
    one = block = None
    for _ in range(15):
        one = spectral.power_step(matrix, u if one is None else one.u)
        block = spectral.power_step(matrix, *((u, basis) if block is None else (block.u, block.basis)))
        assert one.sigma <= exact * (1 + 1e-6)
        assert block.sigma <= exact * (1 + 1e-6)
    assert exact - block.sigma < 0.1 * (exact - one.sigma)


def test_a_block_follows_when_the_leading_vectors_change_places():
    u1, s, vt = np.linalg.svd(np.random.default_rng(0).normal(size=(12, 10)), full_matrices=False)
    errors = {}
    for vectors in (1, 4):
        u, basis = vt[0].astype(np.float32), vt[1:vectors].astype(np.float32) if vectors > 1 else None
        worst = 0.0
        for t in np.linspace(0, 1, 40):
            values = s.copy()
            values[0], values[1] = s[0] * (1.2 - 0.4 * t), s[0] * (0.8 + 0.4 * t)
            matrix = jnp.asarray(u1 * values @ vt, jnp.float32)
            step = spectral.power_step(matrix, u, basis)
            u, basis = step.u, step.basis
            worst = max(worst, 1 - float(step.sigma) / values.max())
        errors[vectors] = worst
    assert errors[1] > 0.1
    assert errors[4] < 1e-4


def test_derivatives_of_both_orders_hold_u_and_v_fixed():
    kernel, direction, target = random(6, 5), random(6, 5, seed=2), random(6, 5, seed=3)
    gamma = jnp.float32(0.8)
    u, basis = start(kernel, 3)
    step = spectral.power_step(kernel, u, basis)

    def fixed(k, g):
        return jnp.sum(jnp.tanh(g / (step.v @ k @ step.u) * k) * target)

    def ours(k, g):
        return jnp.sum(jnp.tanh(spectral.reparametrize(k, g, u, basis=basis).kernel) * target)

    for a, b in zip(jax.grad(ours, (0, 1))(kernel, gamma), jax.grad(fixed, (0, 1))(kernel, gamma), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    expected = jax.jvp(jax.grad(lambda k: fixed(k, gamma)), (kernel,), (direction,))[1]
    forward = jax.jvp(jax.grad(lambda k: ours(k, gamma)), (kernel,), (direction,))[1]
    reverse = jax.grad(lambda k: jnp.vdot(jax.grad(ours)(k, gamma), direction))(kernel)
    np.testing.assert_allclose(forward, expected, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(reverse, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 1e-42, 1e-30, 1e30, 1e35])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_tiny_huge_zero_and_rank_deficient_kernels_stay_finite(scale, rank):
    rng = np.random.default_rng(0)
    base = rng.normal(size=(6, rank)) @ rng.normal(size=(rank, 5))
    kernel = jnp.asarray(base / np.linalg.norm(base, 2) * scale, jnp.float32)
    block, _ = norms.leading_vectors(kernel, 3)
    arguments = {"basis": block[1:]}
    result = spectral.reparametrize(kernel, jnp.float32(1.0), block[0], **arguments)
    if scale > 1e-35:
        np.testing.assert_allclose(np.linalg.norm(result.kernel, 2), 1.0, rtol=1e-4)
    again = spectral.reparametrize(kernel, jnp.float32(1.0), result.u, basis=result.basis)
    gradients = jax.grad(lambda k, g: jnp.sum(spectral.reparametrize(k, g, block[0], **arguments).kernel), (0, 1))(
        kernel, jnp.float32(1.0)
    )
    for leaf in jax.tree.leaves((result, again, gradients)):
        assert np.all(np.isfinite(leaf))
