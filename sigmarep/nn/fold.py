"""Folding: the plain model's parameters, for deployment."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sigmarep.core import spectral
from sigmarep.nn.layers import Layers


def fold(variables: Mapping[str, Any], *, stored_sigma: bool = False, layers: Layers | None = None) -> dict[str, Any]:
    """Parameters of the same model with `reparam="none"` and identical outputs.

    Every kernel is replaced by the effective one that evaluation uses (one power step from the stored u), and γ is
    dropped. Works for σReparam, spectral and weight normalization and WeSaR, for layers stacked by `nn.scan` or
    `nn.vmap`, and leaves other parameters as they are.

    Args:
      variables: {"params": …, "spectral": …} of a model; "spectral" may be missing.
      stored_sigma: the state is what an apply to these very parameters has stored: its σ is the one that the apply divided
        by, and no further step is made.
      layers: of the model (`sigmarep.nn.layers.describe`), needed where parameters are stacked along another axis than
        their first. The spectral variables are always stacked along their first.

    Raises:
      ValueError: the variables have no "params".
    """
    if "params" not in variables:
        raise ValueError(
            f"variables: expected {{'params': …, 'spectral': …}}, got {', '.join(map(str, variables)) or 'nothing'}"
        )
    folded: dict[str, Any] = _fold(variables["params"], variables.get("spectral", {}), stored_sigma, layers, ())
    return folded


def _fold(
    params: Any, state: Mapping[str, Any], stored_sigma: bool, layers: Layers | None, path: tuple[str, ...]
) -> Any:
    if not isinstance(params, Mapping):
        return params
    for name in ("kernel", "embedding"):
        if name in params and "kernel_scale" in params:
            rest = {each: value for each, value in params.items() if each not in (name, "kernel_scale")}
            return {name: _scaled(params, "/".join((*path, name)), layers), **rest}
        if name in params and ("gamma" in params or "u" in state):
            rest = {each: value for each, value in params.items() if each not in (name, "gamma")}
            kernel, gamma = params[name], params.get("gamma")
            layer = None if layers is None else layers.get("/".join((*path, name)))
            if layers is None or layer is None:
                return {name: _effective(kernel, gamma, state, stored_sigma), **rest}
            first = range(len(layer.stacked))
            if gamma is not None:
                gamma = jnp.moveaxis(gamma, layers.stacked["/".join((*path, "gamma"))], first)
            effective = _effective(jnp.moveaxis(kernel, layer.stacked, first), gamma, state, stored_sigma)
            return {name: jnp.moveaxis(effective, first, layer.stacked), **rest}
    return {
        name: _fold(value, state.get(name, {}), stored_sigma, layers, (*path, name)) for name, value in params.items()
    }


def _scaled(params: Mapping[str, Any], path: str, layers: Layers | None) -> jax.Array:
    """αW of the layer with the kernel `path`, stacked along its first axes unless `layers` say otherwise."""
    kernel, scale = params[path.rpartition("/")[2]], params["kernel_scale"]
    layer = None if layers is None else layers.get(path)
    first = range(scale.ndim)
    if layers is not None and layer is not None:
        kernel = jnp.moveaxis(kernel, layer.stacked, first)
        scale = jnp.moveaxis(scale, layers.stacked[f"{layer.module}/kernel_scale".lstrip("/")], first)
    effective = spectral.scaled(kernel, scale.reshape(*scale.shape, *(1,) * (kernel.ndim - scale.ndim)))
    return effective if layer is None else jnp.moveaxis(effective, first, layer.stacked)


def _effective(kernel: jax.Array, gamma: jax.Array | None, state: Mapping[str, Any], stored_sigma: bool) -> jax.Array:
    def reparametrized(kernel: jax.Array, gamma: jax.Array, u: jax.Array, basis: jax.Array | None) -> jax.Array:
        return spectral.reparametrize(kernel, gamma, u, basis=basis).kernel

    function: Callable[..., jax.Array]
    arguments: list[Any]
    if "u" not in state:
        # Only weight normalization has no vectors, and it always has gains.
        assert gamma is not None
        function, arguments, stacked = spectral.weight_normalized, [kernel, gamma], gamma.ndim - 1
    else:
        stacked = state["sigma"].ndim
        gamma = jnp.ones(state["sigma"].shape, jnp.float32) if gamma is None else gamma
        if stored_sigma:
            function, arguments = spectral.effective_kernel, [kernel, gamma, state["sigma"]]
        else:
            function, arguments = reparametrized, [kernel, gamma, state["u"], state.get("basis")]
    for _ in range(stacked):
        function = jax.vmap(function)
    return function(*arguments)
