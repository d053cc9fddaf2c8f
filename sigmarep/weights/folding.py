"""Effective kernels of files that hold reparametrized layers: this project's, and those of the paper's own code.

    here              params/…/{kernel, gamma}    spectral/…/{u, sigma}
    speech (Flax)     params/…/{kernel, sigma}    spectral/…/{u, norm}        σ of the kernel is `norm`, γ is `sigma`
    vision (PyTorch)  ….{weight, sigma}           ….spectral_normed_weight.{u, spectral_norm}

In each of them an evaluation makes one power step from the stored u, and so does this.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sigmarep.core import spectral
from sigmarep.nn import fold

VISION = ".spectral_normed_weight."
KERNELS = ("kernel", "embedding")


def folded(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays with effective kernels in place of reparametrized ones; names keep no "params/".

    Raises:
      ValueError: a layer's γ or u is missing.
    """
    arrays = _fold_torch(arrays)
    collections: dict[str, Any] = {"params": {}, "spectral": {}}
    rest = {}
    for name, x in arrays.items():
        collection, _, path = name.partition("/")
        if collection in collections and path:
            _put(collections[collection], path.split("/"), x)
        else:
            rest[name] = x
    if not collections["params"]:
        return arrays
    _with_our_names(collections["params"], collections["spectral"], ())
    plain = fold(collections)
    return {**rest, **{name: np.asarray(x) for name, x in _leaves(plain)}}


def _fold_torch(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    plain = {}
    for name, x in arrays.items():
        layer, _, leaf = name.rpartition(".")
        if VISION in name or (leaf in ("sigma", "effective_spectral_norm") and f"{layer}{VISION}u" in arrays):
            continue
        # One whose γ is missing kept statistics alone and used its weight as it is.
        if leaf == "weight" and f"{layer}.sigma" in arrays and f"{layer}{VISION}u" in arrays:
            gamma, u = arrays[f"{layer}.sigma"], arrays[f"{layer}{VISION}u"]
            x = np.asarray(spectral.reparametrize(_float(x), _float(gamma).reshape(()), _float(u)).kernel)
        plain[name] = x
    return plain


def _with_our_names(params: dict[str, Any], state: dict[str, Any], path: tuple[str, ...]) -> None:
    """Renames the reference's γ and σ; changes the trees."""
    if "norm" in state and "u" in state:
        lead = np.shape(state["u"])[:-1]
        state["sigma"] = np.reshape(state.pop("norm"), lead)
        if "sigma" in params:
            params["gamma"] = np.reshape(params.pop("sigma"), lead)
    if "u" in state and not any(kernel in params for kernel in KERNELS):
        raise ValueError(f"spectral/{'/'.join(path)} has no kernel in params")
    if "gamma" in params and "u" not in state and np.ndim(params["gamma"]) == 0:
        raise ValueError(f"params/{'/'.join((*path, 'gamma'))} has no u in spectral")
    for name, below in params.items():
        if isinstance(below, dict):
            _with_our_names(below, state.get(name, {}), (*path, name))


def _float(x: np.ndarray) -> jax.Array:
    return jnp.asarray(x, jnp.float32)


def _put(tree: dict[str, Any], path: list[str], value: np.ndarray) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value


def _leaves(tree: Mapping[str, Any], prefix: str = ""):
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value


def normalized(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Names of a Flax model in a file that joins them by dots, joined by "/" as everywhere here."""
    if any("/" in name for name in arrays):
        return dict(arrays)
    return {re.sub(r"\.", "/", name): x for name, x in arrays.items()}
