"""Steps measured by the size of the weights: the trust ratios of LARS and LAMB, Hyperball, rates of queries and keys.

Norms are those of each layer apart where layers are stacked, so that a scanned model trains as the unrolled one does.
"""

from collections.abc import Container
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sigmarep.errors import BadInput
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


def unit_kernels(layers: Layers, matrices: Container[str]) -> optax.GradientTransformation:
    """Keeps every vector of a matrix along the residual stream at length 1 (nGPT, Loshchilov et al., 2024).

    Of a layer that reads the stream these are the weights of each output, of one that adds to it those of each input. To be
    put last. The first update makes them so, where the authors normalize before it. A vector that is zero stays.

    Args:
      layers: of the model; a layer's `adds` tells the two kinds apart.
      matrices: paths of the parameters; the updates of all others pass unchanged.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        def moved(path: tuple[Any, ...], step: jax.Array, w: jax.Array) -> jax.Array:
            if (name := path_name(path)) not in matrices:
                return step
            layer = layers[name]
            end = w + step
            along = layer.outputs if layer.adds else layer.inputs
            length = jnp.sqrt(jnp.sum(end * end, axis=along, keepdims=True))
            return (end / jnp.where(length > 0, length, 1.0) - w).astype(step.dtype)

        return jax.tree_util.tree_map_with_path(moved, updates, params), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


class QueryKeyState(NamedTuple):
    """`norms`: for every kernel of queries ‖W_K‖_F at the start, for every one of keys ‖W_Q‖_F; a zero for other
    parameters."""

    norms: Any


def scale_queries_and_keys(layers: Layers) -> optax.GradientTransformation:
    """Multiplies the steps of W_Q by ‖W_K⁰‖/‖W_K‖, and those of W_K by ‖W_Q⁰‖/‖W_Q‖, with ⁰ for the start.

    Anson and Aitchison, 2025 (arXiv 2511.21377): rates η_Q ∝ 1/‖W_K‖ and η_K ∝ 1/‖W_Q‖ bound how far a step moves the
    logits, however large the kernels are. That much was read, in a summary. The norm of whole kernels by Frobenius, and the
    factor that makes the rates at the start the plain ones, are this project's choice.

    Args:
      layers: of the model; its attention states what its projections make.

    Raises:
      BadInput: queries and keys share a kernel, or there are none.
    """
    partners = _partners(layers)

    def norms_of_partners(params: Any) -> Any:
        leaves = jax.tree_util.tree_leaves_with_path(params)
        norms = {path_name(path): frobenius_norm(layers, path, w) for path, w in leaves if path_name(path) in partners}
        return jax.tree_util.tree_map_with_path(
            lambda path, _: norms[partners[path_name(path)]] if path_name(path) in partners else jnp.zeros(()), params
        )

    def update(updates: Any, state: QueryKeyState, params: Any = None) -> tuple[Any, QueryKeyState]:
        def scaled(path: tuple[Any, ...], step: jax.Array, start: jax.Array, norm: jax.Array) -> jax.Array:
            if path_name(path) not in partners:
                return step
            usable = (start > 0) & (norm > 0)
            return (step * jnp.where(usable, start / jnp.where(usable, norm, 1.0), 1.0)).astype(step.dtype)

        norms = norms_of_partners(params)
        return jax.tree_util.tree_map_with_path(scaled, updates, state.norms, norms), state

    return optax.GradientTransformation(lambda params: QueryKeyState(norms_of_partners(params)), update)


def _partners(layers: Layers) -> dict[str, str]:
    """The kernel of the keys by that of the queries of each attention, and the reverse."""
    by_module: dict[str, dict[str, str]] = {}
    for layer in layers.values():
        if set(layer.makes) & {"query", "key"}:
            if len(layer.makes) > 1:
                raise BadInput("config.optimizer.query_key_rates = True: expected config.model.qkv = 'separate'")
            by_module.setdefault(layer.module.rpartition("/")[0], {})[layer.makes[0]] = layer.name
    if not by_module:
        raise BadInput(
            "config.optimizer.query_key_rates = True: the model says of no kernel that it makes queries or keys"
        )
    pairs = [(names["query"], names["key"]) for names in by_module.values()]
    return {one: other for pair in pairs for one, other in (pair, pair[::-1])}
