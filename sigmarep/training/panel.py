"""Flat metrics of a step's inputs, its attention, its spectral norms and its update. What is not finite stays so.

Of the batch, only where there is such a value:

    data/nonfinite/<array>               the number of values that are NaN or infinite

Of attention, by layer:

    attention/entropy/<layer>, attention/entropy_head/<layer>/<head>   in nats; a layer's is the mean over its heads
    attention/entropy_normalised/<layer>                               divided by ln(visible keys)
    attention/entropy_min, attention/entropy_head_min                  of the lowest layer, of the lowest head of any layer;
                                                                       NaN where that of any layer or head is
    attention/bound/<layer>              the least entropy that Theorem 3.1 allows the inputs seen, mean over heads
    attention/max_logit/<layer>          of any head
    attention/logit_variance/<layer>     over the keys that a query sees, mean over queries and heads
    attention/qk_norm/<layer>            ‖W_q W_kᵀ‖₂ of the largest head

Of every layer with a kernel or a table, by its path:

    spectral/sigma/<path>                σ(W), raw: the stored one, or by `norm_from_below` if there is none
    spectral/gamma/<path>                γ
    spectral/norm/<path>                 ‖Ŵ‖₂ of a reparametrised layer, the effective norm: |γ| under σReparam
    spectral/stable_rank/<path>          ‖W‖_F² / σ(W)²
    gradient/norm/<path>                 of the gradient in all parameters of the layer
    update/ratio/<path>                  ‖ΔW‖_F / ‖W‖_F

Stacked layers are told apart: what is `blocks` in the parameters is `block_0`, `block_1`, … here, as in the unrolled model.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sigmarep.core import spectral
from sigmarep.training.mesh import path_name

STACKED = "blocks"
# Layers whose kernel has more than one axis of outputs: heads and their dimensions.
PROJECTIONS = ("query", "key", "value", "qk", "qkv")
# Of the power iteration on kernels without a stored σ; more of them cost plain models more than the panel may.
ITERATIONS = 5
# What `layer_statistics` calls them, and their metrics.
LAYER_METRICS = {
    "sigma": "spectral/sigma",
    "norm": "spectral/norm",
    "stable_rank": "spectral/stable_rank",
    "gradient": "gradient/norm",
    "update": "update/ratio",
}


def layer_statistics(params: Any, gradients: Any, updates: Any, state: Any) -> Any:
    """On the devices: of every layer with a kernel or a table `stable_rank`, `gradient` and `update`, `norm` if it is
    reparametrised, and `sigma` where `state` has none; a tree like the parameters', each value of shape () or (layers,).

    Args:
      params, gradients, updates: trees of one structure.
      state: the collection `spectral`.
    """
    return _layers(params, gradients, updates, state, ())


def _layers(params, gradients, updates, state, path):
    kernel = next((name for name in ("kernel", "embedding") if name in params), None)
    if kernel is not None:
        return _of_layer(params, gradients, updates[kernel], state, kernel, path)
    inner = {
        name: _layers(value, gradients[name], updates[name], state.get(name, {}), (*path, name))
        for name, value in params.items()
        if isinstance(value, dict)
    }
    return {name: found for name, found in inner.items() if found}


def _of_layer(params, gradients, update, state, kernel, path):
    stacked = STACKED in path

    def squares(x):
        return jnp.sum(x.astype(jnp.float32) ** 2, axis=tuple(range(stacked, x.ndim)))

    def norm(x):
        lead, shape = x.shape[:stacked], x.shape[stacked:]
        outputs = math.prod(shape[1:]) if path[-1] in PROJECTIONS else shape[-1]
        return spectral.norm_from_below(x.reshape(*lead, -1, outputs), iterations=ITERATIONS)

    weights, gamma = params[kernel], params.get("gamma")
    found = {} if "sigma" in state else {"sigma": norm(weights)}
    sigma = state.get("sigma", found.get("sigma"))
    if "sigma" in state:
        found["norm"] = jnp.ones_like(sigma) if gamma is None else jnp.abs(gamma)
    elif gamma is not None:
        function = jax.vmap(spectral.weight_normalized) if stacked else spectral.weight_normalized
        found["norm"] = norm(function(weights, gamma))
    square = squares(weights)
    return found | {
        "stable_rank": square / _at_least_tiny(sigma**2),
        "gradient": jnp.sqrt(sum(squares(x) for x in jax.tree.leaves(gradients))),
        "update": jnp.sqrt(squares(update) / _at_least_tiny(square)),
    }


def _at_least_tiny(x: jax.Array) -> jax.Array:
    """A divisor that is not zero; NaN stays NaN, which a maximum may lose (`sigmarep.core.entropy`)."""
    return jnp.where(x < spectral.TINY, spectral.TINY, x)


def panel_metrics(panel: dict[str, Any]) -> dict[str, float]:
    """Flat metrics of the `panel` of a StepOutput, already on the host."""
    metrics: dict[str, float] = {}
    layers: dict[str, dict[str, np.ndarray]] = {}
    for name, value in _by_layer(panel.get("attention", {})):
        layer, statistic = name.rsplit("/", 1)
        layers.setdefault(layer.removesuffix("/attention"), {})[statistic] = value
    if layers:
        entropies = {layer: found["entropy"] for layer, found in layers.items()}
        # NumPy's minimum is NaN where a value is; the order of the layers would decide Python's.
        metrics["attention/entropy_min"] = float(np.min([heads.mean() for heads in entropies.values()]))
        metrics["attention/entropy_head_min"] = float(np.min([heads.min() for heads in entropies.values()]))
    for layer, found in layers.items():
        metrics[f"attention/entropy/{layer}"] = float(found["entropy"].mean())
        metrics[f"attention/entropy_normalised/{layer}"] = float(found["entropy_normalised"].mean())
        for name in ("bound", "logit_variance"):
            metrics[f"attention/{name}/{layer}"] = float(found[name].mean())
        metrics[f"attention/max_logit/{layer}"] = float(found["max_logit"].max())
        metrics[f"attention/qk_norm/{layer}"] = float(found["qk_norm"].max())
        for head, value in enumerate(found["entropy"]):
            metrics[f"attention/entropy_head/{layer}/{head}"] = float(value)
    for collection in ("spectral", "gamma"):
        for name, value in _by_layer(panel.get(collection, {})):
            path, leaf = name.rsplit("/", 1)
            # Weight normalisation has a gain an output; a line of metrics has room for scalars.
            if leaf in ("sigma", "gamma") and value.ndim == 0:
                metrics[f"spectral/{leaf}/{path}"] = float(value)
    for name, count in panel.get("nonfinite", {}).items():
        if count:
            metrics[f"data/nonfinite/{name}"] = float(count)
    for name, value in _by_layer(panel.get("layers", {})):
        path, leaf = name.rsplit("/", 1)
        metrics[f"{LAYER_METRICS[leaf]}/{path}"] = float(value)
    return metrics


def _by_layer(tree: Any) -> Iterator[tuple[str, np.ndarray]]:
    """(path, value) of every leaf, with stacked layers taken apart."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        parts, value = path_name(path).split("/"), np.asarray(leaf)
        if STACKED not in parts:
            yield "/".join(parts), value
            continue
        at = parts.index(STACKED)
        for i, layer in enumerate(value):
            yield "/".join([*parts[:at], f"block_{i}", *parts[at + 1 :]]), layer
