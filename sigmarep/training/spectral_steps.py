"""Steps measured by the singular values of matrices: AdamW²'s bound, SPECTRA's soft clipping, the spectral sphere.

Every layer of a stack is a matrix of its own, so that a scanned model trains as the unrolled one does.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sigmarep.core import spectral
from sigmarep.core.matrix_functions import polar_factor, softly_clipped
from sigmarep.nn.layers import Layer
from sigmarep.training.mesh import path_name


def as_stack(x: jax.Array, layer: Layer) -> jax.Array:
    """A parameter as matrices (layers, inputs, outputs), one where it is not stacked."""
    matrices = layer.matrices(x)
    return matrices.reshape(-1, *matrices.shape[-2:])


def _followed(stack: jax.Array, u: jax.Array, iterations: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Leading vectors (layers, inputs), (layers, outputs) and norms (layers,) of matrices, by power steps from u."""
    step = jax.vmap(spectral.power_step)(stack, u)
    for _ in range(iterations - 1):
        step = jax.vmap(spectral.power_step)(stack, step.u)
    return step.v, step.u, step.sigma


class SpectralBoundState(NamedTuple):
    """`u`: for every bounded matrix, the leading right singular vectors (layers, outputs) after the last step; a zero for
    other parameters."""

    u: Any


def bound_spectral_norm(
    ratio: float, matrices: Mapping[str, Layer], *, iterations: int = 4
) -> optax.GradientTransformation:
    """Shortens the update ΔW of every one of `matrices` until ‖ΔW‖₂ ≤ ratio · ‖W‖₂ (AdamW², Qi et al., 2025).

    ‖W‖₂ comes from power steps that start where the step before ended. ΔW is another matrix at every step; its power
    steps start at its largest row. Both norms are found from below. A matrix that is zero has no bound.

    Args:
      matrices: by '/'-joined path of the parameter; `sigmarep.nn.layers.describe` makes them.
    """

    def init(params):
        def vectors(path, x):
            layer = matrices.get(path_name(path))
            if layer is None:
                return jnp.zeros(())
            layers, _, outputs = jax.eval_shape(lambda: as_stack(jnp.zeros(x.shape), layer)).shape
            return jnp.zeros((layers, outputs))

        return SpectralBoundState(jax.tree_util.tree_map_with_path(vectors, params))

    def update(updates, state, params=None):
        def bounded(path, update, w, u):
            layer = matrices.get(path_name(path))
            if layer is None:
                return update, u
            change = as_stack(update, layer).astype(jnp.float32)
            largest = jnp.argmax(jnp.sum(change**2, axis=2), axis=1)
            u, norm = _followed(as_stack(w, layer), u, iterations)[1:]
            start = jnp.take_along_axis(change, largest[:, None, None], axis=1)[:, 0]
            _, _, of_change = _followed(change, start, iterations)
            too_long = (of_change > ratio * norm) & (norm > 0)
            factor = jnp.where(too_long, ratio * norm / jnp.where(too_long, of_change, 1.0), 1.0)
            return layer.restored(change * factor[:, None, None]).astype(update.dtype), u

        pairs = jax.tree_util.tree_map_with_path(bounded, updates, params, state.u)
        shortened, u = jax.tree.transpose(jax.tree.structure(updates), jax.tree.structure((0, 0)), pairs)
        return shortened, SpectralBoundState(u)

    return optax.GradientTransformation(init, update)


class SoftClipState(NamedTuple):
    """`step`: updates so far, (). `warm`: True once the learning rate has been at its peak, ()."""

    step: jax.Array
    warm: jax.Array


def softly_clip(
    bound: float, matrices: Mapping[str, Layer], *, schedule: optax.Schedule, peak: Any
) -> optax.GradientTransformation:
    """SPECTRA (Jiang et al., 2026, arXiv 2603.14315): bends the singular values of a direction U below a bound.

    To be put after what makes directions and before decoupled weight decay and the learning rate:

        U ← √max(1, outputs / inputs) · (I + U Uᵀ/c²)^-½ U

    so that a singular value s becomes s / √(1 + s²/c²) times the factor. As in the authors' code, c is `bound` from the
    first time on that the learning rate η is at its peak, and before, in the warmup, bound · peak / η. They clip vectors
    and embeddings as well by default, in the same way; here hidden matrices alone. Their optional clipping of gradients is
    not here.

    Args:
      matrices: by '/'-joined path of the parameter; the directions of all others pass unchanged.
      schedule: η by update.
      peak: of the schedule.
    """

    def init(_: Any) -> SoftClipState:
        return SoftClipState(jnp.zeros((), jnp.int32), jnp.zeros((), bool))

    def update(updates: Any, state: SoftClipState, params: Any = None) -> tuple[Any, SoftClipState]:
        share = schedule(state.step) / jnp.where(peak > 0, peak, 1.0)
        # The schedule's product with the peak is rounded.
        warm = state.warm | (share > 1 - 1e-5)
        current = bound / jnp.where(warm | (share <= 0), 1.0, share)

        def clipped(path: tuple[Any, ...], u: jax.Array) -> jax.Array:
            layer = matrices.get(path_name(path))
            if layer is None:
                return u
            directions = as_stack(u, layer)
            factor = max(1.0, directions.shape[2] / directions.shape[1]) ** 0.5
            return layer.restored(factor * softly_clipped(directions, current)).astype(u.dtype)

        new = SoftClipState(optax.safe_increment(state.step), warm)
        return jax.tree_util.tree_map_with_path(clipped, updates), new

    return optax.GradientTransformation(init, update)


