"""Norms and leading singular vectors of matrices, by products alone.

LAPACK is avoided: on TPUs a singular value decomposition is slow to compile and to run; on CPUs a batched call of it waits
for threads of the pool that it runs in, so that concurrent calls can deadlock on a machine with two cores (jaxlib 0.10).
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sigmarep.core.small import divisor, next_row, unit

# Smaller sides up to this have a Gram matrix that is cheaper to square than the matrix is to read dozens of times.
GRAM_SIDE = 128
# Lanczos iteration for the start of a layer is on a block of vectors: CPUs multiply eight in little more time than one. It
# makes this many steps and the cube root of the smaller side, because the relative gaps between the largest singular values
# of random matrices shrink with the side's power of -2/3. Of 30 matrices of 1,280 x 5,120 the least favorable one needs 20
# steps for 1e-5, where it needs 28 with four vectors and more than 50 with one.
START_BLOCK = 8
START_ITERATIONS = 10
# With (1 − δ)^(2^17) left of it, a vector whose singular value is smaller by a share δ costs the norm less than 3e-6.
START_SQUARINGS = 17


@functools.partial(jax.jit, static_argnames="vectors")
def leading_vectors(matrix: jax.Array, vectors: int = 1) -> tuple[jax.Array, jax.Array]:
    """Approximates the leading right singular vectors, and ‖W‖₂ as the length of W's product with the first.

    The norm is never above ‖W‖₂ but for rounding, and within 1e-5 of it for random, orthogonal, low-rank, zero, huge and
    tiny matrices whose smaller side is up to 5,120.

    Args:
      matrix: W, shape (inputs, outputs).
      vectors: at most min(inputs, outputs).

    Returns:
      Shapes (vectors, outputs), orthonormal, and ().
    """
    product = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    matrix = matrix.astype(jnp.float32)
    # Divided by it, no entry is above 1, and one is 1 unless all are 0: the lengths below need no care for their squares.
    scale = divisor(matrix)
    inputs, outputs = matrix.shape
    side = min(inputs, outputs)
    candidates: jax.Array | None
    if side > GRAM_SIDE:
        # Vectors are divided by the root before and after a product: by the whole at once they may underflow.
        root = jnp.sqrt(scale)
        steps = min(START_ITERATIONS + math.ceil(side ** (1 / 3)), side // START_BLOCK)
        candidates, gram = _block_krylov(matrix, root, steps)
    else:
        matrix, root = matrix / scale, jnp.ones(())
        candidates = matrix if inputs < outputs else None
        gram = product(matrix.T, matrix) if candidates is None else product(matrix, matrix.T)
    rows = jnp.zeros((0, outputs))
    for i in range(vectors):
        y = _leading_vector(gram, squarings=START_SQUARINGS)[:, 0]
        row = y if candidates is None else product(y, candidates)
        if row.size != outputs:
            # A combination of inputs, which are fewer.
            row = product(row / root, matrix) / root
        rows = jnp.concatenate([rows, next_row(row, rows)[None]])
        if i + 1 < vectors:
            y, _ = unit(y)
            gram = gram - product(y, product(gram, y)) * y[:, None] * y
    image = product(matrix, rows[0] / root) / root
    return rows, jnp.sqrt(jnp.sum(image * image)) * scale


class Gram(NamedTuple):
    """XᵀX of matrices X (..., d, n).

    Attributes:
      matrix: (..., n, n), XᵀX / scale².
      scale: (...), the largest magnitude in X; 1 for zeros.
    """

    matrix: jax.Array
    scale: jax.Array


@jax.jit
def gram(x: jax.Array, row: jax.Array | None = None) -> Gram:
    """Computes Gram matrices in float32.

    Args:
      x: X, shape (..., d, n).
      row: shape (..., 1, n), an extra row of X. The result then has a first axis of two: without the row and with it.
    """
    x = x.astype(jnp.float32)
    parts = [x] if row is None else [x, row.astype(jnp.float32)]
    scale = functools.reduce(jnp.maximum, (_over_matrix(jnp.max, jnp.abs(part)) for part in parts))
    scale = jnp.where(scale > 0, scale, 1.0)
    parts = [part / scale for part in parts]
    each = [jnp.einsum("...dn,...dm->...nm", part, part, precision=lax.Precision.HIGHEST) for part in parts]
    if row is None:
        return Gram(each[0], scale[..., 0, 0])
    return Gram(jnp.stack([each[0], each[0] + each[1]]), jnp.stack([scale[..., 0, 0]] * 2))


@jax.jit
def product_norm(left: Gram, right: Gram) -> jax.Array:
    """Computes ‖A Bᵀ‖₂ of two tall matrices from their Gram matrices.

    ‖A Bᵀ‖₂² is the largest eigenvalue of C = (AᵀA)(BᵀB). Squaring C twelve times isolates its leading eigenvector y, and
    B y is the leading right singular vector of A Bᵀ. The norm of its image is accurate to second order in the remaining
    share of the other vectors: within 1e-4 however close the singular values are. Rounding adds up to
    6e-8 (‖A‖₂‖B‖₂ / ‖A Bᵀ‖₂)².

    Args:
      left, right: of A and of B, shapes (..., n, n).

    Returns:
      Shape (...).
    """
    product = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)

    def square(gram: jax.Array, vector: jax.Array) -> jax.Array:
        """‖X x‖² from XᵀX."""
        return jnp.sum(vector * product(gram, vector), axis=(-2, -1))

    # Gram matrices are scaled to norm 1: a row far larger than the matrix would make the squares overflow float32.
    (first, size), (second, other_size) = _unit_frobenius(left.matrix), _unit_frobenius(right.matrix)
    y = _leading_vector(product(first, second))
    above, below = square(first, product(second, y)), square(second, y)
    # Rounding may leave less than nothing of a product of zero.
    ratio = jnp.where(above < 0, 0.0, above) / jnp.where(below > 0, below, 1.0)
    return jnp.sqrt(ratio * size[..., 0, 0]) * jnp.sqrt(other_size[..., 0, 0]) * (left.scale * right.scale)


def _leading_vector(matrix: jax.Array, *, squarings: int = 12) -> jax.Array:
    """Approximates the leading eigenvector (..., d, 1) of (..., d, d) by squaring it; its length is arbitrary."""

    def squared(_: int, x: jax.Array) -> jax.Array:
        return _unit_frobenius(jnp.matmul(x, x, precision=lax.Precision.HIGHEST))[0]

    power = lax.fori_loop(0, squarings, squared, _unit_frobenius(matrix)[0])
    largest = jnp.argmax(jnp.sum(power * power, axis=-2, keepdims=True), axis=-1, keepdims=True)
    return jnp.sum(jnp.where(jnp.arange(power.shape[-1]) == largest, power, 0.0), axis=-1, keepdims=True)


def sequence_norm(x: jax.Array, column: jax.Array | None = None) -> jax.Array:
    """Computes ‖X‖₂ of sequences by `norm_from_below`.

    A half-precision sequence that is shorter than its width is read once, to form its small Gram matrix, on which the
    iteration then runs: accelerators compute such products fast, and exactly in float32.

    Args:
      x: shape (..., tokens, width).
      column: shape (..., tokens), an extra column of X, of the same type.

    Returns:
      Shape (...).
    """
    tokens, width = x.shape[-2:]
    if x.dtype not in (jnp.bfloat16, jnp.float16) or tokens > width:
        norm: jax.Array = norm_from_below(x if column is None else jnp.concatenate([x, column[..., None]], axis=-1))
        return norm
    gram = jnp.einsum("...td,...sd->...ts", x, x, preferred_element_type=jnp.float32)
    if column is not None:
        column = column.astype(jnp.float32)
        gram = gram + column[..., :, None] * column[..., None, :]
    return jnp.sqrt(norm_from_below(gram, symmetric=True))


@functools.partial(jax.jit, static_argnames=("iterations", "symmetric"))
def norm_from_below(matrix: jax.Array, *, iterations: int = 8, symmetric: bool = False) -> jax.Array:
    """Estimates ‖A‖₂ from below by Lanczos iteration on AᵀA (Golub and Kahan, 1965), without a product of matrices.

    The estimate is exact if the first singular values are well separated, as in sequences of tokens, or if the rank is at
    most `iterations`. For a large random matrix, which has no such gap, it is up to 5 % low after five iterations and 2 %
    after eight. It reads A 2·iterations times.

    Args:
      matrix: shape (..., m, n).
      symmetric: A = Aᵀ has no eigenvalues below zero. Lanczos iteration is on A itself then, which it reads
        iterations + 1 times; of a Gram matrix XᵀX that is as many steps as on X.

    Returns:
      Shape (...).
    """
    basis, images, scale = _krylov(matrix, iterations, symmetric)
    product = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
    y = _leading_vector(product("...in,...jn->...ij", images, images))
    norm, length = (jnp.sqrt(jnp.sum(product("...ki,...kn->...n", y, x) ** 2, axis=-1)) for x in (images, basis))
    return norm / jnp.where(length > 0, length, 1.0) * scale


def _krylov(matrix: jax.Array, iterations: int, symmetric: bool = False) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Orthonormal rows that span a Krylov space of AᵀA, or of a symmetric A, and their images under A.

    Args:
      matrix: A, shape (..., m, n).
      iterations: k. From where the space does not grow the rows are zeros.

    Returns:
      Shapes (..., k, n), (..., k, m) and (...): what the images are to be multiplied by.
    """
    matrix = matrix.astype(jnp.float32)
    # By default accelerators round products to TF32 or bfloat16.
    product = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)

    # Starts from a fixed mix of the rows: their mean plus some waves. The longest row would be a worse start: after a
    # LayerNorm all rows have one length, and rounding would choose. Several starts would cost products of matrices.
    waves = jnp.cos(jnp.arange(4.0)[:, None] * jnp.arange(matrix.shape[-2], dtype=jnp.float32))
    mix = product("...mn,m->...n", matrix, jnp.sum(waves, axis=0))
    # Vectors are scaled instead of A: a scaled or transposed copy would cost a write and another read of A, and finding
    # its largest element one more read.
    largest = jnp.max(jnp.abs(mix), axis=-1)
    scale = jnp.where(largest > 0, largest, 1.0)

    def image_of(row: jax.Array) -> jax.Array:
        return product("...mn,...n->...m", matrix, row) / scale[..., None]

    def row_of(image: jax.Array) -> jax.Array:
        return product("...mn,...m->...n", matrix, image) / scale[..., None]

    def unit_row(row: jax.Array, least: jax.Array | float) -> tuple[jax.Array, jax.Array]:
        norm = jnp.sqrt(jnp.sum(row * row, axis=-1, keepdims=True))
        return jnp.where(norm > least, row / jnp.where(norm > 0, norm, 1.0), 0.0), norm

    def placed(rows: jax.Array, i: int, row: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(rows, row[..., None, :], i, axis=-2)

    def step(i: int, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        basis, images, row = carry
        basis, image = placed(basis, i, row), image_of(row)
        new = image if symmetric else row_of(image)
        _, before = unit_row(new, 0.0)
        # Twice, because rounding leaves some of the basis in the vector the first time.
        for _ in range(2):
            new = new - product("...kn,...k->...n", basis, product("...kn,...n->...k", basis, new))
        # A remainder that is only rounding becomes zero: the basis already spans the whole Krylov space of the start.
        row, _ = unit_row(new, 1e-6 * before)
        return basis, placed(images, i, image), row

    first, _ = unit_row(mix / scale[..., None], 0.0)
    empty = [jnp.zeros((*matrix.shape[:-2], iterations, size), jnp.float32) for size in matrix.shape[:-3:-1]]
    basis, images, last = lax.fori_loop(0, iterations - 1, step, (*empty, first))
    basis, images = placed(basis, iterations - 1, last), placed(images, iterations - 1, image_of(last))
    return basis, images, scale


def _block_krylov(matrix: jax.Array, root: jax.Array, steps: int) -> tuple[jax.Array, jax.Array]:
    """Block Lanczos iteration on AᵀA, or on AAᵀ if that is smaller (Golub and Van Loan, 2013, section 10.3.6).

    Args:
      matrix: root² A, shape (m, n), float32.
      root: shape (), such that the largest magnitude in A is 1 or 0.
      steps: at most min(m, n) // START_BLOCK.

    Returns:
      The basis Q, shape (k, min(m, n)) with k = steps · START_BLOCK, of orthonormal rows and of zeros from where the space
      does not grow; and Q AᵀA Qᵀ or Q AAᵀQᵀ, shape (k, k).
    """
    tall = matrix.shape[0] >= matrix.shape[1]
    longer, shorter = sorted(matrix.shape, reverse=True)

    # Vectors are scaled instead of the matrix, whose scaled or transposed copy would be a write and another read of it. The
    # orders of axes and the barriers are for CPUs, where other products of the same numbers take two to ten times as long.
    def squared(rows: jax.Array) -> jax.Array:
        """The rows times AᵀA or AAᵀ, which is `back` of their images."""
        if tall:
            return back(_product("mn,kn->mk", matrix, rows / root) / root)
        return back(_product("nk,nm->km", lax.optimization_barrier((rows / root).T), matrix) / root)

    def back(images: jax.Array) -> jax.Array:
        if tall:
            rows = _product("mn,mk->kn", matrix, images / root)
        else:
            rows = lax.optimization_barrier(_product("nm,km->nk", matrix, images / root)).T
        return rows / root

    def step(i: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        basis, gram, block = carry
        basis = lax.dynamic_update_slice_in_dim(basis, block, i * START_BLOCK, axis=0)
        new = squared(block)
        gram = lax.dynamic_update_slice_in_dim(gram, _product("kn,jn->kj", new, basis), i * START_BLOCK, axis=0)
        return basis, gram, _next_block(new, basis)

    waves = jnp.cos(jnp.arange(float(START_BLOCK))[:, None] * jnp.arange(longer, dtype=jnp.float32))
    size = steps * START_BLOCK
    basis, gram = jnp.zeros((size, shorter)), jnp.zeros((size, size))
    basis, gram, _ = lax.fori_loop(0, steps, step, (basis, gram, _next_block(back(waves.T if tall else waves), basis)))
    # A row of products was made before the blocks that follow it.
    return basis, jnp.tril(gram) + jnp.tril(gram, -1).T


def _next_block(rows: jax.Array, basis: jax.Array) -> jax.Array:
    """Orthonormal rows that span the part of `rows` (k, n) orthogonal to the basis (j, n), and zeros if they are fewer."""
    original = jnp.sum(rows * rows, axis=1)
    # Twice, because rounding leaves some of the basis in small remainders. A remainder that is only rounding becomes zero.
    for least in (1e-6, 0.5):
        rows = rows - _product("kj,jn->kn", _product("kn,jn->kj", rows, basis), basis)
        rows = _gram_schmidt(rows, least**2 * original)
        original = jnp.ones_like(original)
    return rows


def _gram_schmidt(rows: jax.Array, least_squares: jax.Array) -> jax.Array:
    """Orthonormalizes rows (k, n); one becomes zero if its remainder has no larger square than `least_squares` (k,)."""

    def placed(i: jax.Array, rows: jax.Array) -> jax.Array:
        row = rows[i]
        square = jnp.sum(row * row)
        row = jnp.where(square > least_squares[i], row * lax.rsqrt(jnp.where(square > 0, square, 1.0)), 0.0)
        # The rows that follow lose its direction.
        along = jnp.where(jnp.arange(len(rows)) > i, _product("kn,n->k", rows, row), 0.0)
        return (rows - along[:, None] * row).at[i].set(row)

    independent: jax.Array = lax.fori_loop(0, len(rows), placed, rows)
    return independent


def _product(indices: str, *factors: jax.Array) -> jax.Array:
    """An einsum in float32, which accelerators round to TF32 or bfloat16 by default."""
    return jnp.einsum(indices, *factors, precision=lax.Precision.HIGHEST)


def _unit_frobenius(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Divides matrices (..., m, n) by their Frobenius norms, returned as (..., 1, 1); a matrix of zeros stays zero."""
    norm = jnp.sqrt(_over_matrix(jnp.sum, x * x))
    return x / jnp.where(norm > 0, norm, 1.0), norm


def _over_matrix(function: Callable[..., jax.Array], x: jax.Array) -> jax.Array:
    return function(x, axis=(-2, -1), keepdims=True)
