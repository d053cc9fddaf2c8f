"""σReparam (Zhai et al., ICML 2023, section 3.2), on arrays.

A kernel is read as the matrix W of shape (inputs, outputs). σReparam replaces it by

    Ŵ = (γ / σ(W)) · W,        σ(W) = vᵀ W u,

where γ is a learned scalar and u (outputs,), v (inputs,) come from one step of power iteration:

    v ← W u / ‖W u‖,        z = Wᵀ v,        u ← z / ‖z‖,        hence σ = ‖z‖.

The step reads W twice and σ needs no third read. One vector follows W with a lag where the two largest singular values
come close. `basis` holds further ones: the step is then one of block power iteration with Rayleigh-Ritz (Golub and Van
Loan, 2013, section 8.2), reads W twice as well, and u is the best vector of the block.

Gradients pass through σ but not through u and v:

    ∂L/∂W = (γ/σ) · (G − (⟨G, W⟩/σ) · v uᵀ),        ∂L/∂γ = ⟨G, W⟩ / σ,        G = ∂L/∂Ŵ.

Everything is float32 whatever the compute type, and finite for zero, rank-deficient, tiny and huge kernels.

The products of W with one vector are written as elementwise products and sums over W's own axes. They are bound by the
reading of W in any case; so written they are float32 on every device, where a matrix product of float32 is rounded to
less by default on TPU and GPU, and a W that is sharded along any of its axes is summed where it lies: for a product the
compiler may gather it first.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# A spectral norm up to here counts as zero: its reciprocal would overflow float32.
TINY = float(jnp.finfo(jnp.float32).tiny)


class PowerStep(NamedTuple):
    """One step of power iteration: `v` (inputs,), `u` (outputs,) of unit norm, and `sigma` () = vᵀ W u; `basis`
    (k − 1, outputs), the other vectors of the block in falling order, None without a block."""

    v: jax.Array
    u: jax.Array
    sigma: jax.Array
    basis: jax.Array | None


class Reparametrised(NamedTuple):
    """`kernel`, the effective kernel Ŵ in the compute type; `u`, `sigma` and `basis` to be stored, all float32."""

    kernel: jax.Array
    u: jax.Array
    sigma: jax.Array
    basis: jax.Array | None


def matrix_view(kernel: jax.Array, outputs: int) -> jax.Array:
    """Reads a kernel whose input axes come first as the matrix (inputs, outputs).

    Args:
      kernel: shape (*input_axes, *output_axes), for instance (d, heads, head_dim) or (kh, kw, in, out).
      outputs: product of the output axes. For (d, heads, head_dim) that is heads · head_dim, not head_dim.

    Raises:
      ValueError: no trailing axes multiply to `outputs`.
    """
    _input_axes(kernel, outputs)
    return kernel.reshape(-1, outputs)


def _input_axes(kernel: jax.Array, outputs: int) -> int:
    """How many leading axes of the kernel are inputs."""
    size = 1
    for axis in range(kernel.ndim - 1, -1, -1):
        size *= kernel.shape[axis]
        if size == outputs:
            return axis
    raise ValueError(f"kernel of shape {kernel.shape}: no trailing axes multiply to outputs = {outputs}")


def _of_inputs(v: jax.Array, kernel: jax.Array, inputs: int) -> jax.Array:
    """A vector over the inputs, to be multiplied with the kernel."""
    return v.reshape(*kernel.shape[:inputs], *(1,) * (kernel.ndim - inputs))


def _of_outputs(u: jax.Array, kernel: jax.Array, inputs: int) -> jax.Array:
    """A vector over the outputs, to be multiplied with the kernel."""
    return u.reshape(kernel.shape[inputs:])


def _unit(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x/‖x‖ and ‖x‖ without overflow or underflow of the squares; a zero vector stays zero."""
    scale = _scale(x)
    x = x / scale
    norm = jnp.sqrt(jnp.sum(x * x))
    return x / jnp.where(norm > 0, norm, 1.0), norm * scale


def power_step(kernel: jax.Array, u: jax.Array, basis: jax.Array | None = None) -> PowerStep:
    """One step of power iteration from `u`; σ's derivative in W is v uᵀ with u and v held fixed.

    Args:
      kernel: W, shape (*input_axes, *output_axes).
      u: shape (outputs,), the vector stored by the step before; says how many trailing elements are outputs.
      basis: shape (k − 1, outputs), the other vectors that it stored; None for a block of one.
    """
    kernel = kernel.astype(jnp.float32)
    if basis is not None:
        return _block_step(kernel, jnp.concatenate([u[None], basis]))
    inputs = _input_axes(kernel, u.size)
    fixed = lax.stop_gradient(kernel)
    v, norm = _unit(jnp.sum(fixed * _of_outputs(u, kernel, inputs), axis=range(inputs, kernel.ndim)).ravel())
    # A u in the null space of W would leave σ at 0 for good: start again from a dense vector.
    v = jnp.where(norm > 0, v, 1.0 / math.sqrt(v.size))
    z = jnp.sum(kernel * _of_inputs(v, kernel, inputs), axis=range(inputs)).ravel()
    u, _ = _unit(lax.stop_gradient(z))
    # Equal to ‖z‖ in value. Written as ⟨z, u⟩ so that every derivative, of any order, sees u and v as constants.
    return PowerStep(v=v, u=u, sigma=jnp.sum(z * u), basis=None)


