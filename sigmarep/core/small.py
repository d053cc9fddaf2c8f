"""Orthonormal bases of a few vectors and eigenvectors of small symmetric matrices, by products alone.

The power step on a block of vectors needs both in every training step. LAPACK is avoided for the reasons that
`sigmarep.core.norms` gives.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# A remainder below this share of its vector is mostly rounding.
DEPENDENT = 1e-5


def divisor(x: jax.Array) -> jax.Array:
    """The largest magnitude in `x`, shape (); 1 for zeros. What is divided by it has squares without overflow."""
    largest = jnp.max(jnp.abs(x))
    return jnp.where(largest > 0, largest, 1.0)


def unit(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns x/‖x‖ and ‖x‖ without overflow or underflow of the squares; a zero vector stays zero."""
    scale = divisor(x)
    x = x / scale
    norm = jnp.sqrt(jnp.sum(x * x))
    return x / jnp.where(norm > 0, norm, 1.0), norm * scale


def next_row(row: jax.Array, rows: jax.Array) -> jax.Array:
    """The unit vector along the part of `row` (n,) that is orthogonal to `rows`, any such vector if none is.

    Gram-Schmidt, twice, because rounding leaves some of the rows in the vector the first time (Giraud et al., 2005). NaN
    stays NaN.

    Args:
      row: its squares neither overflow nor underflow float32.
      rows: shape (k, n), k < n, orthonormal or zeros.
    """
    product = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    # The axis that the rows cover least has a part of a square of at least 1 − k/n that is orthogonal to them.
    axis = jnp.argmin(jnp.sum(rows * rows, axis=0)) if len(rows) else 0
    both = jnp.stack([row, jnp.where(jnp.arange(row.size) == axis, 1.0, 0.0)])
    parts = both
    for _ in range(2 if len(rows) else 0):
        parts = parts - product(product(parts, rows.T), rows)
    before, after = (jnp.sqrt(jnp.sum(x * x, axis=1, keepdims=True)) for x in (both, parts))
    own, other = parts / jnp.where(after > 0, after, 1.0)
    chosen: jax.Array = jnp.where(after[0] <= DEPENDENT * before[0], other, own)
    return chosen


def orthonormal_rows(vectors: jax.Array) -> jax.Array:
    """Orthonormal rows, the first i of which span the first i vectors, to a few roundings of float32.

    A vector that is zero or depends on those before it gives some direction orthogonal to these. NaN stays NaN.

    Args:
      vectors: shape (k, n), k ≤ n, float32 of any scale.

    Returns:
      Shape (k, n).
    """
    scaled = vectors / jax.vmap(divisor)(vectors)[:, None]

    def placed(i: jax.Array, rows: jax.Array) -> jax.Array:
        # Rows that are still zero subtract nothing.
        return rows.at[i].set(next_row(scaled[i], rows))

    rows: jax.Array = lax.fori_loop(0, len(scaled), placed, jnp.zeros_like(scaled))
    return rows


def eigenvectors(matrix: jax.Array) -> jax.Array:
    """Eigenvectors of a small symmetric matrix by Jacobi's method (Golub and Van Loan, 2013, section 8.5).

    The k − 1 rounds of a sweep rotate k/2 disjoint pairs of axes each, so that every pair is rotated once. So many sweeps
    leave of random Gram matrices of up to 32 rows only rounding.

    Args:
      matrix: shape (k, k), float32, of squares that do not overflow.

    Returns:
      Shape (k, k): orthonormal columns, largest eigenvalue first.
    """
    size = len(matrix)
    if size == 1:
        return jnp.ones_like(matrix)
    product = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    identity = jnp.eye(size, dtype=jnp.float32)
    sweeps = 2 + (size - 1).bit_length()
    partners = _rounds(size)
    # Of every round: which axes rotate together, as a permutation matrix, and which of both comes first.
    swaps = jnp.asarray(np.eye(size, dtype=np.float32)[partners])
    places = jnp.asarray(np.sign(partners - np.arange(size)), jnp.float32)

    def rotated(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        matrix, vectors = carry
        swap, place = swaps[i % len(swaps)], places[i % len(swaps)]
        diagonal = jnp.sum(matrix * identity, axis=1)
        between = jnp.sum((matrix + matrix.T) * swap, axis=1) * jnp.abs(place)
        gap = product(swap, diagonal) - diagonal
        # tan θ of the smaller rotation that makes both entries between the axes 0; of opposite sign for the partners.
        bottom = jnp.abs(gap) + jnp.sqrt(gap * gap + between * between)
        tangent = between * jnp.where(gap == 0, place, jnp.sign(gap)) / jnp.where(bottom > 0, bottom, 1.0)
        cosine = lax.rsqrt(1 + tangent * tangent)
        rotation = cosine * identity + (tangent * cosine)[:, None] * swap
        return product(rotation.T, product(matrix, rotation)), product(vectors, rotation)

    matrix, vectors = lax.fori_loop(0, sweeps * len(swaps), rotated, (matrix, identity))
    # Dozens of rotations leave several roundings in the lengths.
    vectors = vectors / jnp.sqrt(jnp.sum(vectors * vectors, axis=0))
    ordered: jax.Array = vectors[:, jnp.argsort(-jnp.sum(matrix * identity, axis=1))]
    return ordered


def _rounds(size: int) -> np.ndarray:
    """The partner of every axis in each round of a tournament, (rounds, size); one without has itself."""
    places = list(range(size + size % 2))
    rounds = []
    for _ in range(len(places) - 1):
        partner = list(range(size))
        for a, b in zip(places, reversed(places), strict=True):
            if a < size and b < size:
                partner[a] = b
        rounds.append(partner)
        # The first keeps its place and the others go round.
        places = [places[0], places[-1], *places[1:-1]]
    return np.asarray(rounds).reshape(-1, size)
