"""Sharpness: the largest eigenvalues of a loss's Hessian, computed from Hessian-vector products alone.

With H the Hessian at the parameters w, gradient descent of rate η is stable on a quadratic while

    λ_max(H) < 2/η.                                                                     (1)

With momentum β₁ (a running average that adds (1 − β₁) times the gradient) the bound is (2 + 2β₁)/((1 − β₁)η). For Adam the
same bound holds for the preconditioned Hessian P^−½ H P^−½ with P = (1 − β₁ᵗ)·diag(√v̂ + ε): 38/η at β₁ = 0.9 (Cohen et
al., 2022, "Adaptive gradient methods at the edge of stability").                      (2)

Vectors are flat, of shape (n,) and float32, as `jax.flatten_util.ravel_pytree` makes them.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Product = Callable[[jax.Array], jax.Array]


class Tridiagonal(NamedTuple):
    """The symmetric tridiagonal matrix of a Lanczos iteration.

    Attributes:
      diagonal: (m,).
      off_diagonal: (m,). Element i couples vectors i and i + 1; the last is the norm of the residual, 0 if the basis
        spans the whole Krylov space.
      basis: (m, n), orthonormal rows.
    """

    diagonal: jax.Array
    off_diagonal: jax.Array
    basis: jax.Array


def hessian_product(loss: Callable[[jax.Array], jax.Array], at: jax.Array) -> Product:
    """Returns v ↦ H v for the Hessian of `loss` at `at`, forward over reverse: about four times a gradient's cost."""
    return lambda vector: jax.jvp(jax.grad(loss), (at,), (vector,))[1]


def preconditioned(product: Product, diagonal: jax.Array) -> Product:
    """Returns v ↦ P^−½ H P^−½ v for P = diag(`diagonal`), which must be positive."""
    root = jax.lax.rsqrt(diagonal)
    return lambda vector: root * product(root * vector)


def lanczos(product: Product, start: jax.Array, iterations: int) -> Tridiagonal:
    """Runs Lanczos iteration with full reorthogonalization.

    Args:
      product: v ↦ A v for a symmetric A.
      start: (n,), not zero; a random vector reaches all eigenvectors.
      iterations: m ≥ 1, one product each. Once the Krylov space of `start` is exhausted, the rest of the result is zero.
    """
    first = start / jnp.linalg.norm(start)
    basis = jnp.zeros((iterations, start.size), jnp.float32).at[0].set(first)

    def step(i: int, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        basis, diagonal, off_diagonal = carry
        image = product(basis[i])
        diagonal = diagonal.at[i].set(image @ basis[i])
        # Twice is enough (Giraud et al., 2005); rows that are still zero subtract nothing.
        for _ in range(2):
            image = image - (basis @ image) @ basis
        length = jnp.linalg.norm(image)
        # Only rounding remains: the Krylov space is exhausted.
        done = length <= 1e-6 * jnp.max(jnp.abs(diagonal))
        off_diagonal = off_diagonal.at[i].set(jnp.where(done, 0.0, length))
        following = jnp.where(done, 0.0, image / jnp.where(done, 1.0, length))
        return basis.at[i + 1].set(following, mode="drop"), diagonal, off_diagonal

    zeros = jnp.zeros(iterations, jnp.float32)
    basis, diagonal, off_diagonal = lax.fori_loop(0, iterations, step, (basis, zeros, zeros))
    return Tridiagonal(diagonal, off_diagonal, basis)


def ritz_values(tridiagonal: Tridiagonal) -> np.ndarray:
    """Eigenvalues of the tridiagonal matrix, largest first, computed on the host; the largest converge first."""
    diagonal, off_diagonal = (np.asarray(x, np.float64) for x in (tridiagonal.diagonal, tridiagonal.off_diagonal))
    used = int(np.argmax(off_diagonal == 0)) + 1 if (off_diagonal == 0).any() else len(diagonal)
    between = off_diagonal[: used - 1]
    matrix = np.diag(diagonal[:used]) + np.diag(between, 1) + np.diag(between, -1)
    return np.linalg.eigvalsh(matrix)[::-1]


def power_iteration(product: Product, start: jax.Array, iterations: int) -> tuple[jax.Array, jax.Array]:
    """Returns the eigenvalue of largest magnitude, as a Rayleigh quotient, and its unit eigenvector (n,).

    Started from the previous eigenvector, a single iteration follows an operator that changes slowly.
    """

    def step(_: int, vector: jax.Array) -> jax.Array:
        image = product(vector)
        return image / jnp.maximum(jnp.linalg.norm(image), jnp.finfo(jnp.float32).tiny)

    vector = lax.fori_loop(0, iterations, step, start / jnp.linalg.norm(start))
    return vector @ product(vector), vector


def threshold(learning_rate: float, momentum: float = 0.0) -> float:
    """Largest sharpness at which a step of this rate is stable (equations 1 and 2); ∞ at rate 0."""
    return float("inf") if learning_rate == 0 else (2 + 2 * momentum) / ((1 - momentum) * learning_rate)