def _block_step(kernel: jax.Array, block: jax.Array) -> PowerStep:
    """Block power iteration with Rayleigh-Ritz from the rows of `block` (k, outputs)."""
    product = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    vectors, outputs = block.shape
    inputs = _input_axes(kernel, outputs)

    def contracted(left, axes):
        # Vectors on the left and W's own axes, for the reasons above: a reshaped or transposed W may be gathered.
        both = (tuple(range(1, left.ndim)), tuple(axes))
        return jnp.tensordot(left, kernel, axes=both, precision=lax.Precision.HIGHEST)

    over_outputs = block.reshape(vectors, *kernel.shape[inputs:])
    image = lax.stop_gradient(contracted(over_outputs, range(inputs, kernel.ndim))).reshape(vectors, -1).T
    # Columns that W maps to nothing get some direction orthogonal to the others: QR never divides by a norm.
    left, _ = jnp.linalg.qr(image / _scale(image))
    rows = contracted(left.T.reshape(vectors, *kernel.shape[:inputs]), range(inputs)).reshape(vectors, outputs)
    fixed = lax.stop_gradient(rows)
    scaled = fixed / _scale(fixed)
    _, rotation = jnp.linalg.eigh(product(scaled, scaled.T))
    # eigh sorts upwards.
    rotation = rotation[:, ::-1]
    units = jax.vmap(lambda row: _unit(row)[0])(product(rotation.T, fixed))
    sigma = product(product(rotation[:, 0], rows), units[0])
    return PowerStep(v=product(left, rotation[:, 0]), u=units[0], sigma=sigma, basis=units[1:])


def _scale(x: jax.Array) -> jax.Array:
    largest = jnp.max(jnp.abs(x))
    return jnp.where(largest > 0, largest, 1.0)


