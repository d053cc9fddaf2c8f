"""σReparam (Zhai et al., ICML 2023, section 3.2), on arrays.

A kernel is read as the matrix W of shape (inputs, outputs). σReparam replaces it by

    Ŵ = (γ / σ(W)) · W,        σ(W) = vᵀ W u,

where γ is a learned scalar and u (outputs,), v (inputs,) come from one step of power iteration:

    v ← W u / ‖W u‖,        z = Wᵀ v,        u ← z / ‖z‖,        hence σ = ‖z‖.

The step reads W twice and σ needs no third read. Gradients pass through σ but not through u and v:

    ∂L/∂W = (γ/σ) · (G − (⟨G, W⟩/σ) · v uᵀ),        ∂L/∂γ = ⟨G, W⟩ / σ,        G = ∂L/∂Ŵ.

Everything is float32 whatever the compute type, and finite for zero, rank-deficient, tiny and huge kernels.
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
    """One step of power iteration: `v` (inputs,), `u` (outputs,) of unit norm, and `sigma` () = vᵀ W u."""

    v: jax.Array
    u: jax.Array
    sigma: jax.Array


class Reparametrised(NamedTuple):
    """`kernel`, the effective kernel Ŵ in the compute type; `u` and `sigma` to be stored, both float32."""

    kernel: jax.Array
    u: jax.Array
    sigma: jax.Array


def matrix_view(kernel: jax.Array, outputs: int) -> jax.Array:
    """Reads a kernel whose input axes come first as the matrix (inputs, outputs).

    Args:
      kernel: shape (*input_axes, *output_axes), for instance (d, heads, head_dim) or (kh, kw, in, out).
      outputs: product of the output axes. For (d, heads, head_dim) that is heads · head_dim, not head_dim.

    Raises:
      ValueError: no trailing axes multiply to `outputs`.
    """
    size = 1
    for axis in range(kernel.ndim - 1, -1, -1):
        size *= kernel.shape[axis]
        if size == outputs:
            return kernel.reshape(-1, outputs)
    raise ValueError(f"kernel of shape {kernel.shape}: no trailing axes multiply to outputs = {outputs}")


def _unit(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x/‖x‖ and ‖x‖ without overflow or underflow of the squares; a zero vector stays zero."""
    largest = jnp.max(jnp.abs(x))
    scale = jnp.where(largest > 0, largest, 1.0)
    x = x / scale
    norm = jnp.sqrt(jnp.sum(x * x))
    return x / jnp.where(norm > 0, norm, 1.0), norm * scale


def power_step(matrix: jax.Array, u: jax.Array) -> PowerStep:
    """One step of power iteration from `u`; σ's derivative in `matrix` is v uᵀ with u and v held fixed.

    Args:
      matrix: W, shape (inputs, outputs).
      u: shape (outputs,), the vector stored by the step before.
    """
    matrix = matrix.astype(jnp.float32)
    fixed = lax.stop_gradient(matrix)
    v, norm = _unit(fixed @ u)
    # A u in the null space of W would leave σ at 0 for good: start again from a dense vector.
    v = jnp.where(norm > 0, v, 1.0 / math.sqrt(matrix.shape[0]))
    z = v @ matrix
    u, _ = _unit(lax.stop_gradient(z))
    # Equal to ‖z‖ in value. Written as ⟨z, u⟩ so that every derivative, of any order, sees u and v as constants.
    return PowerStep(v=v, u=u, sigma=z @ u)


