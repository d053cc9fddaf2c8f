"""Weights of a file, or of another run, brought into the form of a model's parameters."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sigmarep.errors import BadInput
from sigmarep.nn import trees
from sigmarep.nn.layers import Layer, Layers, path_name
from sigmarep.weights import canonical, files, folding, names

# Names shown of a list that may be long.
SHOWN = 8
# Parameters that follow from the kernels that are loaded.
DERIVED = ("gamma", "kernel_scale")

Shapes = Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Weights:
    """Weights in the form of a model's parameters.

    Attributes:
      params: float32 arrays by path. Kernels are effective ones; γ and u are made of them (`begin`).
      at_start: paths of parameters that keep their initial values.
      unused: names in the file that the model has no use for.
      notes: lines on what was changed: positions resampled, a head replaced.
    """

    params: dict[str, np.ndarray]
    at_start: tuple[str, ...]
    unused: tuple[str, ...]
    notes: tuple[str, ...]

    def table(self) -> list[str]:
        """Lines that account for every parameter of the model and every array of the file."""
        whole = len(self.params) + len(self.at_start)
        return [
            f"  {len(self.params)} of {whole} parameters loaded",
            *(f"  {note}" for note in self.notes),
            *([f"  at their start: {_listed(self.at_start)}"] if self.at_start else []),
            *([f"  unused: {_listed(self.unused)}"] if self.unused else []),
        ]


def _listed(words: Sequence[str]) -> str:
    more = f" and {len(words) - SHOWN} more" if len(words) > SHOWN else ""
    return ", ".join(words[:SHOWN]) + more


def fit(
    arrays: Mapping[str, np.ndarray],
    layers: Layers,
    *,
    word: str,
    path: str,
    skip: Sequence[str] = (),
    renamed: Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]] | None = None,
) -> Weights:
    """Finds a model's parameters among the arrays of a file.

    Args:
      arrays: of the file, by name.
      layers: of the model.
      word: whose names they have, one of `names.NAMES` or "sigmarep".
      path: of the file, for messages.
      skip: regular expressions on paths of parameters that keep their initial values.
      renamed: gives the arrays the paths of this project's plain parameters, in place of the names that `word` stands for.

    Raises:
      BadInput: an array has another shape than the model's, a block is missing, or none is of this model.
    """
    try:
        arrays = folding.folded(arrays)
        if renamed is not None:
            arrays, word = dict(renamed(arrays)), "sigmarep"
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise BadInput(f"{files.FIELD} = {path!r}: {error}") from error
    leaves = jax.tree_util.tree_leaves_with_path(layers.variables["params"])
    shapes = {path_name(each): tuple(leaf.shape) for each, leaf in leaves}
    shapes = {name: shape for name, shape in shapes.items() if name.rpartition("/")[2] not in DERIVED}
    return _Fit(layers, shapes, path, _skipped(skip, shapes)).fit(arrays, word)


def _skipped(skip: Sequence[str], shapes: Shapes) -> set[str]:
    for rule in skip:
        if not any(re.search(rule, name) for name in shapes):
            raise BadInput(f"config.init_from.skip = {tuple(skip)!r}: {rule!r} finds none of the model's parameters")
    return {name for name in shapes if any(re.search(rule, name) for rule in skip)}


class _Fit:
    """One call of `fit`."""

    def __init__(self, layers: Layers, shapes: Shapes, path: str, skipped: set[str]):
        self.layers, self.shapes, self.path = layers, shapes, path
        # An output layer of another size is left at its start as a whole, with its bias.
        self.left = set(skipped)
        self.outputs = {layer.module for layer in layers.values() if layer.role == "output"}
        self.notes: list[str] = []

    def fit(self, arrays: Mapping[str, np.ndarray], word: str) -> Weights:
        wanted = canonical.split_shapes(self.shapes)
        loaded = self._by_canonical_name(arrays, word, wanted)
        self._check_depths(loaded, wanted)
        params = {}
        for name, shape in self.shapes.items():
            parts = [part for part, _ in canonical.pieces(name, shape)]
            if name in self.left or not any(part in loaded for part in parts):
                continue
            if missing := [part for part in parts if part not in loaded]:
                raise BadInput(f"{files.FIELD} = {self.path!r}: has no {missing[0]}, only others of {name}")
            params[name] = canonical.assembled(name, shape, lambda part: self._shaped(part, loaded[part], wanted[part]))
        for name in [each for each in params if each in self.left]:
            del params[name]
        if not params:
            raise BadInput(
                f"{files.FIELD} = {self.path!r}: none of its arrays is of this model under the names {word!r}; it has "
                f"{_listed(list(arrays)) or 'none'}, and the model {_listed(list(self.shapes))}; see config.init_from.names"
            )
        used = {loaded[part][0] for name in params for part, _ in canonical.pieces(name, self.shapes[name])}
        return Weights(
            params=params,
            at_start=tuple(name for name in self.shapes if name not in params),
            unused=tuple(name for name in arrays if name not in used),
            notes=tuple(self.notes),
        )

    def _by_canonical_name(
        self, arrays: Mapping[str, np.ndarray], word: str, wanted: Shapes
    ) -> dict[str, tuple[str, np.ndarray]]:
        """The file's own name and the array, by canonical name in the model."""
        root = canonical.root(wanted)
        if word != "sigmarep":
            if root is None:
                raise BadInput(f"{files.FIELD} = {self.path!r}: has weights of a ViT, which the model is not")
            inside = {name.removeprefix(root): shape for name, shape in wanted.items() if name.startswith(root)}
            return {f"{root}{name}": each for name, each in names.NAMES[word].load(arrays, inside).items()}
        own = {
            part: (path, np.asarray(x)[index] if index else np.asarray(x))
            for path, x in folding.normalized(arrays).items()
            for part, index in canonical.pieces(path, np.shape(x))
        }
        theirs = canonical.root(own)
        if root is None or theirs is None or root == theirs:
            return own
        # A ViT that is a part of one of the two models, as the encoder of contrastive learning is.
        return {f"{root}{name.removeprefix(theirs)}": each for name, each in own.items() if name.startswith(theirs)}

    def _check_depths(self, loaded: Mapping[str, Any], wanted: Shapes) -> None:
        theirs, ours = canonical.depths(loaded), canonical.depths(wanted)
        for module in theirs.keys() & ours.keys():
            if theirs[module] != ours[module]:
                raise BadInput(
                    f"{files.FIELD} = {self.path!r}: has {theirs[module]} blocks in {module}, and the model "
                    f"{ours[module]}; set config.model.depth"
                )

    def _shaped(self, part: str, loaded: tuple[str, np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
        """The array in the model's shape. Fills in zeros for what will be left at its start."""
        own, x = loaded
        if x.shape == shape:
            return x
        layer = self.layers.get(part)
        if layer is not None and layer.role == "position" and x.ndim == len(shape) == 3 and x.shape[2] == shape[2]:
            return self._resampled(own, x, shape)
        module = part.rpartition("/")[0]
        if module in self.outputs:
            lost = {name for name in self.shapes if name.rpartition("/")[0] == module}
            if not lost & self.left:
                self.notes.append(f"{module}: {x.shape[-1]} outputs there and {shape[-1]} here; begins anew")
            self.left |= lost
            return np.zeros(shape, np.float32)
        raise BadInput(
            f"{files.FIELD} = {self.path!r}: {own} has shape {x.shape} where the model's {part} has {shape}; choose "
            "config.model and config.data of the same sizes, or name it in config.init_from.skip"
        )

    def _resampled(self, own: str, x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        grids = [square_grid(length) for length in (x.shape[1], shape[1])]
        if None in grids:
            raise BadInput(
                f"{files.FIELD} = {self.path!r}: {own} has {x.shape[1]} positions where the model has {shape[1]}, and one "
                "of them is no square of patches"
            )
        (old, _), (new, _) = grids  # type: ignore[misc]
        if old != new:
            self.notes.append(f"{own}: {old} x {old} positions resampled to {new} x {new}")
        return resample_positions(x, shape[1])


def square_grid(length: int) -> tuple[int, int] | None:
    """Side of the square of patches among so many positions, and the number of those before it; None if there is none."""
    for prefix in range(3):
        side = math.isqrt(max(length - prefix, 0))
        if side and side * side == length - prefix:
            return side, prefix
    return None


def resample_positions(x: np.ndarray, length: int) -> np.ndarray:
    """Position embeddings of a square of patches for a square of another size.

    Bicubic with antialiasing, as timm does it. Positions before the patches, such as the class token's, stay; they are
    dropped if there is none in the result, and zero if there was none.

    Args:
      x: (1, positions, D).
      length: positions of the result.

    Raises:
      TypeError: either is no square.
    """
    (old, before), (new, prefix) = square_grid(x.shape[1]), square_grid(length)  # type: ignore[misc]
    grid = np.asarray(x[0, before:], np.float32).reshape(old, old, -1)
    if old != new:
        grid = np.asarray(jax.image.resize(grid, (new, new, grid.shape[-1]), "cubic", antialias=True))
    first = np.zeros((prefix, grid.shape[-1]), np.float32)
    first[: min(prefix, before)] = x[0, : min(prefix, before)]
    return np.concatenate([first, grid.reshape(new * new, -1)])[None]


def begin(variables: Mapping[str, Any], params: Mapping[str, jax.Array], layers: Layers) -> dict[str, Any]:
    """Initial variables with loaded parameters in place: γ = σ(W) and u the leading vector, so that Ŵ = W.

    Without a γ of its own (reparam="spectral") a layer's effective kernel is W/σ(W).

    Args:
      params: by path, as `Weights.params`.
    """
    merged = jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.asarray(params.get(path_name(path), x), x.dtype), variables["params"]
    )
    state = _copied(variables.get("spectral", {}))
    for path in params:
        layer = layers.get(path)
        if layer is not None and layer.reparam != "none":
            _reparametrize(merged, state, layer, params[path], layers)
    return {**variables, "params": merged, **({"spectral": state} if state else {})}


def _reparametrize(params: dict[str, Any], state: dict[str, Any], layer: Layer, kernel: Any, layers: Layers) -> None:
    """Writes γ, u and σ of a layer; changes the trees."""
    module = layer.module.split("/")
    siblings = _at(params, module)
    matrices = layer.matrices(jnp.asarray(kernel, jnp.float32))
    if layer.reparam == "scale":
        siblings["kernel_scale"] = jnp.ones_like(siblings["kernel_scale"])
        return
    if layer.reparam == "weight":
        gamma = jnp.sqrt(jnp.sum(matrices**2, axis=-2))
    else:
        stored = _at(state, module)
        vectors = 1 + (stored["basis"].shape[-2] if "basis" in stored else 0)
        started, own = trees.init(kernel, {"": dataclasses.replace(layer, name="")}, power_vectors=vectors)
        stored.update(own[""])
        gamma = started.gamma[""]
    if "gamma" in siblings:
        name = f"{layer.module}/gamma"
        siblings["gamma"] = jnp.moveaxis(gamma, range(len(layer.stacked)), layers.stacked[name])


def _at(tree: Mapping[str, Any], path: Sequence[str]) -> Any:
    for name in path:
        tree = tree[name]
    return tree


def _copied(tree: Any) -> Any:
    return {name: _copied(value) for name, value in tree.items()} if isinstance(tree, Mapping) else tree
