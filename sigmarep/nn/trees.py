"""σReparam of plain parameters: a pair of pure functions, whatever framework the parameters come from.

    layers = trees.matrices(weights)                       # or sigmarep.nn.layers.describe(model.init, …) for Flax
    params, state = trees.init(weights, layers)            # γ = σ(W₀): the effective weights are the weights
    weights, state = trees.apply(params, state, layers)    # one power step; differentiate through it, train `params`

`params` is what an optimizer trains; `state` belongs beside it in a train state and in checkpoints. An evaluation calls
`apply` as well and drops the new state. Both work under `jit`, `vmap`, `scan` and `grad`.

Where a model is a tree itself, as in Equinox, `SigmaTree` is the pair in the place of the model:

    model = SigmaTree.of(model)                            # called as the model was, on effective weights
    model = model.advance()                                # after every update: one power step, stored
    plain = model.fold()                                   # the model, with the same outputs
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from sigmarep.core import norms, spectral
from sigmarep.nn.layers import Axes, Layer, path_name

State = dict[str, dict[str, jax.Array]]


class Params(NamedTuple):
    """The trained arrays: `weights`, a tree like the plain one, and `gamma`, by path, of the shape of the stacked axes."""

    weights: Any
    gamma: dict[str, jax.Array]


def matrices(weights: Any, rules: Sequence[tuple[str, Axes | None]] = ()) -> dict[str, Layer]:
    """The matrices of a tree by the names and shapes of its leaves, for parameters that no Flax module made.

    Args:
      weights: any pytree of arrays.
      rules: pairs of a regular expression and the axes of the leaves whose path it is found in, None to leave them plain;
        the first that is found decides. Other leaves of two or more axes have their last axis as output and all others as
        inputs; leaves of fewer axes are left plain.
    """
    layers = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(weights):
        if not hasattr(leaf, "ndim"):
            continue
        axes = Axes(inputs=tuple(range(leaf.ndim - 1)), outputs=(leaf.ndim - 1,)) if leaf.ndim > 1 else None
        for pattern, of_rule in rules:
            if re.search(pattern, path_name(path)):
                axes = of_rule
                break
        if axes is None:
            continue
        used = {*axes.inputs, *axes.outputs}
        stacked = tuple(axis for axis in range(leaf.ndim) if axis not in used)
        if max(used, default=-1) >= leaf.ndim or not axes.inputs or not axes.outputs or axes.batch:
            raise ValueError(
                f"rules: {axes} do not fit {path_name(path)} of shape {leaf.shape}; expected inputs and outputs among "
                "its axes, all others are stacked"
            )
        layers[path_name(path)] = Layer(
            inputs=axes.inputs, outputs=axes.outputs, name=path_name(path), shape=leaf.shape, stacked=stacked
        )
    return layers


def init(
    weights: Any, layers: Mapping[str, Layer], *, gamma_init: float | Literal["sigma"] = "sigma", power_vectors: int = 1
) -> tuple[Params, State]:
    """Begins the reparametrization of `weights`.

    Args:
      weights: any pytree of arrays.
      layers: of the leaves to reparametrize, by their paths.
      gamma_init: "sigma" for γ = σ(W), so that the effective weights are the weights; or a number.
      power_vectors: see `sigmarep.nn.linear.ReparametrizedLayer`.

    Returns:
      What to train, and the state: `u`, `sigma` and, of several power vectors, `basis` by path.

    Raises:
      ValueError: a layer has no leaf, or γ is neither "sigma" nor a number.
    """
    leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(weights)}
    gamma, state = {}, {}
    for path, layer in layers.items():
        if path not in leaves:
            raise ValueError(f"layers: {path!r} is not among the weights, which are {', '.join(sorted(leaves))}")
        lead = len(layer.stacked)
        rows, sigma = _over(lead, _start(power_vectors))(layer.matrices(leaves[path]))
        state[path] = {"u": rows[..., 0, :], "sigma": sigma} | (
            {"basis": rows[..., 1:, :]} if power_vectors > 1 else {}
        )
        if gamma_init == "sigma":
            gamma[path] = sigma
        elif isinstance(gamma_init, int | float):
            gamma[path] = jnp.full(sigma.shape, gamma_init, jnp.float32)
        else:
            raise ValueError(f"gamma_init = {gamma_init!r}: expected 'sigma' or a number")
    return Params(weights, gamma), state


def _start(power_vectors: int) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
    def start(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
        vectors = min(power_vectors, *matrix.shape)
        rows, sigma = norms.leading_vectors(matrix, vectors)
        return rows, sigma

    return start


def apply(params: Params, state: State, layers: Mapping[str, Layer]) -> tuple[Any, State]:
    """Makes one power step of every layer.

    Args:
      params: see `Params`. state: of the step before.
      layers: those that `init` was given.

    Returns:
      The effective weights, a tree like the plain one, with the gradients of `sigmarep.core.spectral`; and the new state.
    """
    new: State = {}

    def effective(path: tuple[Any, ...], leaf: Any) -> Any:
        own = path_name(path)
        if own not in layers:
            return leaf
        layer = layers[own]
        result = _over(len(layer.stacked), _reparametrized)(
            layer.ordered(leaf), params.gamma[own], state[own]["u"], state[own].get("basis")
        )
        new[own] = {"u": result.u, "sigma": result.sigma} | ({} if result.basis is None else {"basis": result.basis})
        return layer.restored(result.kernel)

    return jax.tree_util.tree_map_with_path(effective, params.weights), new


class SigmaTree(flax.struct.PyTreeNode):
    """A model that is a pytree, under σReparam: a tree with γ and the vectors of the power iteration among its leaves.

    Derivatives with respect to the vectors are zero, so that a whole tree may be given to an optimizer without weight
    decay; with it leave all but the kernels out (`sigmarep.nn.decay_mask(model.params)`).

    Attributes:
      params, state: see `init`. layers: of the reparametrized leaves.
    """

    params: Params
    state: State
    layers: tuple[Layer, ...] = flax.struct.field(pytree_node=False)

    @classmethod
    def of(cls, model: Any, layers: Mapping[str, Layer] | None = None, **options: Any) -> "SigmaTree":
        """Args: a model; its layers, `matrices(model)` if None; options of `init`."""
        layers = matrices(model) if layers is None else layers
        return cls(*init(model, layers, **options), tuple(layers.values()))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the model with its effective weights."""
        return self.fold()(*args, **kwargs)

    def fold(self) -> Any:
        """The plain model with the effective weights."""
        return apply(self.params, self.state, self._by_path())[0]

    def advance(self) -> "SigmaTree":
        """The same with one power step stored: for after an update."""
        return self.replace(state=apply(self.params, self.state, self._by_path())[1])

    def _by_path(self) -> dict[str, Layer]:
        return {layer.name: layer for layer in self.layers}


def _reparametrized(
    kernel: jax.Array, gamma: jax.Array, u: jax.Array, basis: jax.Array | None
) -> spectral.Reparametrized:
    return spectral.reparametrize(kernel, gamma, u, basis=basis)


def _over(axes: int, function: Callable[..., Any]) -> Callable[..., Any]:
    for _ in range(axes):
        function = jax.vmap(function)
    return function
