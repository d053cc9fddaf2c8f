"""What a step says of its attention and its spectral norms, as flat metrics.

Names: `attention/entropy/<layer>` mean over heads in nats, `attention/entropy_head/<layer>/<head>`,
`attention/entropy_normalised/<layer>` divided by ln(visible keys), `attention/max_logit/<layer>`,
`attention/qk_norm/<layer>` (largest head), `attention/entropy_min` the lowest layer, `attention/entropy_head_min` the
lowest head of any layer, `spectral/sigma/<path>`, `spectral/gamma/<path>`. Stacked layers are told apart: what is
`blocks` in the parameters is `block_0`, `block_1`, … here, as in the unrolled model.
"""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from sigmarep.training.mesh import path_name

STACKED = "blocks"


def panel_metrics(panel: dict[str, Any]) -> dict[str, float]:
    """Flat metrics of the `panel` of a StepOutput, already on the host."""
    metrics: dict[str, float] = {}
    layers: dict[str, dict[str, np.ndarray]] = {}
    for name, value in _by_layer(panel.get("attention", {})):
        layer, statistic = name.rsplit("/", 1)
        layers.setdefault(layer.removesuffix("/attention"), {})[statistic] = value
    if layers:
        entropies = {layer: found["entropy"] for layer, found in layers.items()}
        metrics["attention/entropy_min"] = min(float(heads.mean()) for heads in entropies.values())
        metrics["attention/entropy_head_min"] = min(float(heads.min()) for heads in entropies.values())
    for layer, found in layers.items():
        metrics[f"attention/entropy/{layer}"] = float(found["entropy"].mean())
        metrics[f"attention/entropy_normalised/{layer}"] = float(found["entropy_normalised"].mean())
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
