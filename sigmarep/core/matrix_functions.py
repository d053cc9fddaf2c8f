"""Functions of the singular values of matrices, by products alone.

LAPACK is avoided, as in `sigmarep.core.norms`, which says why.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

# Coefficients of x, x³ and x⁵. The first polynomial (Jordan et al., 2024) grows small singular values by 3.4 and leads
# those below 1 into 0.68 to 1.13; the second, Newton and Schulz's of fifth order, from there to 1 within 1e-6.
GROWTH, POLISH = (3.4445, -4.7750, 2.0315), (15 / 8, -10 / 8, 3 / 8)
GROWTH_STEPS, POLISH_STEPS = 8, 3

_product = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


def polar_factor(matrix: jax.Array) -> jax.Array:
    """U Vᵀ of the singular value decomposition U S Vᵀ, float32.

    Singular values below 5e-5 of the Frobenius norm become less than 1; zeros stay zeros.

    Args:
      matrix: shape (..., m, n).
    """
    x, is_tall = _wide(matrix.astype(jnp.float32))
    length = jnp.sqrt(jnp.sum(x * x, axis=(-2, -1), keepdims=True))
    x = x / jnp.where(length > 0, length, 1.0)

    def step(x: jax.Array, coefficients: tuple[float, float, float]) -> jax.Array:
        a, b, c = coefficients
        gram = _product(x, _transposed(x))
        return a * x + _product(b * gram + c * _product(gram, gram), x)

    x = lax.fori_loop(0, GROWTH_STEPS, lambda _, x: step(x, GROWTH), x)
    x = lax.fori_loop(0, POLISH_STEPS, lambda _, x: step(x, POLISH), x)
    return _transposed(x) if is_tall else x


def softly_clipped(matrix: jax.Array, bound: jax.Array | float, *, iterations: int = 16) -> jax.Array:
    """(I + X Xᵀ/c²)^-½ X, float32: every singular value s of X becomes s / √(1 + s²/c²), which is below c.

    The root comes from Newton and Schulz's coupled iteration (Higham, 2008, "Functions of matrices", 6.35), each step of
    which multiplies the smallest eigenvalue by up to 9/4: 16 of them resolve singular values of 300 c.

    Args:
      matrix: X, shape (..., m, n).
      bound: c, broadcastable to (..., 1, 1).
    """
    x, is_tall = _wide(matrix.astype(jnp.float32))
    scaled = x / bound
    gram = _product(scaled, _transposed(scaled))
    identity = jnp.eye(gram.shape[-1])
    # No eigenvalue is above it.
    largest = 1.0 + jnp.sqrt(jnp.sum(gram * gram, axis=(-2, -1), keepdims=True))

    def step(_: int, pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        root, inverse = pair
        factor = 1.5 * identity - 0.5 * _product(inverse, root)
        return _product(root, factor), _product(factor, inverse)

    start = (identity + gram) / largest
    _, inverse = lax.fori_loop(0, iterations, step, (start, jnp.broadcast_to(identity, start.shape)))
    y = _product(inverse, x) / jnp.sqrt(largest)
    return _transposed(y) if is_tall else y


def _wide(x: jax.Array) -> tuple[jax.Array, bool]:
    """x or its transpose, whichever has the smaller side first, and True for the transpose."""
    is_tall = x.shape[-2] > x.shape[-1]
    return (_transposed(x) if is_tall else x), is_tall


def _transposed(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, -1, -2)
