"""The panel of this package's trainer for a training loop of one's own, in four lines:

    from sigmarep.recorder import Recorder                                  # 1
    recorder = Recorder("runs/mine", model.apply)                           # 2
    for step in range(1, 1001):
        params, opt_state, loss = train_step(params, opt_state, x, y)
        if step % 50 == 0:                                                  # 3
            recorder.write(step, {"train/loss": loss}, params, x)           # 4

It adds a row to `runs/mine/metrics.jsonl`: the metrics given, the attention statistics of `model.apply(params, x)` and the
spectral statistics of `params`, under the names of `sigmarep.training.panel`. `scripts/report.py runs/mine` explains it.
"""

import functools
import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sigmarep.core import norms, spectral
from sigmarep.nn import layers as descriptions
from sigmarep.nn import trees
from sigmarep.nn.check import parts_of
from sigmarep.nn.convert import Reparametrized
from sigmarep.nn.layers import Layer, path_name
from sigmarep.nn.observe import Statistics, observe

FILE = "metrics.jsonl"
# Of the power iteration on kernels without a stored σ; more of them cost plain models more than the panel may.
ITERATIONS = 5
# Statistics of attention, and the layer's value of those of its heads.
OVER_HEADS: dict[str, Callable[[np.ndarray], Any]] = {
    **dict.fromkeys(("entropy", "entropy_normalised", "bound", "logit_variance"), np.mean),
    **dict.fromkeys(("max_logit", "qk_norm"), np.max),
}
# Arguments of Linen's `apply` that `init` does not take, or takes otherwise.
OF_APPLY = ("rngs", "mutable", "capture_intermediates")


class Recorder:
    """Writes metrics, attention and spectral statistics of a training to a folder.

    Args:
      folder: made if it is missing. Rows from the first written step on are dropped, so that a resumed training goes on.
      function: `model.apply` of Linen or of `sigmarep.nn.reparametrize`, or any function whose first argument is what is
        trained: variables or parameters of any pytree, or an NNX module. None for spectral statistics alone.
      layers: the axes of its kernels; asked of the model if it is one of Flax's, else the rule of
        `sigmarep.nn.trees.matrices`. They may be given as `sigmarep.nn.layers.describe(…)` or by path.
      total_steps: of the whole training, for the report.
    """

    def __init__(
        self,
        folder: str,
        function: Callable[..., Any] | None = None,
        *,
        layers: Mapping[str, Layer] | None = None,
        total_steps: int | None = None,
    ):
        self._folder, self._function, self._layers = folder, function, layers
        self._observed: Callable[..., Any] | None = None
        self._begun = False
        os.makedirs(folder, exist_ok=True)
        if total_steps is not None:
            with open(os.path.join(folder, "environment.json"), "w") as file:
                json.dump({"total_steps": total_steps}, file)

    def write(self, step: int, metrics: Mapping[str, Any], *args: Any, **kwargs: Any) -> dict[str, float]:
        """Adds a row, and returns it.

        Args:
          step: updates made so far.
          metrics: scalars by name; `train/loss` is what a report looks at first.
          args, kwargs: of the function; without them only `metrics` are written.
        """
        row = {name: float(value) for name, value in metrics.items()}
        if args:
            row |= self._panel(*args, **kwargs)
        path = os.path.join(self._folder, FILE)
        if not self._begun:
            _drop_from(path, step)
            self._begun = True
        with open(path, "a") as file:
            file.write(json.dumps({"step": int(step)} | {name: _encoded(value) for name, value in row.items()}) + "\n")
        return row

    def _panel(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        if self._observed is None:
            self._layers = _layers(self._function, args, kwargs) if self._layers is None else self._layers
            self._observed = self._make(kwargs, self._layers)
        attention, spectra = jax.device_get(self._observed(*args, **_arrays(kwargs)))
        stacks = getattr(self._layers, "stacks", {})
        return attention_metrics(_by_layer(attention, stacks)) | _flat(spectra, stacks)

    def _make(self, options: Mapping[str, Any], layers: Mapping[str, Layer]) -> Callable[..., Any]:
        # What is no array, such as train=False, is a constant of the program.
        constants = {name: value for name, value in options.items() if name not in _arrays(options)}

        def run(*args, **kwargs):
            statistics: Statistics = {}
            if self._function is not None:
                _, statistics = observe(self._function)(*args, **kwargs, **constants)
            return statistics, spectral_statistics(*_trained(args[0]), layers)

        return jax.jit(run)


def spectral_statistics(params: Any, state: Any, layers: Mapping[str, Layer]) -> dict[str, jax.Array]:
    """σ(W), γ, ‖Ŵ‖₂ and stable rank of every layer, under the names of `sigmarep.training.panel`; each (*stacked).

    Args:
      params: any pytree, or `sigmarep.nn.trees.Params`.
      state: the collection `spectral` or the state of the pair; None where no layer is reparametrized.
      layers: by path of the kernels.
    """
    reparametrized = parts_of(params, state, layers) if state else {}
    weights = params.weights if isinstance(params, trees.Params) else params
    leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(weights)}
    modules = [layer.module for layer in layers.values()]
    metrics: dict[str, jax.Array] = {}
    for path, layer in layers.items():
        name = layer.module if layer.module and modules.count(layer.module) == 1 else path
        matrices = layer.matrices(leaves[path]).astype(jnp.float32)
        inner = tuple(range(len(layer.stacked), matrices.ndim))
        part = reparametrized.get(path)
        if part is None:
            each = norms.norm_from_below(matrices, iterations=ITERATIONS)
            sigma = jnp.max(each, axis=inner[:-2])
        else:
            sigma = part.sigma
            gamma = jnp.ones_like(sigma) if part.gamma is None else part.gamma
            metrics |= {f"spectral/gamma/{name}": gamma, f"spectral/norm/{name}": jnp.abs(gamma)}
        square = jnp.sum(matrices**2, axis=inner)
        metrics[f"spectral/sigma/{name}"] = sigma
        metrics[f"spectral/stable_rank/{name}"] = square / at_least_tiny(sigma**2)
    return metrics


