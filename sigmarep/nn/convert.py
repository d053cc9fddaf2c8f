"""Any Linen model under σReparam, without touching its source.

    model = reparametrize(SomeModel(…), x)                       # x: an input, or its shape
    variables = model.init(rng, x)                               # or model.convert(trained): same function as before
    y, updates = model.apply(variables, x, mutable=["spectral"]) # training: one power step, stored
    y = model.apply(variables, x)                                # evaluation: one power step, nothing stored
    plain = model.fold(variables)                                # for SomeModel(…).apply, with the same outputs
    print(model.table())                                         # every parameter: reparametrized or plain, and why

The model's own code runs on effective kernels, which are made before it is called. So nothing of it has to be known:
layers inside `nn.scan`, `nn.vmap` and `nn.remat`, shared and tied ones, recurrent cells and attention are reparametrized by
the axes that they state (`sigmarep.nn.layers`). γ stands beside its kernel in `params`, u and σ in `spectral`,
as those of `SigmaDense` do.
"""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
from flax.core.scope import CollectionFilter, in_filter, subtract_filters

from sigmarep.nn import trees
from sigmarep.nn.layers import Layer, Layers, describe, path_name

NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.BatchNorm, nn.InstanceNorm)


def reparametrize(
    module: nn.Module,
    *example: Any,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    embeddings: bool = False,
    gamma_init: float | Literal["sigma"] = "sigma",
    power_vectors: int = 1,
    norms: Literal["keep", "remove"] = "keep",
    **kwargs: Any,
) -> "Reparametrized":
    """Puts a Linen model under σReparam.

    By default all linear layers and convolutions are, as in the paper, and tables of embeddings are not.

    Args:
      module: the model.
      example: arguments of its call, or their shapes; kwargs likewise, `method` among them. Only their shapes matter.
      include, exclude: regular expressions on the '/'-joined paths of kernels. With `include` only what one of them is
        found in is reparametrized; what one of `exclude` is found in is not.
      embeddings: tables of embeddings too.
      gamma_init: "sigma" for γ = σ(W₀), so that the model is the function that it was; or a number, 1 in the paper.
      power_vectors: see `sigmarep.nn.linear.ReparametrizedLayer`.
      norms: "keep", or "remove" to pass over every normalization layer of Flax's.

    Raises:
      ValueError: an argument is none of these, or no layer of the model is left to reparametrize.
    """
    if norms not in ("keep", "remove"):
        raise ValueError(f"norms = {norms!r}: expected keep or remove")
    with _norms(norms):
        layers = describe(module.init, jax.random.key(0), *example, **kwargs)
    reasons = {path: _reason(layer, include, exclude, embeddings) for path, layer in layers.items()}
    chosen = {path: layers[path] for path, reason in reasons.items() if not reason}
    if not chosen:
        listed = "; ".join(f"{path}: {reason}" for path, reason in reasons.items())
        raise ValueError(f"no layer of {type(module).__name__} is left to reparametrize ({listed or 'it has none'})")
    for pattern in (*include, *exclude):
        if not any(re.search(pattern, path) for path in layers):
            raise ValueError(f"include, exclude: {pattern!r} finds none of {', '.join(layers)}")
    return Reparametrized(module, layers, chosen, reasons, gamma_init, power_vectors, norms)


def _reason(layer: Layer, include: Sequence[str], exclude: Sequence[str], embeddings: bool) -> str:
    """Why a layer stays plain; "" if it does not."""
    if layer.reparam != "none":
        return f"already under reparam={layer.reparam!r}"
    if any(re.search(pattern, layer.name) for pattern in exclude):
        return "excluded"
    if include and not any(re.search(pattern, layer.name) for pattern in include):
        return "not included"
    if layer.batch:
        return "independent matrices within one kernel have no single spectral norm"
    if layer.table and not embeddings and not include:
        return "a table of embeddings"
    return ""


