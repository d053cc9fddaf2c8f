"""NNX models under σReparam, and back."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from flax import nnx

from sigmarep.nn.layers import Layer
from sigmarep.nnx.linear import KINDS, Reparam, Sigma, begin, layer_of

PLAIN = tuple(KINDS)


def reparametrize(
    model: nnx.Module,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    embeddings: bool = False,
    reparam: Reparam = "sigma",
    gamma_init: float | str = "sigma",
    power_vectors: int = 1,
) -> dict[str, str]:
    """Puts an NNX model under σReparam, in place: its linear layers become those of this package.

    They are the layers whose class is exactly `nnx.Linear`, `LinearGeneral` or `Conv`, wherever they are (in attention,
    in recurrent cells, stacked by `nnx.vmap`), and with `embeddings` `nnx.Embed`. Where a model reads a kernel itself, past
    its layer, it goes on reading the plain one: exclude that layer.

    Args:
      model: anything of NNX. Make its `nnx.Optimizer` after this.
      include, exclude: regular expressions on the '/'-joined paths of layers. With `include` only what one of them is found
        in is reparametrized; what one of `exclude` is found in is not.
      embeddings: tables of embeddings too.
      reparam, gamma_init, power_vectors: see `sigmarep.nnx.linear.Sigma`; γ begins at σ(W₀), so that the model is the
        function that it was.

    Returns:
      For the path of every module with a kernel or table "sigma", or why it stays plain.

    Raises:
      ValueError: an argument is none of these, or no layer is left to reparametrize.
    """
    table = {}
    for path, module in _modules(model):
        reason = table[path] = _reason(module, path, include, exclude, embeddings) or "sigma"
        if reason != "sigma":
            continue
        module.__class__ = KINDS[type(module)]
        begin(module, reparam=reparam, gamma_init=gamma_init, power_vectors=power_vectors)
    if "sigma" not in table.values():
        listed = "; ".join(f"{path}: {reason}" for path, reason in table.items())
        raise ValueError(f"no layer of {type(model).__name__} is left to reparametrize ({listed or 'it has none'})")
    return table


def fold(model: nnx.Module) -> None:
    """Makes the layers plain again, in place, with the outputs that an evaluation has."""
    for _, module in _modules(model):
        if isinstance(module, Sigma):
            kernel = module.effective_kernel()
            for name in ("gamma", "u", "sigma", "basis", "use_running_average"):
                delattr(module, name)
            getattr(module, module.matrix_name)[...] = kernel
            object.__setattr__(module, "__class__", module.plain)


def layers(model: nnx.Module) -> dict[str, Layer]:
    """The linear layers of a model, plain or not, by '/'-joined path of their kernels."""
    described = (layer_of(module, path) for path, module in _modules(model) if isinstance(module, PLAIN))
    return {layer.name: layer for layer in described}


def as_variables(model: nnx.Module) -> tuple[Any, Any]:
    """Parameters as nested dicts, and the variables of the power iteration under the names of `sigmarep.nn`, or None."""
    params: dict[str, Any] = {}
    state: dict[str, Any] = {}
    for keys, value in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        _put(params, tuple(map(str, keys)), value[...])
    for path, module in _modules(model):
        if isinstance(module, Sigma):
            named = {"u": module.u, "sigma": module.sigma, "basis": module.basis}
            for name, value in named.items():
                if value is not None:
                    _put(state, (*(path.split("/") if path else ()), name), value[...])
    return params, state or None


def _put(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value


def _modules(model: nnx.Module) -> Iterator[tuple[str, Any]]:
    """The modules that have a kernel or a table of their own, each once, with their paths."""
    for path, module in list(nnx.iter_modules(model)):
        if isinstance(getattr(module, "kernel", getattr(module, "embedding", None)), nnx.Variable):
            yield "/".join(map(str, path)), module


def _reason(module: Any, path: str, include: Sequence[str], exclude: Sequence[str], embeddings: bool) -> str:
    """Why a layer stays plain; "" if it does not."""
    if isinstance(module, Sigma):
        return "already under σReparam"
    if type(module) not in KINDS:
        return f"{type(module).__name__} is none of {', '.join(kind.__name__ for kind in KINDS)}"
    if any(re.search(pattern, path) for pattern in exclude):
        return "excluded"
    if include and not any(re.search(pattern, path) for pattern in include):
        return "not included"
    if layer_of(module).batch:
        return "independent matrices within one kernel have no single spectral norm"
    if isinstance(module, nnx.Embed) and not embeddings and not include:
        return "a table of embeddings"
    return ""
