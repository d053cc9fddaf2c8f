"""QK-clip (Kimi Team, 2025): heads whose logits grow too large have their query and key kernels shrunk after the step."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sigmarep.nn.layers import Layer, Layers

CLIPPED = ("query", "key")


def clipped_layers(layers: Layers) -> list[Layer]:
    """The layers that make queries or keys."""
    return [layer for layer in layers.values() if set(layer.makes) & set(CLIPPED)]


def qk_clipped(params: Any, attention: Any, layers: Layers, threshold: float) -> Any:
    """Parameters whose heads' largest logits of the last step would have been at most `threshold`.

    With S the largest logit of a head and f = min(1, threshold / S), what makes its queries and what makes its keys are
    both multiplied by √f, biases among them. Keys that a group of heads shares have the root of the least f of the group,
    and each head's queries the rest of its own.

    Args:
      params: of a model whose attention states what its projections make, as `sigmarep.nn.MultiHeadAttention` does; these
        are not reparametrised.
      attention: the collection that it recorded, `max_logit` (N,) or (layers, N) where layers are stacked.
      layers: of the model.

    Raises:
      ValueError: no attention around a layer that makes queries or keys has recorded its logits.
    """
    factors: dict[str, Any] = {}
    for layer in clipped_layers(layers):
        largest = _max_logit(attention, layer)
        factor = jnp.minimum(1.0, threshold / jnp.maximum(largest, threshold))
        factors[layer.module] = (layer, _share(factor, layer, layers))

    def scaled(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        names = [entry.key for entry in path]
        layer, root = factors.get("/".join(names[:-1]), (None, None))
        if layer is None:
            return x
        name = "/".join(names)
        stacked = layers.stacked[name]
        # A bias has the outputs alone.
        own = tuple(axis for axis in range(x.ndim) if axis not in stacked)
        outputs = layer.outputs if name == layer.name else own
        return x * _over(root, layer, x.shape, stacked, outputs).astype(x.dtype)

    return jax.tree_util.tree_map_with_path(scaled, params)


def _share(factor: jax.Array, layer: Layer, layers: Layers) -> jax.Array:
    """What a layer of queries or keys has of the factors (*stacked, N) on its attention's logits, by its own heads."""
    siblings = (each for each in layers.values() if each.module.rpartition("/")[0] == layer.module.rpartition("/")[0])
    keys = next((each for each in siblings if each.makes == ("key",)), layer)
    heads = keys.shape[keys.outputs[0]] if len(keys.outputs) > 1 and keys.makes == ("key",) else factor.shape[-1]
    if heads == factor.shape[-1]:
        return jnp.sqrt(factor)
    of_keys = jnp.sqrt(jnp.min(factor.reshape(*factor.shape[:-1], heads, -1), axis=-1))
    return of_keys if layer is keys else factor / jnp.repeat(of_keys, factor.shape[-1] // heads, axis=-1)


def _max_logit(attention: Any, layer: Layer) -> jax.Array:
    """The largest logits of the attention that the layer belongs to: the nearest module around it that recorded them."""
    nearest: jax.Array | None = None
    for name in layer.module.split("/"):
        if not isinstance(attention, Mapping):
            break
        nearest = attention.get("max_logit", nearest)
        attention = attention.get(name)
    if nearest is None:
        raise ValueError(f"{layer.name}: no attention around it has recorded max_logit")
    return nearest


def _over(
    root: jax.Array, layer: Layer, shape: tuple[int, ...], stacked: tuple[int, ...], outputs: tuple[int, ...]
) -> jax.Array:
    """The factors `root` (*stacked, N) of heads, broadcastable to a parameter of the layer with these axes."""
    sizes = [shape[axis] for axis in outputs]
    slots = sizes.pop(0) if len(layer.makes) > 1 else 0
    heads = root.shape[-1]
    factor = jnp.repeat(root, math.prod(sizes) // heads, axis=-1).reshape(*root.shape[:-1], *sizes)
    if slots:
        unclipped = jnp.asarray([made not in CLIPPED for made in layer.makes]).reshape(-1, *(1,) * len(sizes))
        factor = jnp.where(unclipped, 1.0, jnp.expand_dims(factor, len(stacked)))
    axes = stacked + outputs
    factor = jnp.transpose(factor, sorted(range(len(axes)), key=axes.__getitem__))
    return jnp.expand_dims(factor, [axis for axis in range(len(shape)) if axis not in axes])
