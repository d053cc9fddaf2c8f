"""Steps measured by the size of the weights: the trust ratios of LARS and LAMB, and Hyperball.

Norms are those of each layer apart where layers are stacked, so that a scanned model trains as the unrolled one does.
"""

from collections.abc import Container
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sigmarep.nn.layers import Layers
from sigmarep.training.mesh import path_name


def frobenius_norm(layers: Layers, path: tuple[Any, ...], x: jax.Array) -> jax.Array:
    """‖x‖_F, of each layer where layers are stacked; broadcastable to x."""
    stacked = layers.stacked[path_name(path)]
    own = tuple(axis for axis in range(x.ndim) if axis not in stacked)
    return jnp.sqrt(jnp.sum(x * x, axis=own, keepdims=True))


def scale_by_trust_ratio(layers: Layers, coefficient: float = 1.0) -> optax.GradientTransformation:
    """Scales each layer's update u by coefficient · ‖W‖ / ‖u‖ (You et al., 2017 and 2020), by 1 where a norm is 0."""

    def update(updates, state, params=None):
        def scaled(path, u, w):
            w_norm, u_norm = frobenius_norm(layers, path, w), frobenius_norm(layers, path, u)
            usable = (w_norm > 0) & (u_norm > 0)
            ratio = coefficient * w_norm / jnp.where(usable, u_norm, 1.0)
            return u * jnp.where(usable, ratio, 1.0).astype(u.dtype)

        return jax.tree_util.tree_map_with_path(scaled, updates, params), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def hyperball(schedule: optax.Schedule, layers: Layers, matrices: Container[str]) -> optax.GradientTransformation:
    """Takes steps of length η‖W‖_F on the sphere of the matrix's norm (Wen et al., 2026, arXiv 2606.16899), to be put last.

    With u the update of the optimizer before, whatever its length, and R = ‖W‖_F,

        W ← R · normalized(W − η R · normalized(u)),   normalized(x) = x / ‖x‖_F

    R is the norm of the current W, which such steps leave as it was at the start. Weight decay has no place beside it. A
    matrix that is zero, or whose update is, stays.

    Args:
      schedule: η by update.
      layers: of the model.
      matrices: paths of the parameters that move like this; the updates of all others pass unchanged.
    """

    def init(params: Any) -> optax.ScaleByScheduleState:
        return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))

    def update(
        updates: Any, state: optax.ScaleByScheduleState, params: Any = None
    ) -> tuple[Any, optax.ScaleByScheduleState]:
        rate = schedule(state.count)

        def moved(path: tuple[Any, ...], step: jax.Array, w: jax.Array) -> jax.Array:
            if path_name(path) not in matrices:
                return step
            radius, length = frobenius_norm(layers, path, w), frobenius_norm(layers, path, step)
            moving = (radius > 0) & (length > 0)
            # The step has the sign of -u already.
            end = w + step * (rate * radius / jnp.where(moving, length, 1.0))
            end = end * (radius / jnp.where(moving, frobenius_norm(layers, path, end), 1.0))
            return jnp.where(moving, end - w, 0.0).astype(step.dtype)

        moved_all = jax.tree_util.tree_map_with_path(moved, updates, params)
        return moved_all, optax.ScaleByScheduleState(count=optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)
