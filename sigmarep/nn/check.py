"""Checks of a training's variables for the silent mistakes of σReparam, in one small jitted program."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sigmarep.core import norms, spectral
from sigmarep.nn import trees
from sigmarep.nn.layers import Layer, path_name

# A training whose power iteration lags more than this divides its kernels by a number that is not their norm.
LAG = 0.05
# γ below this share of the kernel's norm: the layer has all but vanished.
VANISHED = 1e-2
ITERATIONS = 12
# Layers that one sentence names.
NAMED = 3


class Part(NamedTuple):
    """A reparametrized kernel as matrices (*stacked, inputs, outputs) with its state, and γ, None if it has none."""

    matrices: jax.Array
    u: jax.Array
    sigma: jax.Array
    basis: jax.Array | None
    gamma: jax.Array | None


class _Measured(NamedTuple):
    """Each (*stacked): ‖W‖₂, the σ that the next apply divides by, and ‖u‖."""

    norm: jax.Array
    step: jax.Array
    length: jax.Array


def check(
    state: Any,
    *,
    optimizer: Any = None,
    ema: Any = None,
    checkpoint: Any = None,
    layers: Mapping[str, Layer] | None = None,
) -> list[str]:
    """Says in sentences what is wrong with a training under σReparam; [] if nothing is.

    It finds a power iteration that does not follow its kernels (a training without `mutable=["spectral"]`, or one that
    drops the updates), vectors that were averaged or overwritten, γ that is nearly 0, weight decay that takes γ there, and
    averaged weights or checkpoints without the collection `spectral`. It costs a few dozen products of every kernel with a
    vector.

    Args:
      state: variables {"params": …, "spectral": …}, or an object with `params` and `spectral` (itself, or in its attribute
        `model_state` or `variables`), such as a train state; its `tx` is taken for `optimizer`. `params` may be
        `sigmarep.nn.trees.Params`, with the state of the pair as `spectral`; it needs `layers` then.
      optimizer: of optax; its update at a gradient of zero tells whether it decays γ.
      ema: averaged parameters, or variables that have them.
      checkpoint: what is saved or was restored: a tree of arrays or of their shapes.
      layers: of the model, needed unless its kernels have their outputs last and are stacked along their first axis:
        `sigmarep.nn.layers.describe(…)`, or `chosen` of `sigmarep.nn.reparametrize(…)`.

    Raises:
      ValueError: there are no parameters in `state`.
    """
    params, spectral_state = _params(state), _spectral(state)
    if params is None:
        raise ValueError("state: expected variables {'params': …, 'spectral': …} or an object with params and spectral")
    optimizer = getattr(state, "tx", None) if optimizer is None else optimizer
    missing = _without_state(params, spectral_state)
    sentences = []
    if missing:
        sentences.append(
            f"The collection 'spectral' is missing for {_named(missing)}: keep it in the train state beside the parameters "
            "and put back what each training apply returns with mutable=['spectral']."
        )
    if spectral_state:
        sentences += _of_values(parts_of(params, spectral_state, layers), "")
    if optimizer is not None:
        sentences += _of_optimizer(optimizer, params)
    if ema is not None:
        sentences += _of_ema(ema, params, spectral_state, layers)
    if checkpoint is not None and spectral_state and not _spectral(checkpoint):
        sentences.append(
            "The checkpoint has no collection 'spectral': save it with the parameters; a restored run would begin from "
            "vectors that do not belong to its kernels."
        )
    return sentences


def _params(state: Any) -> Any:
    return state.get("params") if isinstance(state, Mapping) else getattr(state, "params", None)


def _spectral(state: Any) -> Any:
    """The collection `spectral` of variables, of a train state, or one level below; None without one."""
    for tree in (state, *(_field(state, name) for name in ("model_state", "variables", "extra_variables"))):
        if tree is not None and (inside := _field(tree, "spectral")) is not None:
            return inside
    return None


def _field(tree: Any, name: str) -> Any:
    return tree.get(name) if isinstance(tree, Mapping) else getattr(tree, name, None)


def _gammas(params: Any) -> dict[str, Any]:
    """The leaves called gamma, by path."""
    if isinstance(params, trees.Params):
        return params.gamma
    leaves = jax.tree_util.tree_leaves_with_path(params)
    named = {path_name(path): leaf for path, leaf in leaves}
    return {name: leaf for name, leaf in named.items() if name.rpartition("/")[2] == "gamma" or name.endswith("_gamma")}


def _without_state(params: Any, state: Any) -> list[str]:
    """Layers that have a scalar γ, or a stack of them, and no state. The gains of weight normalization need none."""
    if isinstance(params, trees.Params):
        return [path for path in params.gamma if path not in (state or {})]
    modules = []
    for name, gamma in _gammas(params).items():
        module, _, leaf = name.rpartition("/")
        siblings = _at(params, module)
        kernel = leaf.removesuffix("_gamma") if leaf != "gamma" else next((k for k in KERNELS if k in siblings), "")
        place = module if leaf == "gamma" else f"{module}/{kernel}"
        # Of weight normalization γ has an entry for each output.
        outputs = getattr(siblings.get(kernel), "shape", (0,))[-1:]
        if tuple(gamma.shape[-1:]) != outputs and not (_at(state or {}, place) or {}).get("u") is not None:
            modules.append(place)
    return modules


KERNELS = ("kernel", "embedding")


def _at(tree: Any, path: str) -> Any:
    for name in path.split("/") if path else ():
        tree = tree.get(name, {}) if isinstance(tree, Mapping) else {}
    return tree


def parts_of(params: Any, state: Any, layers: Mapping[str, Layer] | None) -> dict[str, Part]:
    """The reparametrized kernels by path; arguments as those of `check`."""
    if isinstance(params, trees.Params):
        if layers is None:
            raise ValueError("layers: needed for sigmarep.nn.trees.Params; pass those that trees.init was given")
        leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params.weights)}
        return {
            path: _part(leaves[path], params.gamma[path], each, layers[path])
            for path, each in state.items()
            if path in leaves
        }
    parts = {}
    for path in _places(state, ()):
        module, _, last = path.rpartition("/")
        siblings = _at(params, path)
        if isinstance(siblings, Mapping):
            name = next((each for each in KERNELS if each in siblings), "")
            kernel, gamma, full = siblings.get(name), siblings.get("gamma"), f"{path}/{name}".lstrip("/")
        else:
            # A kernel of a module that has several.
            kernel, gamma, full = siblings, _at(params, module).get(f"{last}_gamma"), path
        if kernel is not None and hasattr(kernel, "shape"):
            parts[full] = _part(kernel, gamma, _at(state, path), (layers or {}).get(full))
    return parts


def _places(state: Any, path: tuple[str, ...]) -> list[str]:
    if not isinstance(state, Mapping):
        return []
    if "u" in state and "sigma" in state and not isinstance(state["u"], Mapping):
        return ["/".join(path)]
    return [place for name, value in state.items() for place in _places(value, (*path, name))]


def _part(kernel: jax.Array, gamma: jax.Array | None, state: Mapping[str, Any], layer: Layer | None) -> Part:
    u, sigma = state["u"], state["sigma"]
    matrices = jnp.reshape(kernel, (*sigma.shape, -1, u.shape[-1])) if layer is None else layer.matrices(kernel)
    return Part(matrices, u, sigma, state.get("basis"), gamma)


@jax.jit
def _measure(parts: dict[str, Part]) -> dict[str, _Measured]:
    def one(part: Part) -> _Measured:
        function: Callable[..., _Measured] = _measure_one
        for _ in range(part.sigma.ndim):
            function = jax.vmap(function)
        return function(part.matrices, part.u, part.basis)

    return {name: one(part) for name, part in parts.items()}


def _measure_one(matrix: jax.Array, u: jax.Array, basis: jax.Array | None) -> _Measured:
    length = jnp.sqrt(jnp.sum(u * u))
    step = spectral.power_step(matrix, u, basis)

    def body(u: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        after = spectral.power_step(matrix, u)
        return after.u, after.sigma

    _, sigmas = jax.lax.scan(body, step.u, None, ITERATIONS)
    # From u and from elsewhere: a u that is orthogonal to the leading vector would stay so.
    norm = jnp.maximum(sigmas[-1], norms.norm_from_below(matrix, iterations=ITERATIONS))
    return _Measured(norm, step.sigma, length)


def _of_values(parts: dict[str, Part], whose: str) -> list[str]:
    measured = jax.device_get(_measure({name: part._replace(gamma=None) for name, part in parts.items()}))
    if not measured:
        return []
    lag = {name: float(np.max(_over(each.norm, each.step))) for name, each in measured.items()}
    off = {name: float(np.max(np.abs(each.length - 1))) for name, each in measured.items()}
    late = sorted((name for name in lag if lag[name] > 1 + LAG), key=lambda name: -lag[name])
    sentences = []
    if wrong := [name for name in off if not off[name] < 1e-3]:
        sentences.append(
            f"{whose}u of {_named(wrong)} is not of length 1: the collection 'spectral' is the power iteration's, not to "
            "be averaged, decayed or trained."
        )
    if late:
        name = late[0]
        worst = int(np.argmax(_over(measured[name].norm, measured[name].step)))
        norm, step = (float(np.ravel(x)[worst]) for x in measured[name][:2])
        sentences.append(
            f"{whose}σ is stale in {_named(late)}: the norm of {name} is {norm:.3g} where an apply divides by {step:.3g}, "
            f"so its effective norm is {lag[name]:.3g} |γ|. Train with mutable=['spectral'] and put the updates back into "
            "the train state; where they are, lower the learning rate or use power_vectors=4."
        )
    if not whose:
        gammas = {name: np.abs(part.gamma) for name, part in parts.items() if part.gamma is not None}
        small = [name for name, gamma in gammas.items() if np.min(gamma) < VANISHED * np.max(measured[name].norm)]
        if small:
            sentences.append(
                f"|γ| of {_named(small)} is below {VANISHED:g} of its kernel's norm: the layer has all but vanished. If "
                "nobody wanted that, weight decay acts on γ: leave it out (sigmarep.nn.decay_mask)."
            )
    return sentences


def _over(norm: np.ndarray, step: np.ndarray) -> np.ndarray:
    return np.where(step > spectral.TINY, norm / np.where(step > spectral.TINY, step, 1.0), 1.0)


def _of_optimizer(optimizer: Any, params: Any) -> list[str]:
    """Two updates at a gradient of zero: the first one of a schedule with warmup has a rate of 0."""
    gammas = _gammas(params)
    moved = jax.device_get(_moved(optimizer, params))
    shrunk = [name for name in gammas if np.max(np.abs(_gammas(moved)[name])) > 0]
    if not shrunk:
        return []
    return [
        f"The optimizer moves γ of {_named(shrunk)} at a gradient of zero: its weight decay takes γ, and the layer's whole "
        "output, towards 0. Leave γ out: mask=sigmarep.nn.decay_mask in optax.adamw and in optax.add_decayed_weights."
    ]


def _moved(optimizer: Any, params: Any) -> Any:
    zeros = jax.tree.map(jnp.zeros_like, params)

    @jax.jit
    def run(params: Any) -> Any:
        state = optimizer.init(params)
        first, state = optimizer.update(zeros, state, params)
        second, _ = optimizer.update(zeros, state, params)
        return jax.tree.map(lambda a, b: jnp.abs(a) + jnp.abs(b), first, second)

    return run(params)


def _of_ema(ema: Any, params: Any, state: Any, layers: Any) -> list[str]:
    own = _spectral(ema)
    averaged = ema if _params(ema) is None or isinstance(ema, trees.Params) else _params(ema)
    if not _alike(averaged, params):
        return ["The averaged weights have another structure than the parameters: average γ and the kernels alike."]
    if own is not None:
        return _of_values(parts_of(averaged, own, layers), "In the averaged weights: ")
    if state is None:
        return ["The averaged weights have no collection 'spectral': evaluate them with that of the training."]
    return _of_values(parts_of(averaged, state, layers), "In the averaged weights, with the training's u: ")


def _alike(first: Any, second: Any) -> bool:
    paths = [[path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)] for tree in (first, second)]
    return paths[0] == paths[1]


def _named(names: list[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(name or "the model" for name in names[:NAMED]) + (f" and {more} more" if more > 0 else "")


def decay_mask(params: Any) -> Any:
    """A tree like `params`: True for the matrices, which weight decay may take; False for γ, biases and scales.

    Under σReparam the decay of a kernel changes no function, only how fast the kernel turns.
    """

    def decayed(path: tuple[Any, ...], leaf: Any) -> bool:
        name = path_name(path).rpartition("/")[2]
        return leaf.ndim > 1 and not (name == "gamma" or name.endswith("_gamma") or name in ("bias", "scale"))

    if isinstance(params, trees.Params):
        gamma: Any = dict.fromkeys(params.gamma, False)
        return trees.Params(jax.tree_util.tree_map_with_path(decayed, params.weights), gamma)
    return jax.tree_util.tree_map_with_path(decayed, params)