def svd_start(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The leading right singular vector u (outputs,) and the spectral norm () of `matrix` (inputs, outputs)."""
    matrix = matrix.astype(jnp.float32)
    largest = jnp.max(jnp.abs(matrix))
    scale = jnp.where(largest > 0, largest, 1.0)
    _, s, vh = jnp.linalg.svd(matrix / scale, full_matrices=False)
    return vh[0], s[0] * scale


def spectral_norm(matrix: jax.Array) -> jax.Array:
    """‖W‖₂ by the SVD; the reference for tests and reports, too slow for a training step."""
    return svd_start(matrix)[1]


def _ratio(gamma: jax.Array, sigma: jax.Array) -> jax.Array:
    # A zero kernel has no direction. Taking σ as 1 there leaves Ŵ = 0 and lets a zero-initialised kernel learn.
    return gamma / jnp.where(sigma > TINY, sigma, 1.0)


def _scaled(kernel, gamma, step: PowerStep, dtype) -> jax.Array:
    return (kernel.astype(jnp.float32) * _ratio(gamma, step.sigma)).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _reparametrise(kernel, gamma, u, dtype):
    step = power_step(matrix_view(kernel, u.size), u)
    return _scaled(kernel, gamma, step, dtype), step.u, step.sigma


def _reparametrise_fwd(kernel, gamma, u, dtype):
    step = power_step(matrix_view(kernel, u.size), u)
    return (_scaled(kernel, gamma, step, dtype), step.u, step.sigma), (kernel, gamma, step)


def _reparametrise_bwd(dtype, residuals, cotangents):
    kernel, gamma, step = residuals
    g = cotangents[0].astype(jnp.float32)
    w = kernel.astype(jnp.float32)
    nonzero = step.sigma > TINY
    reciprocal = _ratio(jnp.float32(1.0), step.sigma)
    # Scaled before it is summed, so that neither a tiny nor a huge W leaves float32.
    d_gamma = jnp.sum(g * (w * reciprocal))
    rank_one = jnp.where(nonzero, d_gamma, 0.0)
    outer = (step.v[:, None] * step.u[None, :]).reshape(kernel.shape)
    d_kernel = (gamma * reciprocal) * (g - rank_one * outer)
    return d_kernel.astype(kernel.dtype), d_gamma.astype(gamma.dtype), jnp.zeros_like(step.u)


_reparametrise.defvjp(_reparametrise_fwd, _reparametrise_bwd)


def reparametrise(kernel: jax.Array, gamma: jax.Array, u: jax.Array, *, dtype=None) -> Reparametrised:
    """Ŵ = (γ/σ)·W after one power step from `u` (module docstring), with the gradients stated there.

    Nothing of the kernel's size is saved for the backward pass but the kernel itself. `u` and `sigma` of the result
    carry no gradient: they are statistics to store.

    Args:
      kernel: shape (*input_axes, *output_axes), any float type; computed in float32.
      gamma: shape ().
      u: shape (outputs,), float32; says how many trailing elements of `kernel` are outputs.
      dtype: type of the returned kernel, `kernel.dtype` if None.
    """
    dtype = jnp.dtype(kernel.dtype if dtype is None else dtype)
    return Reparametrised(*_reparametrise(kernel, gamma, lax.stop_gradient(u), dtype))


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


def product_norm(first: jax.Array, second: jax.Array) -> jax.Array:
    """‖A Bᵀ‖₂ of two tall matrices without forming the product.

    ‖ABᵀ‖₂² is the largest eigenvalue of (AᵀA)(BᵀB), and of the symmetric matrix √(BᵀB)·AᵀA·√(BᵀB).

    Args:
      first, second: shape (..., d, n).

    Returns:
      shape (...).
    """
    first, second = first.astype(jnp.float32), second.astype(jnp.float32)
    values, vectors = jnp.linalg.eigh(jnp.einsum("...di,...dj->...ij", second, second))
    root = vectors * jnp.sqrt(jnp.maximum(values, 0.0))[..., None, :]
    # The singular values of A·root are those of A Bᵀ: root·rootᵀ = BᵀB.
    tall = first @ root
    gram = jnp.einsum("...di,...dj->...ij", tall, tall)
    return jnp.sqrt(jnp.maximum(jnp.linalg.eigvalsh(gram)[..., -1], 0.0))
