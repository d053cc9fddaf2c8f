"""Magnitude-direction decoupling: a matrix's direction, and the sizes of its rows and columns, learned apart."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sigmarep.nn.layers import Layer
from sigmarep.training.mesh import path_name
from sigmarep.training.spectral_steps import as_stack

# softplus of it is 1.
RAW_ONE = math.log(math.expm1(1.0))

# Raw gains of the inputs (layers, inputs) and of the outputs (layers, outputs) of a matrix.
Gains = tuple[jax.Array, jax.Array]


class MagnitudeState(NamedTuple):
    """State of `decouple_magnitudes`; dictionaries are by the matrix's path.

    Attributes:
      step: updates so far, ().
      base, moments: states of the directions' optimizer and of the gains' Adam.
      gains: raw ones; a gain is their softplus.
      radii: Frobenius norms (layers,) of the directions.
    """

    step: jax.Array
    base: Any
    moments: Any
    gains: dict[str, Gains]
    radii: dict[str, jax.Array]


def decouple_magnitudes(
    base: optax.GradientTransformation,
    matrices: Mapping[str, Layer],
    *,
    schedule: optax.Schedule,
    adam: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """Magnitude-direction decoupling (Hägele et al., 2026, arXiv 2606.25971, algorithm 2) of an optimizer.

    A matrix is W = diag(r) Ŵ diag(c), with ‖Ŵ‖_F as it was at the start and gains r and c, softplus of what is learned, 1
    at first. The model has W alone. With G = ∂L/∂W an update is

        Ŵ ← ‖Ŵ‖_F · normalized(Ŵ + base(diag(r) G diag(c))),    raw r, raw c ← Adam(their gradients at the old Ŵ, r, c)

    The algorithm is taken from two independent implementations that cite it; the paper itself was not read. Theirs also
    keep embeddings and the head at rows of norm 1, and scale Muon's steps by √max(outputs/inputs, inputs/outputs); here
    hidden matrices alone are decoupled, and `base` steps as it does without. Weight decay in `base` has next to no effect
    on them. A matrix that is zero stays.

    Args:
      base: gives whole steps, with their learning rate and sign.
      matrices: by '/'-joined path of the parameter; all others are `base`'s.
      schedule: learning rate of the gains by update.
      adam: their moments; without a learning rate.
    """

    def init(params: Any) -> MagnitudeState:
        gains, radii = {}, {}
        for name, w in _chosen(params, matrices).items():
            stack = as_stack(w, matrices[name])
            inputs, outputs = (jnp.full((len(stack), size), RAW_ONE) for size in stack.shape[1:])
            gains[name] = (inputs, outputs)
            radii[name] = jnp.sqrt(jnp.sum(stack.astype(jnp.float32) ** 2, axis=(1, 2)))
        return MagnitudeState(jnp.zeros((), jnp.int32), base.init(params), adam.init(gains), gains, radii)

    def update(updates: Any, state: MagnitudeState, params: Any = None) -> tuple[Any, MagnitudeState]:
        weights, gradients = (
            {name: as_stack(x, matrices[name]).astype(jnp.float32) for name, x in _chosen(tree, matrices).items()}
            for tree in (params, updates)
        )
        scales = {name: _scale(*gains) for name, gains in state.gains.items()}
        directions = {name: w / scales[name] for name, w in weights.items()}
        steps, base_state = base.update(
            _replaced(updates, matrices, {name: g * scales[name] for name, g in gradients.items()}),
            state.base,
            _replaced(params, matrices, directions),
        )
        own = {
            name: jax.vjp(lambda *raw, name=name: directions[name] * _scale(*raw), *gains)[1](gradients[name])
            for name, gains in state.gains.items()
        }
        moved, moments = adam.update(own, state.moments, state.gains)
        rate = schedule(state.step)
        gains = jax.tree.map(lambda raw, step: raw - rate * step, state.gains, moved)

        changes = {}
        for name, step in _chosen(steps, matrices).items():
            end = directions[name] + as_stack(step, matrices[name])
            length = jnp.sqrt(jnp.sum(end**2, axis=(1, 2)))
            onto_sphere = state.radii[name] / jnp.where(length > 0, length, 1.0)
            changes[name] = end * onto_sphere[:, None, None] * _scale(*gains[name]) - weights[name]
        new = MagnitudeState(optax.safe_increment(state.step), base_state, moments, gains, state.radii)
        return _replaced(steps, matrices, changes), new

    return optax.GradientTransformation(init, update)


def _scale(inputs: jax.Array, outputs: jax.Array) -> jax.Array:
    """The products of the gains, (layers, inputs, outputs)."""
    return jax.nn.softplus(inputs)[:, :, None] * jax.nn.softplus(outputs)[:, None, :]


def _chosen(tree: Any, matrices: Mapping[str, Layer]) -> dict[str, jax.Array]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_name(path): x for path, x in leaves if path_name(path) in matrices}


def _replaced(tree: Any, matrices: Mapping[str, Layer], stacks: Mapping[str, jax.Array]) -> Any:
    """The tree with the matrices that `stacks` has."""

    def leaf(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        stack = stacks.get(name := path_name(path))
        return x if stack is None else matrices[name].restored(stack).astype(x.dtype)

    return jax.tree_util.tree_map_with_path(leaf, tree)