def svd_start(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The leading right singular vector u (outputs,) and the spectral norm () of `matrix` (inputs, outputs)."""
    vh, sigma = svd_block(matrix, 1)
    return vh[0], sigma


def svd_block(matrix: jax.Array, vectors: int) -> tuple[jax.Array, jax.Array]:
    """The leading right singular vectors (vectors, outputs) and the spectral norm () of `matrix` (inputs, outputs).

    `vectors` is at most the smaller side of the matrix.
    """
    matrix = matrix.astype(jnp.float32)
    scale = _scale(matrix)
    _, s, vh = jnp.linalg.svd(matrix / scale, full_matrices=False)
    return vh[:vectors], s[0] * scale


def spectral_norm(matrix: jax.Array) -> jax.Array:
    """‖W‖₂ by the SVD; the reference for tests and reports, too slow for a training step."""
    return svd_start(matrix)[1]


def _ratio(gamma: jax.Array, sigma: jax.Array) -> jax.Array:
    # A zero kernel has no direction. Taking σ as 1 there leaves Ŵ = 0 and lets a zero-initialised kernel learn.
    return gamma / jnp.where(sigma > TINY, sigma, 1.0)


def effective_kernel(kernel: jax.Array, gamma: jax.Array, sigma: jax.Array, *, dtype=None) -> jax.Array:
    """Ŵ = (γ/σ)·W with a σ () that is known, in `dtype` or the kernel's; `gamma` is of shape ()."""
    return (kernel.astype(jnp.float32) * _ratio(gamma, sigma)).astype(kernel.dtype if dtype is None else dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _reparametrise(kernel, gamma, u, basis, dtype):
    return _reparametrise_fwd(kernel, gamma, u, basis, dtype)[0]


def _reparametrise_fwd(kernel, gamma, u, basis, dtype):
    step = power_step(kernel, u, basis)
    effective = effective_kernel(kernel, gamma, step.sigma, dtype=dtype)
    return (effective, step.u, step.sigma, step.basis), (kernel, gamma, step)


def _reparametrise_bwd(dtype, residuals, cotangents):
    kernel, gamma, step = residuals
    g = cotangents[0].astype(jnp.float32)
    w = kernel.astype(jnp.float32)
    nonzero = step.sigma > TINY
    reciprocal = _ratio(jnp.float32(1.0), step.sigma)
    # Scaled before it is summed, so that neither a tiny nor a huge W leaves float32.
    d_gamma = jnp.sum(g * (w * reciprocal))
    rank_one = jnp.where(nonzero, d_gamma, 0.0)
    inputs = _input_axes(kernel, step.u.size)
    outer = _of_inputs(step.v, kernel, inputs) * _of_outputs(step.u, kernel, inputs)
    d_kernel = (gamma * reciprocal) * (g - rank_one * outer)
    zeros = jax.tree.map(jnp.zeros_like, (step.u, step.basis))
    return d_kernel.astype(kernel.dtype), d_gamma.astype(gamma.dtype), *zeros


_reparametrise.defvjp(_reparametrise_fwd, _reparametrise_bwd)


def reparametrise(
    kernel: jax.Array, gamma: jax.Array, u: jax.Array, *, basis: jax.Array | None = None, dtype=None
) -> Reparametrised:
    """Ŵ = (γ/σ)·W after one power step from `u` (module docstring), with the gradients stated there.

    Nothing of the kernel's size is saved for the backward pass but the kernel itself. What the result has beside the
    kernel carries no gradient: these are statistics to store.

    Args:
      kernel: shape (*input_axes, *output_axes), any float type; computed in float32.
      gamma: shape ().
      u: shape (outputs,), float32; says how many trailing elements of `kernel` are outputs.
      basis: shape (k − 1, outputs), see `power_step`.
      dtype: type of the returned kernel, `kernel.dtype` if None.
    """
    dtype = jnp.dtype(kernel.dtype if dtype is None else dtype)
    return Reparametrised(*_reparametrise(kernel, gamma, *lax.stop_gradient((u, basis)), dtype))


def weight_normalised(kernel: jax.Array, gain: jax.Array, *, dtype=None) -> jax.Array:
    """Weight normalisation (Salimans and Kingma, 2016): each output's weights have norm |gain|.

    Args:
      kernel: shape (*input_axes, *output_axes).
      gain: shape (outputs,), flattened over the output axes.
    """
    dtype = kernel.dtype if dtype is None else dtype
    matrix = matrix_view(kernel, gain.size).astype(jnp.float32)
    norms = column_norms(matrix)
    return (matrix * _ratio(gain, norms)).astype(dtype).reshape(kernel.shape)


def column_norms(matrix: jax.Array) -> jax.Array:
    """Euclidean norm of each column, shape (outputs,); differentiable where a column is zero."""
    square = jnp.sum(matrix.astype(jnp.float32) ** 2, axis=0)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)


@jax.jit
def product_norm(first: jax.Array, second: jax.Array, rows: tuple[jax.Array, jax.Array] | None = None) -> jax.Array:
    """‖A Bᵀ‖₂ of two tall matrices without forming the product.

    ‖A Bᵀ‖₂² is the largest eigenvalue of C = (AᵀA)(BᵀB). Squaring C twelve times leaves its leading eigenvector y, and
    B y is the leading right singular vector of A Bᵀ, whose image gives the norm to second order in what is left of the
    other vectors: within 1e-4 however close they come. Rounding adds up to 6e-8 (‖A‖₂‖B‖₂ / ‖A Bᵀ‖₂)². Products only: a
    batched LAPACK call waits for threads of the pool that it runs in, and two at once stand still for ever on a machine of
    two cores (jaxlib 0.10).

    Args:
      first, second: A and B, shape (..., d, n).
      rows: shape (..., 1, n) each, one more row of A and one more of B (weights and their biases).

    Returns:
      shape (...); with `rows` (2, ...), without them and with them.
    """
    product = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)

    def scaled(x, row):
        x = x.astype(jnp.float32)
        parts = [x] if row is None else [x, row.astype(jnp.float32)]
        scale = functools.reduce(jnp.maximum, (_over_matrix(jnp.max, jnp.abs(part)) for part in parts))
        scale = jnp.where(scale > 0, scale, 1.0)
        return [part / scale for part in parts], scale

    def grams(parts):
        """Without the row and with it."""
        found = [jnp.einsum("...dn,...dm->...nm", part, part, precision=lax.Precision.HIGHEST) for part in parts]
        return jnp.stack([sum(found[: i + 1]) for i in range(len(found))])

    def lengths(parts, vectors):
        """Of the images of a vector without the row and of one with it, (k, ...); both from one read of the matrix."""
        vectors = jnp.moveaxis(vectors[..., 0], 0, -1)
        squares = jnp.moveaxis(jnp.sum(product(parts[0], vectors) ** 2, axis=-2), -1, 0)
        if len(parts) > 1:
            squares = squares.at[1].add(jnp.sum(product(parts[1], vectors)[..., 1] ** 2, axis=-1))
        return jnp.sqrt(squares)

    row, other_row = (None, None) if rows is None else rows
    (left, scale), (right, other_scale) = scaled(first, row), scaled(second, other_row)
    # Gram matrices of norm 1: with a row far larger than the matrix, the squares of the product would leave float32.
    gram, size = _of_norm_one(grams(right))
    y = _leading_vector(product(_of_norm_one(grams(left))[0], gram))
    above, below = lengths(left, product(gram, y)) * size[..., 0, 0], lengths(right, y)
    norms = above / jnp.where(below > 0, below, 1.0) * (scale * other_scale)[..., 0, 0]
    return norms[0] if rows is None else norms