class SphereState(NamedTuple):
    """`step`: updates so far, (). `u`: leading vectors (layers, outputs) of every matrix by its path."""

    step: jax.Array
    u: dict[str, jax.Array]


def spectral_sphere(
    schedule: optax.Schedule, matrices: Mapping[str, Layer], *, radius: float = 1.0, iterations: int = 5
) -> optax.GradientTransformation:
    """Steepest descent on a sphere of the spectral norm (Xie et al., 2026, arXiv 2601.08393), to be put last.

    With M the momentum, whatever its length, R = radius · √(outputs / inputs), and v, u the leading singular vectors of W:

        W ← (R / ‖W‖₂) W − η R msign(M / ‖M‖_F + λ v uᵀ),   λ so that ⟨v uᵀ, msign(M / ‖M‖_F + λ v uᵀ)⟩ = 0

    where msign is the polar factor: no step changes ‖W‖₂ to first order. Formulas and defaults are those of the authors'
    reference implementation (Spectral-Sphere-Optimizer). ‖W‖₂ comes from power steps that start where those of the step
    before ended. λ is bisected between ±2‖M‖_*/‖M‖_F, where the product has the sign of λ, to a millionth of that; theirs
    is searched from the last one on. Weight decay of such matrices would change nothing. A matrix that is zero takes the
    step alone.

    Args:
      schedule: η by update.
      matrices: by '/'-joined path of the parameter; the updates of all others pass unchanged.
      radius: multiple of μP's radius.
      iterations: power steps of an update.
    """

    def init(params: Any) -> SphereState:
        shapes = {path_name(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(params)}
        starts = {}
        for name, layer in matrices.items():
            stack = jax.eval_shape(lambda layer=layer, name=name: as_stack(jnp.zeros(shapes[name]), layer)).shape
            starts[name] = jnp.ones((stack[0], stack[2])) / stack[2] ** 0.5
        return SphereState(jnp.zeros((), jnp.int32), starts)

    def update(updates: Any, state: SphereState, params: Any = None) -> tuple[Any, SphereState]:
        rate, new = schedule(state.step), dict(state.u)

        def moved(path: tuple[Any, ...], step: jax.Array, w: jax.Array) -> jax.Array:
            layer = matrices.get(name := path_name(path))
            if layer is None:
                return step
            stack = as_stack(w, layer).astype(jnp.float32)
            v, new[name], norm = _followed(stack, state.u[name], iterations)
            size = radius * (stack.shape[2] / stack.shape[1]) ** 0.5
            normal = jnp.where(norm[:, None, None] > 0, v[:, :, None] * new[name][:, None, :], 0.0)
            # The step has the sign of -M.
            direction = _tangent(-as_stack(step, layer), normal)
            retraction = jnp.where(norm > 0, size / jnp.where(norm > 0, norm, 1.0) - 1.0, 0.0)
            change = retraction[:, None, None] * stack - rate * size * direction
            return layer.restored(change).astype(step.dtype)

        moved_all = jax.tree_util.tree_map_with_path(moved, updates, params)
        return moved_all, SphereState(optax.safe_increment(state.step), new)

    return optax.GradientTransformation(init, update)


def _tangent(momentum: jax.Array, normal: jax.Array, *, halvings: int = 22) -> jax.Array:
    """msign(M̂ + λΘ) with ⟨Θ, msign(M̂ + λΘ)⟩ = 0, of stacks M and Θ (layers, inputs, outputs); M̂ = M/‖M‖_F."""
    length = jnp.sqrt(jnp.sum(momentum**2, axis=(1, 2), keepdims=True))
    unit = momentum.astype(jnp.float32) / jnp.where(length > 0, length, 1.0)

    def halved(_: int, bracket: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bracket
        middle = (low + high) / 2
        is_above = jnp.sum(normal * polar_factor(unit + middle * normal), axis=(1, 2), keepdims=True) > 0
        return jnp.where(is_above, low, middle), jnp.where(is_above, middle, high)

    # ⟨M̂, msign(M̂)⟩ is the sum of the singular values of M̂; the product grows with λ.
    most = 2 * jnp.sum(unit * polar_factor(unit), axis=(1, 2), keepdims=True)
    low, high = jax.lax.fori_loop(0, halvings, halved, (-most, most))
    return jnp.where(length > 0, polar_factor(unit + (low + high) / 2 * normal), 0.0)
