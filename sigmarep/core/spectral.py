"""σReparam (Zhai et al., ICML 2023, section 3.2), on arrays.

A kernel is read as the matrix W of shape (inputs, outputs). σReparam replaces it by

    Ŵ = (γ / σ(W)) · W,        σ(W) = vᵀ W u,

where γ is a learned scalar and u (outputs,), v (inputs,) come from one step of power iteration:

    v ← W u / ‖W u‖,        z = Wᵀ v,        u ← z / ‖z‖,        hence σ = ‖z‖.

The step reads W twice; σ needs no third read. A single vector lags behind W where the two largest singular values are
close. `basis` adds vectors: the step is then one of block power iteration with Rayleigh-Ritz (Golub and Van Loan, 2013,
section 8.2), still reads W twice, and u is the best vector of the block.

u, on the side of the outputs, is what is stored from step to step, as in the paper's speech code. Its vision code, and
PyTorch's `spectral_norm`, store the vector on the side of the inputs instead: half a step of power iteration apart. At
convergence the two are the same; on the way there they are not, and neither are the runs (logits 1e-2 apart after ten
steps of a ViT at a rate of 0.05).

Gradients pass through σ but not through u and v:

    ∂L/∂W = (γ/σ) · (G − (⟨G, W⟩/σ) · v uᵀ),        ∂L/∂γ = ⟨G, W⟩ / σ,        G = ∂L/∂Ŵ.

All computation is in float32, whatever the compute type, and stays finite for zero, rank-deficient, tiny and huge kernels.

Products of W with one vector are written as elementwise products and sums over W's own axes. They are bound by reading
W in any case. Unlike matrix products, which TPUs and GPUs round below float32 by default, these sums are float32 on
every device, and a sharded W is summed where it lies: before a matrix product the compiler may gather it.
"""

import functools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from sigmarep.core.small import divisor, eigenvectors, orthonormal_rows, unit

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
    v, norm = unit(jnp.sum(fixed * _over_outputs(u, kernel, inputs), axis=range(inputs, kernel.ndim)).ravel())
    # A u in the null space of W would keep σ at 0 forever: restart from a dense vector.
    v = jnp.where(norm > 0, v, 1.0 / math.sqrt(v.size))
    z = jnp.sum(kernel * _over_inputs(v, kernel, inputs), axis=range(inputs)).ravel()
    u, _ = unit(lax.stop_gradient(z))
    # Equals ‖z‖. Written as ⟨z, u⟩ so that derivatives of every order treat u and v as constants.
    return PowerStep(v=v, u=u, sigma=jnp.sum(z * u), basis=None)


def _block_step(kernel: jax.Array, block: jax.Array) -> PowerStep:
    """Makes one step of block power iteration with Rayleigh-Ritz from the rows of `block` (k, outputs)."""
    product = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    vectors, outputs = block.shape
    inputs = _input_axes(kernel, outputs)

    # Where the mesh's axes are explicit the sums over shards of W must be asked for; the block is whole on every device.
    mesh = jax.typeof(kernel).sharding.mesh
    whole = NamedSharding(mesh, PartitionSpec()) if mesh.explicit_axes else None

    def contracted(left: jax.Array, axes: Iterable[int]) -> jax.Array:
        # Contracts W over its own axes: a reshaped or transposed W may be gathered from its shards first.
        both = (tuple(range(1, left.ndim)), tuple(axes))
        return jnp.tensordot(left, kernel, axes=both, precision=lax.Precision.HIGHEST, out_sharding=whole)

    over_outputs = block.reshape(vectors, *kernel.shape[inputs:])
    image = lax.stop_gradient(contracted(over_outputs, range(inputs, kernel.ndim))).reshape(vectors, -1)
    # Columns that W maps to zero get some direction orthogonal to the others; nothing is divided by a norm of zero.
    left = orthonormal_rows(image)
    rows = contracted(left.reshape(vectors, *kernel.shape[:inputs]), range(inputs)).reshape(vectors, outputs)
    fixed = lax.stop_gradient(rows)
    scaled = fixed / divisor(fixed)
    rotation = eigenvectors(product(scaled, scaled.T))
    units = jax.vmap(lambda row: unit(row)[0])(product(rotation.T, fixed))
    sigma = product(product(rotation[:, 0], rows), units[0])
    return PowerStep(v=product(rotation[:, 0], left), u=units[0], sigma=sigma, basis=units[1:])


def spectral_norm(matrix: jax.Array) -> jax.Array:
    """Computes ‖W‖₂ by the SVD: the reference for tests and reports, too slow for a training step."""
    matrix = matrix.astype(jnp.float32)
    scale = divisor(matrix)
    return jnp.linalg.svd(matrix / scale, compute_uv=False)[0] * scale


def _ratio(gamma: jax.Array, sigma: jax.Array) -> jax.Array:
    # A zero kernel has no direction. Taking σ as 1 for it leaves Ŵ = 0 and lets a zero-initialized kernel learn.
    return gamma / jnp.where(sigma > TINY, sigma, 1.0)