def _leading_vector(matrix: jax.Array) -> jax.Array:
    """What twelve squarings of (..., d, d) leave of its leading eigenvector, (..., d, 1), of any length."""

    def squared(_, x):
        return _of_norm_one(jnp.matmul(x, x, precision=lax.Precision.HIGHEST))[0]

    power = lax.fori_loop(0, 12, squared, _of_norm_one(matrix)[0])
    largest = jnp.argmax(jnp.sum(power * power, axis=-2, keepdims=True), axis=-1, keepdims=True)
    return jnp.take_along_axis(power, largest, axis=-1)


def sequence_norm(x: jax.Array, column: jax.Array | None = None) -> jax.Array:
    """‖X‖₂ of sequences by `norm_from_below`.

    In half precision a sequence shorter than its width is read once, for its Gram matrix: accelerators have units for such
    products, which are exact in float32, and what is read again and again is small.

    Args:
      x: shape (..., tokens, width).
      column: shape (..., tokens), one more column of X, of the same type.

    Returns:
      shape (...).
    """
    tokens, width = x.shape[-2:]
    if x.dtype not in (jnp.bfloat16, jnp.float16) or tokens > width:
        return norm_from_below(x if column is None else jnp.concatenate([x, column[..., None]], axis=-1))
    gram = jnp.einsum("...td,...sd->...ts", x, x, preferred_element_type=jnp.float32)
    if column is not None:
        column = column.astype(jnp.float32)
        gram = gram + column[..., :, None] * column[..., None, :]
    # By (X Xᵀ)², which squares every ratio between singular values once more: fewer will do.
    return jnp.sqrt(norm_from_below(gram, iterations=6))


@functools.partial(jax.jit, static_argnames="iterations")
def norm_from_below(matrix: jax.Array, *, iterations: int = 8) -> jax.Array:
    """‖A‖₂ by the Lanczos iteration on AᵀA (Golub and Kahan, 1965): forms no product of matrices, never above the norm.

    A large gap between the first singular values, as sequences of tokens have it, makes it exact; so does a rank of at
    most `iterations`. For a large random matrix, which has no gap, it is up to five per cent low after five and two after
    eight. It takes 2·iterations reads of A. Products only, for the reason that `product_norm` gives.

    Args:
      matrix: shape (..., m, n).

    Returns:
      shape (...).
    """
    matrix = matrix.astype(jnp.float32)
    # Accelerators would round products to TF32 or bfloat16.
    product = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)

    # A fixed mix of the rows, with something of their mean and some waves in it. It is no row picked by its length: after
    # a LayerNorm rows of one length would be told apart by their rounding. Several starts would cost products of matrices.
    waves = jnp.cos(jnp.arange(4.0)[:, None] * jnp.arange(matrix.shape[-2], dtype=jnp.float32))
    mix = product("...mn,m->...n", matrix, jnp.sum(waves, axis=0))
    # Vectors are scaled, not A: a scaled or transposed copy of it would be written and read once more, and its largest
    # element would take one more reading.
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
        # Twice, because rounding leaves something of them the first time.
        for _ in range(2):
            new = new - product("...kn,...k->...n", basis, product("...kn,...n->...k", basis, new))
        # What is only rounding is no direction: the basis then spans all that A does to the start.
        row, _ = unit(new, 1e-6 * before)
        return basis, placed(images, i, image), row

    first, _ = unit(mix / scale[..., None], 0.0)
    empty = [jnp.zeros((*matrix.shape[:-2], iterations, size), jnp.float32) for size in matrix.shape[:-3:-1]]
    basis, images, last = lax.fori_loop(0, iterations - 1, step, (*empty, first))
    basis, images = placed(basis, iterations - 1, last), placed(images, iterations - 1, image_of(last))
    y = _leading_vector(product("...in,...jn->...ij", images, images))
    norm, length = (jnp.sqrt(jnp.sum(product("...ki,...kn->...n", y, x) ** 2, axis=-1)) for x in (images, basis))
    return norm / jnp.where(length > 0, length, 1.0) * scale


def _of_norm_one(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Matrices (..., m, n) divided by their Frobenius norms, and these (..., 1, 1); a matrix of zeros stays as it is."""
    norm = jnp.sqrt(_over_matrix(jnp.sum, x * x))
    return x / jnp.where(norm > 0, norm, 1.0), norm


def _over_matrix(function, x):
    return function(x, axis=(-2, -1), keepdims=True)
