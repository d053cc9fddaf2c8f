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

Layers without attention weights (`config.model.token_mixing`) have none of these.

Of every layer that `sigmarep.nn.layers` describes, by its path:

    spectral/sigma/<path>                σ(W), raw: the stored one, or by `norm_from_below` if there is none
    spectral/gamma/<path>                γ
    spectral/norm/<path>                 ‖Ŵ‖₂ of a reparametrised layer, the effective norm: |γ| under σReparam
    spectral/stable_rank/<path>          ‖W‖_F² / σ(W)²
    gradient/norm/<path>                 of the gradient in all parameters of the layer
    update/ratio/<path>                  ‖ΔW‖_F / ‖W‖_F

Stacked layers are told apart: what is `blocks` in the parameters is `block_0`, `block_1`, … here, as in the unrolled model;
layers stacked as `stage` are `stage_0`, `stage_1`, ….
"""

import collections
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sigmarep.core import norms, spectral
from sigmarep.nn.layers import Layers
from sigmarep.recorder import ITERATIONS, at_least_tiny, attention_metrics, numbered, stacked_names
from sigmarep.training.mesh import path_name

# What `layer_statistics` calls them, and their metrics.
LAYER_METRICS = {
    "sigma": "spectral/sigma",
    "norm": "spectral/norm",
    "stable_rank": "spectral/stable_rank",
    "gradient": "gradient/norm",
    "update": "update/ratio",
}


def layer_statistics(params: Any, gradients: Any, updates: Any, state: Any, layers: Layers) -> Any:
    """On the devices: of every described layer `stable_rank`, `gradient` and `update`, `norm` if it is reparametrised, and
    `sigma` where `state` has none; a tree like the parameters', each value of shape () or (layers,).

    Args:
      params, gradients, updates: trees of one structure.
      state: the collection `spectral`.
      layers: of the model that has these parameters.
    """
    tree: dict[str, Any] = {}
    in_module = collections.Counter(layer.module for layer in layers.values())
    for layer in layers.values():
        *path, name = layer.name.split("/")
        trees = [
            functools.reduce(lambda x, each: x.get(each, {}), path, x) for x in (params, gradients, updates, state)
        ]
        # A module with several kernels has a line for each.
        place = path if in_module[layer.module] == 1 else [*path, name]
        inner = functools.reduce(lambda x, each: x.setdefault(each, {}), place, tree)
        inner.update(_of_layer(layer, layers.stacked, *trees))
    return tree


def _of_layer(layer, stacked, params, gradients, updates, state):
    lead = len(layer.stacked)

    def squares(x, axes):
        """Sum of squares over all but the stacked axes."""
        return jnp.sum(x.astype(jnp.float32) ** 2, axis=tuple(axis for axis in range(x.ndim) if axis not in axes))

    def norm(matrices):
        each = norms.norm_from_below(matrices, iterations=ITERATIONS)
        # The matrices within a layer are blocks on the diagonal of one.
        return jnp.max(each, axis=tuple(range(lead, each.ndim))) if layer.batch else each

    name = layer.name.rpartition("/")[2]
    weights, gamma = params[name], params.get("gamma")
    values = {} if "sigma" in state else {"sigma": norm(layer.matrices(weights))}
    sigma = state.get("sigma", values.get("sigma"))
    if "sigma" in state:
        values["norm"] = jnp.ones_like(sigma) if gamma is None else jnp.abs(gamma)
    elif gamma is not None:
        function = spectral.weight_normalized
        for _ in range(lead):
            function = jax.vmap(function)
        gains = jnp.moveaxis(gamma, stacked[f"{layer.module}/gamma".lstrip("/")], range(lead))
        values["norm"] = norm(function(layer.matrices(weights), gains))
    elif "kernel_scale" in params:
        scale = jnp.moveaxis(params["kernel_scale"], stacked[f"{layer.module}/kernel_scale".lstrip("/")], range(lead))
        values["norm"] = jnp.abs(scale) * sigma
    square = squares(weights, layer.stacked)
    total = sum(
        squares(x, stacked[f"{layer.module}/{path_name(path)}".lstrip("/")])
        for path, x in jax.tree_util.tree_leaves_with_path(gradients)
    )
    return values | {
        "stable_rank": square / at_least_tiny(sigma**2),
        "gradient": jnp.sqrt(total),
        "update": jnp.sqrt(squares(updates[name], layer.stacked) / at_least_tiny(square)),
    }


def panel_metrics(panel: dict[str, Any], stacks: Mapping[str, int]) -> dict[str, float]:
    """Flat metrics of the `panel` of a StepOutput, already on the host.

    Args:
      stacks: `Layers.stacks` of the model.
    """
    metrics = _attention_metrics(panel.get("attention", {}), stacks)
    for collection in ("spectral", "gamma"):
        for name, value in _by_layer(panel.get(collection, {}), stacks):
            path, _, leaf = name.rpartition("/")
            # Weight normalisation has a gain an output; a line of metrics has room for scalars.
            if leaf in ("sigma", "gamma") and value.ndim == 0:
                metrics[f"spectral/{leaf}/{path}"] = float(value)
    for name, count in panel.get("nonfinite", {}).items():
        if count:
            metrics[f"data/nonfinite/{name}"] = float(count)
    for name, value in _by_layer(panel.get("layers", {}), stacks):
        path, _, leaf = name.rpartition("/")
        metrics[f"{LAYER_METRICS[leaf]}/{path}"] = float(value)
    return metrics


def _attention_metrics(recorded: Any, stacks: Mapping[str, int]) -> dict[str, float]:
    layers: dict[str, dict[str, np.ndarray]] = {}
    for name, value in _by_layer(recorded, stacks):
        layer, _, statistic = name.rpartition("/")
        layers.setdefault(layer.removesuffix("/attention"), {})[statistic] = value
    return attention_metrics(layers)


def _by_layer(tree: Any, stacks: Mapping[str, int]) -> Iterator[tuple[str, np.ndarray]]:
    """(path, value) of every leaf, with stacked layers taken apart."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        names = path_name(path).split("/")
        value = np.asarray(leaf)
        places = stacked_names(names, stacks)
        for index in np.ndindex(value.shape[: len(places)]):
            yield numbered(names, places, index), value[index]
