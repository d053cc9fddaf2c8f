"""σReparam on arrays, against NumPy's SVD, float64 formulas and automatic differentiation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sigmarep.core import norms, spectral


def random_matrix(inputs, outputs, seed=0):
    return np.random.default_rng(seed).normal(size=(inputs, outputs)).astype(np.float32)


def leading_vector(kernel):
    return norms.leading_vectors(kernel)[0][0]


def plain(kernel, gamma, u):
    """The formula of the paper, written once more and left to automatic differentiation; u and v are constants."""
    matrix = kernel.reshape(-1, u.size)
    v = jax.lax.stop_gradient(matrix @ u)
    v = v / jnp.linalg.norm(v)
    u = jax.lax.stop_gradient(matrix.T @ v)
    u = u / jnp.linalg.norm(u)
    return gamma / (v @ matrix @ u) * kernel


def test_power_step_equals_float64():
    matrix = random_matrix(9, 6)
    u = np.random.default_rng(1).normal(size=6)
    u /= np.linalg.norm(u)
    v = matrix.astype(np.float64) @ u
    v /= np.linalg.norm(v)
    z = matrix.astype(np.float64).T @ v
    step = spectral.power_step(jnp.asarray(matrix), jnp.asarray(u, jnp.float32))
    np.testing.assert_allclose(step.v, v, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(step.u, z / np.linalg.norm(z), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(step.sigma, np.linalg.norm(z), rtol=1e-6)


def test_repeated_steps_reach_the_svd():
    matrix = jnp.asarray(random_matrix(12, 8))
    u = jnp.ones(8) / np.sqrt(8)
    for _ in range(200):
        _, u, sigma, _ = spectral.power_step(matrix, u)
    np.testing.assert_allclose(sigma, np.linalg.norm(matrix, 2), rtol=1e-5)


def test_matrix_view_takes_all_output_axes():
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(16, 4, 8)), jnp.float32)
    view = spectral.matrix_view(kernel, 32)
    assert view.shape == (16, 32)
    np.testing.assert_allclose(spectral.spectral_norm(view), np.linalg.norm(kernel.reshape(16, 32), 2), rtol=1e-5)
    assert spectral.matrix_view(jnp.zeros((3, 3, 5, 7)), 7).shape == (45, 7)
    with pytest.raises(ValueError, match="no trailing axes"):
        spectral.matrix_view(kernel, 5)


@pytest.mark.parametrize("shape", [(6, 4), (4, 2, 3)])
def test_first_derivatives_equal_the_formula(shape):
    rng = np.random.default_rng(3)
    kernel = jnp.asarray(rng.normal(size=shape), jnp.float32)
    outputs = int(np.prod(shape[1:]))
    u = jnp.asarray(rng.normal(size=outputs), jnp.float32)
    u = u / jnp.linalg.norm(u)
    target = jnp.asarray(rng.normal(size=shape), jnp.float32)

    def loss(function):
        return lambda k, g: jnp.sum(jnp.sin(function(k, g, u)) * target)

    ours = jax.grad(loss(lambda k, g, u: spectral.reparametrize(k, g, u).kernel), (0, 1))(kernel, jnp.float32(0.7))
    reference = jax.grad(loss(plain), (0, 1))(kernel, jnp.float32(0.7))
    np.testing.assert_allclose(ours[0], reference[0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(ours[1], reference[1], rtol=1e-5)


def test_gradient_equals_autodiff_through_the_svd_at_convergence():
    kernel = jnp.asarray(random_matrix(10, 7))
    target = jnp.asarray(random_matrix(10, 7, seed=5))
    u = leading_vector(kernel)
    for _ in range(300):
        u = spectral.power_step(kernel, u).u

    def exact(k, g):
        return jnp.sum(jnp.tanh(g / jnp.linalg.svd(k, full_matrices=False)[1][0] * k) * target)

    def ours(k, g):
        return jnp.sum(jnp.tanh(spectral.reparametrize(k, g, u).kernel) * target)

    for a, b in zip(
        jax.grad(ours, (0, 1))(kernel, jnp.float32(1.3)),
        jax.grad(exact, (0, 1))(kernel, jnp.float32(1.3)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-6)


def test_gradient_is_orthogonal_to_the_kernel_from_any_u():
    kernel = jnp.asarray(random_matrix(8, 8))
    target = jnp.asarray(random_matrix(8, 8, seed=2))
    u = jnp.ones(8) / np.sqrt(8)
    grad = jax.grad(lambda k: jnp.sum(spectral.reparametrize(k, jnp.float32(2.0), u).kernel * target))(kernel)
    cosine = jnp.vdot(grad, kernel) / (jnp.linalg.norm(grad) * jnp.linalg.norm(kernel))
    assert abs(cosine) < 1e-6


@pytest.mark.parametrize("vectors", [1, 3])
def test_several_steps_are_that_many_calls_and_the_last_one_has_the_gradient(vectors):
    rng = np.random.default_rng(7)
    kernel, cotangent = (jnp.asarray(rng.normal(size=(6, 4)), jnp.float32) for _ in range(2))
    block = np.linalg.qr(rng.normal(size=(4, vectors)))[0].T.astype(np.float32)
    start = {"u": jnp.asarray(block[0]), "basis": jnp.asarray(block[1:]) if vectors > 1 else None}

    def loss(kernel, u, basis, steps):
        result = spectral.reparametrize(kernel, jnp.float32(1.7), u, basis=basis, steps=steps)
        return jnp.sum(result.kernel * cotangent), result

    (_, several), gradient = jax.value_and_grad(loss, has_aux=True)(kernel, start["u"], start["basis"], 3)
    single = start
    for _ in range(2):
        _, result = loss(kernel, single["u"], single["basis"], 1)
        single = {"u": result.u, "basis": result.basis}
    (_, last), expected = jax.value_and_grad(loss, has_aux=True)(kernel, single["u"], single["basis"], 1)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), several, last)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)


def test_with_sigma_as_a_constant_the_gradient_is_that_of_a_scaled_kernel():
    rng = np.random.default_rng(8)
    kernel, cotangent = (rng.normal(size=(5, 3)) for _ in range(2))
    u = rng.normal(size=3)
    u /= np.linalg.norm(u)
    gamma = -0.6

    def loss(kernel, gamma):
        result = spectral.reparametrize(kernel, gamma, jnp.asarray(u, jnp.float32), through_sigma=False)
        return jnp.sum(result.kernel * cotangent), result

    arguments = jnp.asarray(kernel, jnp.float32), jnp.float32(gamma)
    (_, result), (by_kernel, by_gamma) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(*arguments)
    v = kernel @ u
    sigma = np.linalg.norm(kernel.T @ (v / np.linalg.norm(v)))
    np.testing.assert_allclose(result.kernel, gamma / sigma * kernel, rtol=1e-5)
    np.testing.assert_allclose(result.sigma, sigma, rtol=1e-6)
    np.testing.assert_allclose(by_kernel, gamma / sigma * cotangent, rtol=1e-5)
    np.testing.assert_allclose(by_gamma, np.sum(cotangent * kernel) / sigma, rtol=1e-5)


def test_effective_norm_is_gamma():
    kernel = jnp.asarray(random_matrix(20, 30))
    u = leading_vector(kernel)
    effective = spectral.reparametrize(kernel, jnp.float32(-1.7), u).kernel
    np.testing.assert_allclose(np.linalg.norm(effective, 2), 1.7, rtol=1e-5)


def test_hessian_vector_products_agree_in_both_orders_and_with_the_formula():
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.normal(size=(5, 4)), jnp.float32)
    direction = jnp.asarray(rng.normal(size=(5, 4)), jnp.float32)
    target = jnp.asarray(rng.normal(size=(5, 4)), jnp.float32)
    gamma = jnp.float32(0.8)
    u = jnp.ones(4) / 2.0
    step = spectral.power_step(kernel, u)

    def fixed(k):
        return jnp.sum(jnp.tanh(gamma / (step.v @ k @ step.u) * k) * target)

    def ours(k):
        return jnp.sum(jnp.tanh(spectral.reparametrize(k, gamma, u).kernel) * target)

    expected = jax.jvp(jax.grad(fixed), (kernel,), (direction,))[1]
    forward = jax.jvp(jax.grad(ours), (kernel,), (direction,))[1]
    reverse = jax.grad(lambda k: jnp.vdot(jax.grad(ours)(k), direction))(kernel)
    np.testing.assert_allclose(forward, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(reverse, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", [0.0, 1e-42, 1e-36, 1e-30, 1e-15, 1e15, 1e30, 1e35])
@pytest.mark.parametrize("rank", [1, 4])
def test_tiny_huge_zero_and_rank_deficient_kernels_stay_finite(scale, rank):
    rng = np.random.default_rng(0)
    base = rng.normal(size=(6, rank)) @ rng.normal(size=(rank, 5))
    kernel = jnp.asarray(base / np.linalg.norm(base, 2) * scale, jnp.float32)
    (u,), sigma = norms.leading_vectors(kernel)
    result = spectral.reparametrize(kernel, jnp.float32(1.0), u)
    if scale > 1e-35:
        np.testing.assert_allclose(sigma, scale, rtol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(result.kernel, 2), 1.0, rtol=1e-4)
    gradients = jax.grad(lambda k, g: jnp.sum(spectral.reparametrize(k, g, u).kernel), (0, 1))(kernel, jnp.float32(1.0))
    for leaf in jax.tree.leaves((u, sigma, result, gradients)):
        assert np.all(np.isfinite(leaf))


def test_a_zero_kernel_receives_a_gradient_and_then_normalises():
    kernel, u = jnp.zeros((4, 3)), leading_vector(jnp.zeros((4, 3)))
    grad = jax.grad(lambda k: jnp.sum(spectral.reparametrize(k, jnp.float32(1.0), u).kernel))(kernel)
    assert np.all(grad == 1.0)
    result = spectral.reparametrize(kernel - 0.1 * grad, jnp.float32(1.0), u)
    np.testing.assert_allclose(np.linalg.norm(result.kernel, 2), 1.0, rtol=1e-5)


def test_u_in_the_null_space_recovers():
    kernel = jnp.zeros((4, 3)).at[:, 0].set(jnp.asarray([1.0, 2.0, 0.5, 1.0]))
    step = spectral.power_step(kernel, jnp.asarray([0.0, 1.0, 0.0]))
    np.testing.assert_allclose(spectral.power_step(kernel, step.u).sigma, np.linalg.norm(kernel, 2), rtol=1e-6)


def test_a_bfloat16_kernel_is_normalised_in_float32():
    kernel = jnp.asarray(random_matrix(64, 64))
    u = leading_vector(kernel)
    full = spectral.reparametrize(kernel, jnp.float32(1.0), u)
    half = spectral.reparametrize(kernel, jnp.float32(1.0), u, dtype=jnp.bfloat16)
    assert half.kernel.dtype == jnp.bfloat16
    assert half.sigma.dtype == jnp.float32
    np.testing.assert_array_equal(full.sigma, half.sigma)
    np.testing.assert_array_equal(full.u, half.u)


def test_the_backward_pass_saves_one_array_of_the_kernels_size():
    kernel = jnp.asarray(random_matrix(256, 256))
    u = leading_vector(kernel)
    _, pullback = jax.vjp(lambda k, g: spectral.reparametrize(k, g, u).kernel, kernel, jnp.float32(1.0))
    large = [leaf for leaf in jax.tree.leaves(pullback) if getattr(leaf, "size", 0) == kernel.size]
    assert len(large) == 1


def test_weight_normalisation_gives_each_output_its_gain():
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(6, 2, 3)), jnp.float32)
    gain = jnp.arange(1.0, 7.0)
    effective = spectral.weight_normalized(kernel, gain).reshape(6, 6)
    np.testing.assert_allclose(np.linalg.norm(effective, axis=0), gain, rtol=1e-6)
    gradient = jax.grad(lambda k: jnp.sum(spectral.weight_normalized(k, gain)))(jnp.zeros((6, 2, 3)))
    assert np.all(np.isfinite(gradient))
