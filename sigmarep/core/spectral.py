"""σReparam (Zhai et al., ICML 2023, section 3.2), on arrays.

A kernel is read as the matrix W of shape (inputs, outputs). σReparam replaces it by

    Ŵ = (γ / σ(W)) · W,        σ(W) = vᵀ W u,

where γ is a learned scalar and u (outputs,), v (inputs,) come from one step of power iteration:

    v ← W u / ‖W u‖,        z = Wᵀ v,        u ← z / ‖z‖,        hence σ = ‖z‖.

The step reads W twice; σ needs no third read. A single vector lags behind W where the two largest singular values are
close. `basis` adds vectors: the step is then one of block power iteration with Rayleigh-Ritz (Golub and Van Loan, 2013,
section 8.2), still reads W twice, and u is the best vector of the block.

Gradients pass through σ but not through u and v:

    ∂L/∂W = (γ/σ) · (G − (⟨G, W⟩/σ) · v uᵀ),        ∂L/∂γ = ⟨G, W⟩ / σ,        G = ∂L/∂Ŵ.

All computation is in float32, whatever the compute type, and stays finite for zero, rank-deficient, tiny and huge kernels.

Products of W with one vector are written as elementwise products and sums over W's own axes. They are bound by reading
W in any case. Unlike matrix products, which TPUs and GPUs round below float32 by default, these sums are float32 on
every device, and a sharded W is summed where it lies: before a matrix product the compiler may gather it.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# Spectral norms up to this count as zero: the reciprocal would overflow float32.
TINY = float(jnp.finfo(jnp.float32).tiny)


class PowerStep(NamedTuple):
    """Result of one step of power iteration.

    Attributes:
      v: (inputs,), of unit norm.
      u: (outputs,), of unit norm.
      sigma: (), vᵀ W u.
      basis: (k − 1, outputs), the other vectors of the block, largest singular value first; None without a block.
    """

    v: jax.Array
    u: jax.Array
    sigma: jax.Array
    basis: jax.Array | None


class Reparametrized(NamedTuple):
    """The effective kernel Ŵ in the compute type, and the float32 statistics `u`, `sigma` and `basis` to store."""

    kernel: jax.Array
    u: jax.Array
    sigma: jax.Array
    basis: jax.Array | None


def matrix_view(kernel: jax.Array, outputs: int) -> jax.Array:
    """Reshapes a kernel whose input axes come first to the matrix (inputs, outputs).

    Args:
      kernel: shape (*input_axes, *output_axes), for instance (d, heads, head_dim) or (kh, kw, in, out).
      outputs: product of the output axes. For (d, heads, head_dim) that is heads · head_dim, not head_dim.

    Raises:
      ValueError: no trailing axes multiply to `outputs`.
    """
    _input_axes(kernel, outputs)
    return kernel.reshape(-1, outputs)


def _input_axes(kernel: jax.Array, outputs: int) -> int:
    """Number of leading axes of the kernel that are inputs."""
    size = 1
    for axis in range(kernel.ndim - 1, -1, -1):
        size *= kernel.shape[axis]
        if size == outputs:
            return axis
    raise ValueError(f"kernel of shape {kernel.shape}: no trailing axes multiply to outputs = {outputs}")


def _over_inputs(v: jax.Array, kernel: jax.Array, inputs: int) -> jax.Array:
    """Reshapes a vector over the inputs so that it broadcasts against the kernel."""
    return v.reshape(*kernel.shape[:inputs], *(1,) * (kernel.ndim - inputs))


def _over_outputs(u: jax.Array, kernel: jax.Array, inputs: int) -> jax.Array:
    """Reshapes a vector over the outputs so that it broadcasts against the kernel."""
    return u.reshape(kernel.shape[inputs:])


def _unit(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns x/‖x‖ and ‖x‖ without overflow or underflow of the squares; a zero vector stays zero."""
    scale = _scale(x)
    x = x / scale
    norm = jnp.sqrt(jnp.sum(x * x))
    return x / jnp.where(norm > 0, norm, 1.0), norm * scale


def power_step(kernel: jax.Array, u: jax.Array, basis: jax.Array | None = None) -> PowerStep:
    """Makes one step of power iteration from `u`. The derivative of σ with respect to W is v uᵀ; u and v are constants.

    Args:
      kernel: W, shape (*input_axes, *output_axes).
      u: shape (outputs,), the vector stored by the previous step. Its size tells which trailing axes are outputs.
      basis: shape (k − 1, outputs), the other vectors stored by the previous step; None for a block of one.
    """
    kernel = kernel.astype(jnp.float32)
    if basis is not None:
        return _block_step(kernel, jnp.concatenate([u[None], basis]))
    inputs = _input_axes(kernel, u.size)
    fixed = lax.stop_gradient(kernel)
    v, norm = _unit(jnp.sum(fixed * _over_outputs(u, kernel, inputs), axis=range(inputs, kernel.ndim)).ravel())
    # A u in the null space of W would keep σ at 0 forever: restart from a dense vector.
    v = jnp.where(norm > 0, v, 1.0 / math.sqrt(v.size))
    z = jnp.sum(kernel * _over_inputs(v, kernel, inputs), axis=range(inputs)).ravel()
    u, _ = _unit(lax.stop_gradient(z))
    # Equals ‖z‖. Written as ⟨z, u⟩ so that derivatives of every order treat u and v as constants.
    return PowerStep(v=v, u=u, sigma=jnp.sum(z * u), basis=None)


