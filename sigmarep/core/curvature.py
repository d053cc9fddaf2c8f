"""Sharpness: the largest eigenvalues of a loss's Hessian, from products with vectors alone.

With H the Hessian at the parameters w, gradient descent of rate η is stable on a quadratic while

    λ_max(H) < 2/η.                                                                     (1)

With momentum β₁ (an average, (1 − β₁) times the gradient added) the bound is (2 + 2β₁)/((1 − β₁)η), and for Adam it holds
of the preconditioned Hessian P^−½ H P^−½, P = (1 − β₁ᵗ)·diag(√v̂ + ε): 38/η at β₁ = 0.9 (Cohen et al., 2022, "Adaptive
gradient methods at the edge of stability").                                            (2)

Vectors here are flat, shape (n,), float32; `jax.flatten_util.ravel_pytree` makes them.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Product = Callable[[jax.Array], jax.Array]


class Tridiagonal(NamedTuple):
    """The symmetric matrix that Lanczos iteration makes: `diagonal` (m,), `beside` (m,), whose last element says how much
    of the space is left; and the orthonormal `basis` (m, n)."""

    diagonal: jax.Array
    beside: jax.Array
    basis: jax.Array


def hessian_product(loss: Callable[[jax.Array], jax.Array], at: jax.Array) -> Product:
    """v ↦ H v for the Hessian of `loss` at `at`, forward over reverse: about four times the cost of a gradient."""
    return lambda vector: jax.jvp(jax.grad(loss), (at,), (vector,))[1]


def preconditioned(product: Product, diagonal: jax.Array) -> Product:
    """v ↦ P^−½ H P^−½ v for P = diag(`diagonal`), which must be positive."""
    root = jax.lax.rsqrt(diagonal)
    return lambda vector: root * product(root * vector)


def lanczos(product: Product, start: jax.Array, iterations: int) -> Tridiagonal:
    """Lanczos iteration with full reorthogonalisation.

    Args:
      product: v ↦ A v for a symmetric A.
      start: (n,), not zero; a random vector reaches all eigenvectors.
      iterations: m ≥ 1, one product each. Beyond the dimension of what A makes of `start` the rest of the result is zero.
    """
    first = start / jnp.linalg.norm(start)
    basis = jnp.zeros((iterations, start.size), jnp.float32).at[0].set(first)

    def step(i, carry):
        basis, diagonal, beside = carry
        image = product(basis[i])
        diagonal = diagonal.at[i].set(image @ basis[i])
        # Twice is enough (Giraud et al., 2005); rows that are still zero take nothing away.
        for _ in range(2):
            image = image - (basis @ image) @ basis
        length = jnp.linalg.norm(image)
        # What is left is rounding: the space is exhausted.
        done = length <= 1e-6 * jnp.max(jnp.abs(diagonal))
        beside = beside.at[i].set(jnp.where(done, 0.0, length))
        following = jnp.where(done, 0.0, image / jnp.where(done, 1.0, length))
        return basis.at[i + 1].set(following, mode="drop"), diagonal, beside

    zeros = jnp.zeros(iterations, jnp.float32)
    basis, diagonal, beside = lax.fori_loop(0, iterations, step, (basis, zeros, zeros))
    return Tridiagonal(diagonal, beside, basis)


def ritz_values(found: Tridiagonal) -> np.ndarray:
    """Eigenvalues of the tridiagonal matrix, on the host, falling: the largest are the first to equal the operator's."""
    diagonal, beside = (np.asarray(x, np.float64) for x in (found.diagonal, found.beside))
    used = int(np.argmax(beside == 0)) + 1 if (beside == 0).any() else len(diagonal)
    between = beside[: used - 1]
    matrix = np.diag(diagonal[:used]) + np.diag(between, 1) + np.diag(between, -1)
    return np.linalg.eigvalsh(matrix)[::-1]


def power_iteration(product: Product, start: jax.Array, iterations: int) -> tuple[jax.Array, jax.Array]:
    """The eigenvalue of largest magnitude, as the Rayleigh quotient, and its unit vector (n,).

    From the vector of a moment before, one iteration follows an operator that changes slowly.
    """

    def step(_, vector):
        image = product(vector)
        return image / jnp.maximum(jnp.linalg.norm(image), jnp.finfo(jnp.float32).tiny)

    vector = lax.fori_loop(0, iterations, step, start / jnp.linalg.norm(start))
    return vector @ product(vector), vector


def threshold(learning_rate: float, momentum: float = 0.0) -> float:
    """Equations 1 and 2: the sharpness from which a step of this rate no longer descends; ∞ at rate 0."""
    return float("inf") if learning_rate == 0 else (2 + 2 * momentum) / ((1 - momentum) * learning_rate)
