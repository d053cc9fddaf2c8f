"""cuDNN's attention by `jax.nn.dot_product_attention`, and the arguments that its kernel takes."""

from typing import Any

import jax
import jax.numpy as jnp


def cudnn_attention(query, key, value, *, mask, is_causal: bool) -> jax.Array:
    """softmax(Q Kᵀ/√H)·V by a kernel that keeps no attention matrix.

    Args:
      query: (B, T, N, H), float16 or bfloat16 on a GPU. key, value: (B, S, N, H).
      mask: bool, broadcastable to (B, N, T, S), True where a key is visible; or None.

    Returns:
      (B, T, N, H).
    """
    options: dict[str, Any] = {"is_causal": is_causal, "implementation": "cudnn"}
    length = query.shape[1]
    query, key, value, mask, lengths = with_even_lengths(query, key, value, mask)
    return jax.nn.dot_product_attention(query, key, value, mask=mask, **lengths, **options)[:, :length]


def with_even_lengths(query, key, value, mask):
    """Pads odd numbers of tokens, which cuDNN refuses in training, by one that is never seen, and broadcasts the mask.

    Returns:
      Queries, keys, values, the mask over all queries and keys or None, and the true lengths as arguments of
      `jax.nn.dot_product_attention`.
    """
    odd = [x.shape[1] % 2 for x in (query, key)]
    lengths: dict[str, jax.Array] = {}
    if mask is not None:
        mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
        mask = jnp.broadcast_to(mask, (*mask.shape[:2], query.shape[1], key.shape[1]))
        # The added query may see any key; the added key is seen by none.
        mask = jnp.pad(mask, ((0, 0), (0, 0), (0, odd[0]), (0, 0)), constant_values=True)
        mask = jnp.pad(mask, ((0, 0), (0, 0), (0, 0), (0, odd[1])), constant_values=False)
    elif any(odd):
        full = (jnp.full(x.shape[0], x.shape[1], jnp.int32) for x in (query, key))
        lengths = dict(zip(("query_seq_lengths", "key_value_seq_lengths"), full, strict=True))
    query, key, value = (
        jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0))) if more else x
        for x, more in zip((query, key, value), (odd[0], odd[1], odd[1]), strict=True)
    )
    return query, key, value, mask, lengths


def cudnn_supports(query) -> bool:
    """True if cuDNN's kernel supports this GPU, and the type and head size of these queries."""
    if query.dtype not in (jnp.bfloat16, jnp.float16) or query.shape[-1] % 8 or query.shape[-1] > 128:
        return False
    if jax.default_backend() != "gpu":
        return False
    return float(getattr(jax.local_devices()[0], "compute_capability", 0)) >= 8.0