def _block_step(kernel: jax.Array, block: jax.Array) -> PowerStep:
    """Makes one step of block power iteration with Rayleigh-Ritz from the rows of `block` (k, outputs)."""
    product = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    vectors, outputs = block.shape
    inputs = _input_axes(kernel, outputs)

    def contracted(left, axes):
        # Contracts W over its own axes: a reshaped or transposed W may be gathered from its shards first.
        both = (tuple(range(1, left.ndim)), tuple(axes))
        return jnp.tensordot(left, kernel, axes=both, precision=lax.Precision.HIGHEST)

    over_outputs = block.reshape(vectors, *kernel.shape[inputs:])
    image = lax.stop_gradient(contracted(over_outputs, range(inputs, kernel.ndim))).reshape(vectors, -1).T
    # QR gives columns that W maps to zero some direction orthogonal to the others; it never divides by a norm.
    left, _ = jnp.linalg.qr(image / _scale(image))
    rows = contracted(left.T.reshape(vectors, *kernel.shape[:inputs]), range(inputs)).reshape(vectors, outputs)
    fixed = lax.stop_gradient(rows)
    scaled = fixed / _scale(fixed)
    _, rotation = jnp.linalg.eigh(product(scaled, scaled.T))
    # eigh returns eigenvalues in ascending order.
    rotation = rotation[:, ::-1]
    units = jax.vmap(lambda row: _unit(row)[0])(product(rotation.T, fixed))
    sigma = product(product(rotation[:, 0], rows), units[0])
    return PowerStep(v=product(left, rotation[:, 0]), u=units[0], sigma=sigma, basis=units[1:])


def _scale(x: jax.Array) -> jax.Array:
    largest = jnp.max(jnp.abs(x))
    return jnp.where(largest > 0, largest, 1.0)


