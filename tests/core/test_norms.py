"""Norms and leading singular vectors, against NumPy's SVD in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sigmarep.core import norms


def gaussian(inputs, outputs):
    return np.random.default_rng(0).normal(size=(inputs, outputs))


def orthogonal(inputs, outputs):
    left, _, right = np.linalg.svd(gaussian(inputs, outputs), full_matrices=False)
    return left @ right


def low_rank(inputs, outputs):
    return gaussian(inputs, 2) @ gaussian(2, outputs)


def decaying(inputs, outputs):
    left, values, right = np.linalg.svd(gaussian(inputs, outputs), full_matrices=False)
    return left * 0.5 ** np.arange(len(values)) @ right


KINDS = (gaussian, orthogonal, low_rank, decaying)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 4), (7, 5), (5, 7), (64, 192), (300, 3), (256, 384), (600, 200)])
def test_the_leading_vector_is_that_of_the_svd(kind, shape):
    matrix = kind(*shape).astype(np.float32)
    expected = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)[0]
    (u,), sigma = norms.leading_vectors(jnp.asarray(matrix))
    u = np.asarray(u, np.float64)
    np.testing.assert_allclose(np.linalg.norm(u), 1.0, rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(matrix @ u), expected, rtol=1e-5)
    np.testing.assert_allclose(sigma, expected, rtol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 1e-42, 1e-36, 1e30, 1e36, 3e38])
@pytest.mark.parametrize("shape", [(6, 5), (140, 150)])
def test_the_leading_vectors_of_tiny_huge_and_zero_matrices_are_orthonormal(scale, shape):
    matrix = low_rank(*shape)
    matrix = matrix / np.linalg.norm(matrix, 2) * scale
    rows, sigma = norms.leading_vectors(jnp.asarray(matrix, jnp.float32), 4)
    np.testing.assert_allclose(rows @ rows.T, np.eye(4), atol=1e-5)
    assert np.isfinite(sigma)
    # Below that, entries are partly flushed to zero.
    if scale > 1e-30:
        np.testing.assert_allclose(sigma, scale, rtol=1e-5)


@pytest.mark.parametrize("shape", [(12, 10), (10, 12), (160, 150)])
def test_several_leading_vectors_are_those_of_the_svd(shape):
    matrix = decaying(*shape)
    rows, _ = norms.leading_vectors(jnp.asarray(matrix, jnp.float32), 3)
    expected = np.linalg.svd(matrix)[2][:3]
    np.testing.assert_allclose(np.abs(rows @ expected.T), np.eye(3), atol=2e-3)


@pytest.mark.parametrize("shape", [(1280, 1280), (768, 3072), (3072, 768)])
def test_the_norm_of_large_random_matrices_is_close(shape):
    matrix = np.random.default_rng(2).uniform(-1, 1, size=shape).astype(np.float32)
    (u,), sigma = norms.leading_vectors(jnp.asarray(matrix))
    # The Gram matrix in float64 takes a third of the time of the SVD and costs the norm less than 1e-13.
    exact = matrix.astype(np.float64)
    products = exact @ exact.T if shape[0] < shape[1] else exact.T @ exact
    expected = np.sqrt(np.linalg.eigvalsh(products)[-1])
    image = np.linalg.norm(exact @ np.asarray(u, np.float64))
    assert expected * (1 - 1e-5) <= sigma <= expected * (1 + 2e-6)
    assert expected * (1 - 1e-5) <= image <= expected * (1 + 2e-6)


@pytest.mark.parametrize("shape", [(300, 400), (400, 300)])
@pytest.mark.parametrize("rank", [1, 8, 12, 40])
@pytest.mark.parametrize("rest", [0.0, 1e-6, 1e-2])
def test_the_norm_is_close_where_the_space_of_the_iteration_ends_within_a_block(shape, rank, rest):
    rng = np.random.default_rng(rank)
    left, right = (np.linalg.qr(rng.normal(size=(side, rank)))[0] for side in shape)
    matrix = ((left * np.linspace(1, 0.9, rank)) @ right.T + rest / 40 * rng.normal(size=shape)).astype(np.float32)
    expected = np.linalg.norm(matrix.astype(np.float64), 2)
    rows, sigma = norms.leading_vectors(jnp.asarray(matrix), 4)
    np.testing.assert_allclose(sigma, expected, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(matrix @ np.asarray(rows[0], np.float64)), expected, rtol=1e-5)
    np.testing.assert_allclose(rows @ rows.T, np.eye(4), atol=1e-5)


@pytest.mark.parametrize("shape", [(20, 30), (140, 150), (150, 140)])
def test_leading_vectors_of_stacked_matrices_are_those_of_each(shape):
    stack = jnp.asarray(np.stack([gaussian(*shape), orthogonal(*shape), low_rank(*shape)]), jnp.float32)
    rows, sigma = jax.vmap(functools.partial(norms.leading_vectors, vectors=2))(stack)
    for i, matrix in enumerate(stack):
        np.testing.assert_allclose(sigma[i], np.linalg.norm(np.asarray(matrix, np.float64), 2), rtol=1e-5)
        assert rows[i].shape == (2, shape[1])


def test_no_program_of_a_start_calls_lapack():
    for shape in ((64, 192), (256, 384)):
        text = jax.jit(norms.leading_vectors, static_argnums=1).lower(jnp.zeros(shape), 4).as_text()
        assert "lapack" not in text.lower()
        assert "custom_call" not in text


def test_product_norm_equals_the_svd_of_the_product():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 3, 20, 4)).astype(np.float32)
    expected = [np.linalg.norm(a.astype(np.float64) @ b.T, 2) for a, b in zip(first, second, strict=True)]
    np.testing.assert_allclose(norms.product_norm(norms.gram(first), norms.gram(second)), expected, rtol=1e-5)
    assert np.all(norms.product_norm(norms.gram(0 * first), norms.gram(second)) == 0)


@pytest.mark.parametrize("scale", [1e-18, 1e18])
def test_product_norm_of_tiny_and_huge_matrices(scale):
    first, second = np.random.default_rng(0).normal(size=(2, 20, 4)).astype(np.float32)
    found = norms.product_norm(norms.gram(scale * first), norms.gram(scale * second))
    np.testing.assert_allclose(found / scale**2, np.linalg.norm(first.astype(np.float64) @ second.T, 2), rtol=1e-5)


@pytest.mark.parametrize("seed", range(8))
def test_product_norm_with_one_more_row_equals_the_svd_of_the_product(seed):
    rng = np.random.default_rng(seed)
    first, second = rng.normal(size=(2, 3, 20, 4)).astype(np.float32)
    rows = rng.normal(size=(2, 3, 1, 4)).astype(np.float32)
    # Of any size beside the matrix: none, ordinary, far larger, alone.
    rows[:, 0], rows[:, 2] = 0.0, 1e6 * rows[:, 2]
    for factor in (1.0, 0.0):
        left, right = factor * first, factor * second
        pairs = [(left, right), (np.concatenate([left, rows[0]], axis=1), np.concatenate([right, rows[1]], axis=1))]
        pairs = [(a.astype(np.float64), b.astype(np.float64)) for a, b in pairs]
        expected = np.asarray([np.linalg.norm(a @ np.swapaxes(b, 1, 2), 2, axis=(1, 2)) for a, b in pairs])
        factors = np.asarray([np.linalg.norm(a, 2, axis=(1, 2)) * np.linalg.norm(b, 2, axis=(1, 2)) for a, b in pairs])
        found = norms.product_norm(norms.gram(left, rows[0]), norms.gram(right, rows[1]))
        # Two rows that count alone may be nearly orthogonal: their inner product is then small beside what is rounded.
        rounding = 6e-8 * (factors / np.where(expected > 0, expected, 1.0)) ** 2
        assert np.all(abs(found - expected) <= (2e-6 + rounding) * expected)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("tokens", "width"), [(6, 64), (40, 64), (64, 24)])
@pytest.mark.parametrize("with_column", [False, True])
def test_the_norm_of_sequences_is_close_whichever_matrix_it_is_taken_of(dtype, tokens, width, with_column):
    rng = np.random.default_rng(0)
    # With a common part, as sequences have it, and without any.
    x = jnp.asarray(rng.normal(size=(4, tokens, width)) + np.asarray([0.0, 0.3, 1.0, 5.0])[:, None, None], dtype)
    column = jnp.ones((4, tokens), dtype).at[:, -2:].set(0) if with_column else None
    exact = np.asarray(x, np.float64)
    if with_column:
        exact = np.concatenate([exact, np.asarray(column, np.float64)[..., None]], axis=-1)
    exact = np.linalg.norm(exact, 2, axis=(1, 2))
    found = np.asarray(norms.sequence_norm(x, column), np.float64)
    assert np.all(found <= exact * (1 + 1e-6))
    assert np.all(found >= exact * 0.99)
    np.testing.assert_allclose(found[2:], exact[2:], rtol=1e-6)


def test_the_norm_from_below_is_exact_with_a_gap_and_never_above():
    rng = np.random.default_rng(0)
    stack = rng.normal(size=(5, 40, 12)).astype(np.float32)
    stack[0] += 3.0
    stack[1] *= 1e20
    stack[2] = 0.0
    stack[3] *= 1e-25
    exact = np.linalg.norm(stack.astype(np.float64), 2, axis=(1, 2))
    found = np.asarray(norms.norm_from_below(jnp.asarray(stack)), np.float64)
    np.testing.assert_allclose(found[0], exact[0], rtol=1e-6)
    assert found[2] == 0
    assert np.all(found <= exact * (1 + 1e-6))
    assert np.all(found >= exact * 0.995)


def test_the_norm_from_below_is_exact_for_a_low_rank_and_close_without_a_gap():
    rng = np.random.default_rng(1)
    low = rng.normal(size=(4, 50, 3)) @ rng.normal(size=(4, 3, 30))
    wide = rng.normal(size=(4, 96, 384))
    for matrices, least in ((low, 1 - 1e-6), (wide, 0.94)):
        exact = np.linalg.norm(matrices, 2, axis=(1, 2))
        found = np.asarray(norms.norm_from_below(jnp.asarray(matrices, jnp.float32), iterations=5), np.float64)
        assert np.all(found >= exact * least)
        assert np.all(found <= exact * (1 + 1e-6))
    # In two dimensions the second iteration has all there is.
    plane = jnp.asarray([[3.0, 1.0], [1.0, 3.0 - 1e-3]])
    np.testing.assert_allclose(
        norms.norm_from_below(plane, iterations=2), np.linalg.norm(np.asarray(plane, np.float64), 2), rtol=1e-6
    )


@pytest.mark.parametrize("wave", [0.0, 1.0, 2.0])
def test_the_norm_from_below_finds_a_direction_that_most_of_its_starts_miss(wave):
    rows = np.arange(1000.0)
    rng = np.random.default_rng(0)
    left = np.cos(wave * rows) / np.linalg.norm(np.cos(wave * rows))
    matrix = 8.0 * left[:, None] * np.eye(16)[0] + 0.15 * rng.normal(size=(1000, 16))
    found = norms.norm_from_below(jnp.asarray(matrix, jnp.float32), iterations=5)
    np.testing.assert_allclose(found, np.linalg.norm(matrix, 2), rtol=1e-2)
