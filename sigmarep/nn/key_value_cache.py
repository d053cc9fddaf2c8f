"""Keys and values of earlier calls in the collection `cache` of an attention layer, for decoding.

Shapes: B batch, L tokens of the cache, T new tokens, S tokens of the context, N heads, H head_dim.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from sigmarep.nn.visibility import Visibility


def append(layer: nn.Module, key: jax.Array, value: jax.Array, length: int) -> tuple[jax.Array, jax.Array, Visibility]:
    """Puts the keys and values of new tokens after the earlier ones.

    Args:
      layer: the layer that is called, with `cache` mutable; its first call makes the cache.
      key, value: (B, T, N, H).
      length: L.

    Returns:
      All keys and values, (B, L, N, H), and who sees them: a new token itself and the tokens before it.
    """
    batch, new, *rest = key.shape
    keys = layer.variable("cache", "cached_key", jnp.zeros, (batch, length, *rest), key.dtype)
    values = layer.variable("cache", "cached_value", jnp.zeros, (batch, length, *rest), value.dtype)
    index = layer.variable("cache", "cached_index", lambda: jnp.zeros((), jnp.int32))
    start = index.value
    keys.value = jax.lax.dynamic_update_slice_in_dim(keys.value, key, start, axis=1)
    values.value = jax.lax.dynamic_update_slice_in_dim(values.value, value, start, axis=1)
    index.value = start + new
    visible = jnp.arange(length)[None, :] <= start + jnp.arange(new)[:, None]
    return keys.value, values.value, Visibility(mask=visible[None, None])


def of_context(layer: nn.Module) -> tuple[jax.Array, jax.Array] | None:
    """Keys and values (B, S, N, H) that an earlier call stored by `store_context`; None in the first call."""
    if not layer.has_variable("cache", "cached_key"):
        return None
    return layer.get_variable("cache", "cached_key"), layer.get_variable("cache", "cached_value")


def store_context(layer: nn.Module, key: jax.Array, value: jax.Array) -> None:
    """Stores the keys and values of a context, (B, S, N, H)."""
    layer.put_variable("cache", "cached_key", key)
    layer.put_variable("cache", "cached_value", value)