def svd_start(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the leading right singular vector u (outputs,) and the spectral norm () of `matrix` (inputs, outputs)."""
    vh, sigma = svd_block(matrix, 1)
    return vh[0], sigma


def svd_block(matrix: jax.Array, vectors: int) -> tuple[jax.Array, jax.Array]:
    """Returns the leading right singular vectors (vectors, outputs) and the spectral norm ().

    Args:
      matrix: shape (inputs, outputs).
      vectors: number of singular vectors, at most min(inputs, outputs).
    """
    matrix = matrix.astype(jnp.float32)
    scale = _scale(matrix)
    _, s, vh = jnp.linalg.svd(matrix / scale, full_matrices=False)
    return vh[:vectors], s[0] * scale


def spectral_norm(matrix: jax.Array) -> jax.Array:
    """Computes ‖W‖₂ by the SVD: the reference for tests and reports, too slow for a training step."""
    return svd_start(matrix)[1]


def _ratio(gamma: jax.Array, sigma: jax.Array) -> jax.Array:
    # A zero kernel has no direction. Taking σ as 1 for it leaves Ŵ = 0 and lets a zero-initialized kernel learn.
    return gamma / jnp.where(sigma > TINY, sigma, 1.0)


def effective_kernel(kernel: jax.Array, gamma: jax.Array, sigma: jax.Array, *, dtype=None) -> jax.Array:
    """Computes Ŵ = (γ/σ)·W for a known σ, in `dtype` or else the kernel's type; `gamma` and `sigma` have shape ()."""
    return (kernel.astype(jnp.float32) * _ratio(gamma, sigma)).astype(kernel.dtype if dtype is None else dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _reparametrize(kernel, gamma, u, basis, dtype):
    return _reparametrize_fwd(kernel, gamma, u, basis, dtype)[0]


def _reparametrize_fwd(kernel, gamma, u, basis, dtype):
    step = power_step(kernel, u, basis)
    effective = effective_kernel(kernel, gamma, step.sigma, dtype=dtype)
    return (effective, step.u, step.sigma, step.basis), (kernel, gamma, step)


def _reparametrize_bwd(dtype, residuals, cotangents):
    kernel, gamma, step = residuals
    g = cotangents[0].astype(jnp.float32)
    w = kernel.astype(jnp.float32)
    nonzero = step.sigma > TINY
    reciprocal = _ratio(jnp.float32(1.0), step.sigma)
    # Scaled before the sum, so that neither a tiny nor a huge W overflows or underflows float32.
    d_gamma = jnp.sum(g * (w * reciprocal))
    rank_one = jnp.where(nonzero, d_gamma, 0.0)
    inputs = _input_axes(kernel, step.u.size)
    outer = _over_inputs(step.v, kernel, inputs) * _over_outputs(step.u, kernel, inputs)
    d_kernel = (gamma * reciprocal) * (g - rank_one * outer)
    zeros = jax.tree.map(jnp.zeros_like, (step.u, step.basis))
    return d_kernel.astype(kernel.dtype), d_gamma.astype(gamma.dtype), *zeros


_reparametrize.defvjp(_reparametrize_fwd, _reparametrize_bwd)


def reparametrize(
    kernel: jax.Array, gamma: jax.Array, u: jax.Array, *, basis: jax.Array | None = None, dtype=None
) -> Reparametrized:
    """Computes Ŵ = (γ/σ)·W after one power step from `u`, with the gradients stated in the module docstring.

    The backward pass saves nothing of the kernel's size except the kernel itself. Only the returned kernel carries a
    gradient; `u`, `sigma` and `basis` are statistics to store.

    Args:
      kernel: shape (*input_axes, *output_axes), any float type; computed in float32.
      gamma: shape ().
      u: shape (outputs,), float32. Its size tells which trailing axes of `kernel` are outputs.
      basis: shape (k − 1, outputs), see `power_step`.
      dtype: type of the returned kernel, `kernel.dtype` if None.
    """
    dtype = jnp.dtype(kernel.dtype if dtype is None else dtype)
    return Reparametrized(*_reparametrize(kernel, gamma, *lax.stop_gradient((u, basis)), dtype))


def weight_normalized(kernel: jax.Array, gain: jax.Array, *, dtype=None) -> jax.Array:
    """Applies weight normalization (Salimans and Kingma, 2016): each output's weights get norm |gain|.

    Args:
      kernel: shape (*input_axes, *output_axes).
      gain: shape (outputs,), flattened over the output axes.
    """
    dtype = kernel.dtype if dtype is None else dtype
    matrix = matrix_view(kernel, gain.size).astype(jnp.float32)
    norms = column_norms(matrix)
    return (matrix * _ratio(gain, norms)).astype(dtype).reshape(kernel.shape)


def column_norms(matrix: jax.Array) -> jax.Array:
    """Euclidean norm of each column, shape (outputs,); differentiable even for a column of zeros."""
    square = jnp.sum(matrix.astype(jnp.float32) ** 2, axis=0)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)


@jax.jit
def product_norm(first: jax.Array, second: jax.Array, rows: tuple[jax.Array, jax.Array] | None = None) -> jax.Array:
    """Computes ‖A Bᵀ‖₂ of two tall matrices without forming the product.

    ‖A Bᵀ‖₂² is the largest eigenvalue of C = (AᵀA)(BᵀB). Squaring C twelve times isolates its leading eigenvector y, and
    B y is the leading right singular vector of A Bᵀ. The norm of its image is accurate to second order in the remaining
    share of the other vectors: within 1e-4 however close the singular values are. Rounding adds up to
    6e-8 (‖A‖₂‖B‖₂ / ‖A Bᵀ‖₂)². Only matrix products are used: a batched LAPACK call waits for threads of the pool that
    it runs in, so that concurrent calls can deadlock on a machine with two cores (jaxlib 0.10).

    Args:
      first, second: A and B, shape (..., d, n).
      rows: shape (..., 1, n) each, an extra row for A and one for B (the biases that belong to the weights).

    Returns:
      Shape (...); with `rows`, shape (2, ...): first without the extra rows, then with them.
    """
    product = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)

    def scaled(x, row):
        x = x.astype(jnp.float32)
        parts = [x] if row is None else [x, row.astype(jnp.float32)]
        scale = functools.reduce(jnp.maximum, (_over_matrix(jnp.max, jnp.abs(part)) for part in parts))
        scale = jnp.where(scale > 0, scale, 1.0)
        return [part / scale for part in parts], scale

    def grams(parts):
        """Gram matrices without the extra row and with it."""
        each = [jnp.einsum("...dn,...dm->...nm", part, part, precision=lax.Precision.HIGHEST) for part in parts]
        return jnp.stack([sum(each[: i + 1]) for i in range(len(each))])

    def lengths(parts, vectors):
        """Norms of the vectors' images without the extra row and with it, (k, ...), from one read of the matrix."""
        vectors = jnp.moveaxis(vectors[..., 0], 0, -1)
        squares = jnp.moveaxis(jnp.sum(product(parts[0], vectors) ** 2, axis=-2), -1, 0)
        if len(parts) > 1:
            squares = squares.at[1].add(jnp.sum(product(parts[1], vectors)[..., 1] ** 2, axis=-1))
        return jnp.sqrt(squares)

    row, other_row = (None, None) if rows is None else rows
    (left, scale), (right, other_scale) = scaled(first, row), scaled(second, other_row)
    # Gram matrices are scaled to norm 1: a row far larger than the matrix would make the squares overflow float32.
    gram, size = _unit_frobenius(grams(right))
    y = _leading_vector(product(_unit_frobenius(grams(left))[0], gram))
    above, below = lengths(left, product(gram, y)) * size[..., 0, 0], lengths(right, y)
    norms = above / jnp.where(below > 0, below, 1.0) * (scale * other_scale)[..., 0, 0]
    return norms[0] if rows is None else norms