def effective_kernel(
    kernel: jax.Array, gamma: jax.Array, sigma: jax.Array, *, dtype: jax.typing.DTypeLike | None = None
) -> jax.Array:
    """Computes Ŵ = (γ/σ)·W for a known σ, in `dtype` or else the kernel's type; `gamma` and `sigma` have shape ()."""
    return (kernel.astype(jnp.float32) * _ratio(gamma, sigma)).astype(kernel.dtype if dtype is None else dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(4,))
def _reparametrize(
    kernel: jax.Array, gamma: jax.Array, u: jax.Array, basis: jax.Array | None, dtype: jax.typing.DTypeLike
) -> tuple[Any, ...]:
    step = power_step(kernel, u, basis)
    return effective_kernel(kernel, gamma, step.sigma, dtype=dtype), step.u, step.sigma, step.basis


@_reparametrize.defjvp
def _reparametrize_jvp(
    dtype: jax.typing.DTypeLike, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    kernel, gamma, u, basis = primals
    step = power_step(kernel, u, basis)
    effective = effective_kernel(kernel, gamma, step.sigma, dtype=dtype)
    tangent = _effective_tangent(*tangents[:2], kernel, gamma, step.v, step.u, step.sigma, dtype)
    statistics = (step.u, step.sigma, step.basis)
    return (effective, *statistics), (tangent, *jax.tree.map(jnp.zeros_like, statistics))


# Transposed it recomputes, from its own arguments, all that has the kernel's size: of these only the kernel is saved.
@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(7,))
def _effective_tangent(
    d_kernel: jax.Array,
    d_gamma: jax.Array,
    kernel: jax.Array,
    gamma: jax.Array,
    v: jax.Array,
    u: jax.Array,
    sigma: jax.Array,
    dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """The directional derivative of Ŵ, in an order of operations whose transpose is that of the module docstring."""
    reciprocal = _ratio(jnp.float32(1.0), sigma)
    inputs = _input_axes(kernel, u.size)
    outer = _over_inputs(v, kernel, inputs) * _over_outputs(u, kernel, inputs)
    direct = (gamma * reciprocal) * d_kernel.astype(jnp.float32)
    along = jnp.where(sigma > TINY, jnp.sum(direct * outer), 0.0)
    # W is scaled before the sum that the transpose makes of this product, so that neither a tiny nor a huge W overflows
    # or underflows float32.
    return (direct + (d_gamma.astype(jnp.float32) - along) * (kernel.astype(jnp.float32) * reciprocal)).astype(dtype)


def reparametrize(
    kernel: jax.Array,
    gamma: jax.Array,
    u: jax.Array,
    *,
    basis: jax.Array | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    steps: int = 1,
    through_sigma: bool = True,
) -> Reparametrized:
    """Computes Ŵ = (γ/σ)·W after a power step from `u`, with the gradients stated in the module docstring.

    The backward pass saves nothing of the kernel's size except the kernel itself. Only the returned kernel carries a
    gradient; `u`, `sigma` and `basis` are statistics to store.

    Args:
      kernel: shape (*input_axes, *output_axes), any float type; computed in float32.
      gamma: shape ().
      u: shape (outputs,), float32. Its size tells which trailing axes of `kernel` are outputs.
      basis: shape (k − 1, outputs), see `power_step`.
      dtype: type of the returned kernel, `kernel.dtype` if None.
      steps: power steps, each of which reads the kernel twice; the paper makes one.
      through_sigma: False takes σ as a constant: ∂L/∂W = (γ/σ)·G. Ŵ is the same; the gradient is no longer orthogonal to
        W. An ablation.
    """
    dtype = jnp.dtype(kernel.dtype if dtype is None else dtype)
    u, basis = lax.stop_gradient((u, basis))
    for _ in range(steps - 1):
        _, u, _, basis = power_step(lax.stop_gradient(kernel), u, basis)
    if not through_sigma:
        _, u, sigma, basis = power_step(lax.stop_gradient(kernel), u, basis)
        return Reparametrized(effective_kernel(kernel, gamma, sigma, dtype=dtype), u, sigma, basis)
    effective, *statistics = _reparametrize(kernel, gamma, u, basis, dtype)
    return Reparametrized(effective, *lax.stop_gradient(statistics))


def weight_normalized(kernel: jax.Array, gain: jax.Array, *, dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
    """Applies weight normalization (Salimans and Kingma, 2016): each output's weights get norm |gain|.

    Args:
      kernel: shape (*input_axes, *output_axes).
      gain: shape (outputs,), flattened over the output axes.
    """
    dtype = kernel.dtype if dtype is None else dtype
    matrix = matrix_view(kernel, gain.size).astype(jnp.float32)
    norms = column_norms(matrix)
    return (matrix * _ratio(gain, norms)).astype(dtype).reshape(kernel.shape)


def scaled(kernel: jax.Array, scale: jax.Array) -> jax.Array:
    """The kernel times a number, () or broadcastable to it, in the kernel's type."""
    return (kernel.astype(jnp.float32) * scale).astype(kernel.dtype)


def column_norms(matrix: jax.Array) -> jax.Array:
    """Euclidean norm of each column, shape (outputs,); differentiable even for a column of zeros."""
    square = jnp.sum(matrix.astype(jnp.float32) ** 2, axis=0)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