def at_least_tiny(x: jax.Array) -> jax.Array:
    """A divisor that is not zero; NaN stays NaN, which a maximum may lose (`sigmarep.core.entropy`)."""
    return jnp.where(x < spectral.TINY, spectral.TINY, x)


def attention_metrics(layers: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, float]:
    """Flat metrics of attention statistics by layer, each (heads,), under the names of `sigmarep.training.panel`."""
    metrics = {}
    if layers:
        entropies = [statistics["entropy"] for statistics in layers.values()]
        # NumPy's minimum is NaN where a value is; the order of the layers would decide Python's.
        metrics["attention/entropy_min"] = float(np.min([heads.mean() for heads in entropies]))
        metrics["attention/entropy_head_min"] = float(np.min([heads.min() for heads in entropies]))
    for layer, statistics in layers.items():
        for name, over_heads in OVER_HEADS.items():
            if name in statistics:
                metrics[f"attention/{name}/{layer}"] = float(over_heads(statistics[name]))
        for head, value in enumerate(statistics["entropy"]):
            metrics[f"attention/entropy_head/{layer}/{head}"] = float(value)
    return metrics


def _by_layer(
    statistics: Mapping[str, Mapping[str, Any]], stacks: Mapping[str, int]
) -> dict[str, dict[str, np.ndarray]]:
    layers = {}
    for name, recorded in statistics.items():
        for index in np.ndindex(np.shape(recorded["entropy"])[:-1]):
            layers[_numbered(name, index, stacks)] = {
                each: np.asarray(value)[index] for each, value in recorded.items()
            }
    return layers


def _flat(metrics: Mapping[str, Any], stacks: Mapping[str, int]) -> dict[str, float]:
    flat = {}
    for full, value in metrics.items():
        group, kind, name = full.split("/", 2)
        for index in np.ndindex(np.shape(value)):
            flat[f"{group}/{kind}/{_numbered(name, index, stacks)}"] = float(np.asarray(value)[index])
    return flat


def stacked_names(names: list[str], stacks: Mapping[str, int]) -> list[int]:
    """For each leading axis of a value the place of the name that it numbers, that of the module which is stacked there.

    Args:
      names: the path of the value.
      stacks: `sigmarep.nn.layers.Layers.stacks` of the model.
    """
    return [max(i - 1, 0) for i in range(len(names) + 1) for _ in range(stacks.get("/".join(names[:i]), 0))]


def numbered(names: list[str], places: list[int], index: tuple[int, ...]) -> str:
    """The path of one of the stacked layers: `blocks` becomes `block_0`, `block_1`, …"""
    names = list(names)
    for i, number in zip(places, index, strict=True):
        names[i] = f"{names[i].removesuffix('s')}_{number}"
    return "/".join(names)


def _numbered(name: str, index: tuple[int, ...], stacks: Mapping[str, int]) -> str:
    """The name of one of the stacked layers: as in the trainer's panel where the stack is known, else with /0, /1, …"""
    names = name.split("/")
    places = stacked_names(names, stacks)
    return numbered(names, places, index) if len(places) == len(index) else "/".join((name, *map(str, index)))


def _trained(first: Any) -> tuple[Any, Any]:
    """Parameters and spectral state of a function's first argument."""
    if isinstance(first, Mapping) and "params" in first:
        return first["params"], first.get("spectral")
    nnx = sys.modules.get("flax.nnx")
    if nnx is not None and isinstance(first, nnx.Module):
        from sigmarep import nnx as ours

        return ours.as_variables(first)
    return first, None


def _layers(function: Any, args: Any, kwargs: Mapping[str, Any]) -> Mapping[str, Layer]:
    owner = getattr(function, "__self__", None)
    if isinstance(owner, Reparametrized):
        return owner.layers
    if isinstance(owner, nn.Module):
        rngs = {"params": jax.random.key(0)} | kwargs.get("rngs", {})
        options = {name: value for name, value in kwargs.items() if name not in OF_APPLY}
        return descriptions.describe(
            functools.partial(owner.init, **_fixed(options)), rngs, *args[1:], **_arrays(options)
        )
    nnx = sys.modules.get("flax.nnx")
    if nnx is not None and isinstance(args[0], nnx.Module):
        from sigmarep import nnx as ours

        return ours.layers(args[0])
    return trees.matrices(_trained(args[0])[0])


def _arrays(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value for name, value in kwargs.items() if all(hasattr(leaf, "dtype") for leaf in jax.tree.leaves(value))
    }


def _fixed(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name not in _arrays(kwargs)}


def _encoded(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _drop_from(path: str, step: int) -> None:
    """Drops the rows of an earlier training from a step on, and a line that was not finished."""
    if not os.path.exists(path):
        return
    with open(path) as file:
        lines = [line for line in file if line.endswith("\n") and json.loads(line)["step"] < step]
    with open(f"{path}.new", "w") as file:
        file.writelines(lines)
    os.replace(f"{path}.new", path)