@contextlib.contextmanager
def _norms(word: str) -> Iterator[None]:
    """Passes over normalization layers if `word` is "remove"."""

    def skip(method: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if isinstance(context.module, NORMS) and context.method_name == "__call__":
            return args[0] if args else kwargs["x"]
        return method(*args, **kwargs)

    with nn.intercept_methods(skip) if word == "remove" else contextlib.nullcontext():
        yield


@dataclasses.dataclass(frozen=True)
class Reparametrized:
    """A Linen model under σReparam; `reparametrize` makes it.

    Attributes:
      module: the model as it was.
      layers: all linear layers of it. chosen: those that are reparametrized. reasons: why others are not, by path.
    """

    module: nn.Module
    layers: Layers
    chosen: dict[str, Layer]
    reasons: dict[str, str]
    gamma_init: float | Literal["sigma"]
    power_vectors: int
    norms: Literal["keep", "remove"]

    def init(self, rngs: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The module's initial variables, with γ beside each kernel and the collection `spectral`."""
        with _norms(self.norms):
            return self.convert(self.module.init(rngs, *args, **kwargs))

    def convert(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """Takes over variables of the plain module. With γ = σ(W) the model is the function that they made.

        Raises:
          ValueError: a kernel is missing.
        """
        params, state = trees.init(
            variables["params"], self.chosen, gamma_init=self.gamma_init, power_vectors=self.power_vectors
        )
        nested = _copied(params.weights)
        for path in self.chosen:
            _put(nested, self._places(path)[0], params.gamma[path])
        return {**variables, "params": nested, "spectral": self._nested(state)}

    def apply(self, variables: Mapping[str, Any], *args: Any, mutable: CollectionFilter = False, **kwargs: Any) -> Any:
        """The module's `apply` on effective kernels.

        Args:
          variables: of `init` or `convert`. args, kwargs: of the module's `apply`.
          mutable: as of the module's; with `spectral` among it the power step is stored in the updates.
        """
        weights, state = trees.apply(*self._taken_apart(variables), self.chosen)
        others = {name: value for name, value in variables.items() if name not in ("params", "spectral")}
        store = in_filter(mutable, "spectral")
        with _norms(self.norms):
            result = self.module.apply(
                {"params": weights, **others},
                *args,
                mutable=subtract_filters(mutable, "spectral") if store else mutable,
                **kwargs,
            )
        if not store:
            return result
        y, updates = result
        return y, {**updates, "spectral": self._nested(state)}

    def advance(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """The same variables with one power step stored, for after an update in a loop that makes nothing mutable.

        Such a loop may train all of `variables`: derivatives with respect to the vectors are zero.
        """
        _, state = trees.apply(*self._taken_apart(variables), self.chosen)
        return {**variables, "spectral": self._nested(state)}

    def fold(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """Variables of the plain module with the outputs of `apply`: effective kernels, no γ and no `spectral`."""
        weights, _ = trees.apply(*self._taken_apart(variables), self.chosen)
        others = {name: value for name, value in variables.items() if name not in ("params", "spectral")}
        return {"params": weights, **others}

    def table(self) -> str:
        """One line for each parameter: its path and shape, and "sigma" or why it is plain."""
        rows = []
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.layers.variables["params"]):
            name = path_name(path)
            if name in self.reasons:
                why = f"plain: {self.reasons[name]}" if self.reasons[name] else "sigma"
            else:
                why = "plain: no layer says which axes are its inputs" if name in self.layers.unknown else "plain"
            rows.append((name, str(leaf.shape), why))
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        return "\n".join(f"{name:{widths[0]}}  {shape:{widths[1]}}  {why}" for name, shape, why in rows)

    def _nested(self, state: trees.State) -> dict[str, Any]:
        """The collection `spectral`."""
        spectral: dict[str, Any] = {}
        for path in self.chosen:
            _put(spectral, self._places(path)[1], state[path])
        return spectral

    def _places(self, path: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The places of γ in `params` and of u and σ in `spectral`."""
        *module, name = path.split("/")
        alone = sum(other.rpartition("/")[0] == "/".join(module) for other in self.layers) == 1
        return ((*module, "gamma"), tuple(module)) if alone else ((*module, f"{name}_gamma"), (*module, name))

    def _taken_apart(self, variables: Mapping[str, Any]) -> tuple[trees.Params, trees.State]:
        if "spectral" not in variables:
            raise ValueError(
                "variables: have no collection 'spectral'; pass those of init() or convert(), with the updates of apply()"
            )
        weights = _copied(variables["params"])
        gamma, state = {}, {}
        for path in self.chosen:
            of_gamma, place = self._places(path)
            gamma[path] = _take(weights, of_gamma)
            state[path] = _at(variables["spectral"], place)
        return trees.Params(weights, gamma), state


def _copied(tree: Any) -> Any:
    """Mappings as dicts of their own."""
    return {name: _copied(value) for name, value in tree.items()} if isinstance(tree, Mapping) else tree


def _at(tree: Any, path: Sequence[str]) -> Any:
    for name in path:
        tree = tree[name]
    return tree


def _put(tree: dict[str, Any], path: Sequence[str], value: Any) -> None:
    """Puts a value, or the values of a dict, at a path; makes what is missing on the way."""
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    if isinstance(value, dict):
        (tree.setdefault(path[-1], {}) if path else tree).update(value)
    else:
        tree[path[-1]] = value


def _take(tree: dict[str, Any], path: Sequence[str]) -> Any:
    inner = _at(tree, path[:-1])
    if path[-1] not in inner:
        raise ValueError(f"variables: params/{'/'.join(path)} is missing; pass those of init() or convert()")
    return inner.pop(path[-1])