def _leading_vector(matrix: jax.Array) -> jax.Array:
    """Approximates the leading eigenvector (..., d, 1) of (..., d, d) by twelve squarings; its length is arbitrary."""

    def squared(_, x):
        return _unit_frobenius(jnp.matmul(x, x, precision=lax.Precision.HIGHEST))[0]

    power = lax.fori_loop(0, 12, squared, _unit_frobenius(matrix)[0])
    largest = jnp.argmax(jnp.sum(power * power, axis=-2, keepdims=True), axis=-1, keepdims=True)
    return jnp.take_along_axis(power, largest, axis=-1)


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
        return norm_from_below(x if column is None else jnp.concatenate([x, column[..., None]], axis=-1))
    gram = jnp.einsum("...td,...sd->...ts", x, x, preferred_element_type=jnp.float32)
    if column is not None:
        column = column.astype(jnp.float32)
        gram = gram + column[..., :, None] * column[..., None, :]
    # The iteration sees (X Xᵀ)², which squares every ratio between singular values once more: fewer steps suffice.
    return jnp.sqrt(norm_from_below(gram, iterations=6))


@functools.partial(jax.jit, static_argnames="iterations")
def norm_from_below(matrix: jax.Array, *, iterations: int = 8) -> jax.Array:
    """Estimates ‖A‖₂ from below by Lanczos iteration on AᵀA (Golub and Kahan, 1965), without a product of matrices.

    The estimate is exact if the first singular values are well separated, as in sequences of tokens, or if the rank is at
    most `iterations`. For a large random matrix, which has no such gap, it is up to 5 % low after five iterations and 2 %
    after eight. It reads A 2·iterations times. LAPACK is avoided for the reason given in `product_norm`.

    Args:
      matrix: shape (..., m, n).

    Returns:
      Shape (...).
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

    def image_of(row):
        return product("...mn,...n->...m", matrix, row) / scale[..., None]

    def row_of(image):
        return product("...mn,...m->...n", matrix, image) / scale[..., None]

    def unit(row, least):
        norm = jnp.sqrt(jnp.sum(row * row, axis=-1, keepdims=True))
        return jnp.where(norm > least, row / jnp.where(norm > 0, norm, 1.0), 0.0), norm

    def placed(rows, i, row):
        return lax.dynamic_update_slice_in_dim(rows, row[..., None, :], i, axis=-2)

    def step(i, carry):
        basis, images, row = carry
        basis, image = placed(basis, i, row), image_of(row)
        new = row_of(image)
        _, before = unit(new, 0.0)
        # Twice, because rounding leaves some of the basis in the vector the first time.
        for _ in range(2):
            new = new - product("...kn,...k->...n", basis, product("...kn,...n->...k", basis, new))
        # A remainder that is only rounding becomes zero: the basis already spans the whole Krylov space of the start.
        row, _ = unit(new, 1e-6 * before)
        return basis, placed(images, i, image), row

    first, _ = unit(mix / scale[..., None], 0.0)
    empty = [jnp.zeros((*matrix.shape[:-2], iterations, size), jnp.float32) for size in matrix.shape[:-3:-1]]
    basis, images, last = lax.fori_loop(0, iterations - 1, step, (*empty, first))
    basis, images = placed(basis, iterations - 1, last), placed(images, iterations - 1, image_of(last))
    y = _leading_vector(product("...in,...jn->...ij", images, images))
    norm, length = (jnp.sqrt(jnp.sum(product("...ki,...kn->...n", y, x) ** 2, axis=-1)) for x in (images, basis))
    return norm / jnp.where(length > 0, length, 1.0) * scale


def _unit_frobenius(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Divides matrices (..., m, n) by their Frobenius norms, returned as (..., 1, 1); a matrix of zeros stays zero."""
    norm = jnp.sqrt(_over_matrix(jnp.sum, x * x))
    return x / jnp.where(norm > 0, norm, 1.0), norm


def _over_matrix(function, x):
    return function(x, axis=(-2, -1), keepdims=True)
