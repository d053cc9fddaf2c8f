"""The keys that each query of attention sees, in one object that a model makes once and hands down.

Shapes: B batch, T queries, S keys, N heads.
"""

from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp


class RealTokens(NamedTuple):
    """Bool (B, T) and (B, S), True for real queries and keys; None for all. One array where both are the same tokens."""

    queries: jax.Array | None
    keys: jax.Array | None


@flax.struct.dataclass
class Visibility:
    """The keys that each query sees, and the queries that statistics count.

    A query sees a key if all of `key_mask`, `segments`, `mask` and `is_causal` let it; None lets it see every key.

    Attributes:
      key_mask: bool (B, S), True for real keys, False for padding.
      query_mask: bool (B, T), True for the queries that statistics and penalties count. In self-attention None stands for
        the real keys, elsewhere for all queries.
      segments: int (B, T), self-attention only: a token sees its own segment; 0 stands for padding.
      mask: bool, broadcastable to (B, N, T, S), True where a key is visible.
      is_causal: query i sees keys up to i + S − T.
    """

    key_mask: jax.Array | None = None
    query_mask: jax.Array | None = None
    segments: jax.Array | None = None
    mask: jax.Array | None = None
    is_causal: bool = flax.struct.field(pytree_node=False, default=False)

    def real_tokens(self, *, self_attention: bool) -> RealTokens:
        """Masks of the queries that count and of the keys that are not padding."""
        keys = self.key_mask if self.segments is None else self.segments > 0
        return RealTokens(keys if self_attention and self.query_mask is None else self.query_mask, keys)

    def matrix(self, queries: int, keys: int) -> jax.Array | None:
        """Bool, broadcastable to (B, N, T, S), True where a query sees a key; None if all see all."""
        mask, is_causal = self.for_kernel(queries, keys)
        return _both(mask, causal(queries, keys)) if is_causal else mask

    def for_kernel(self, queries: int, keys: int) -> tuple[jax.Array | None, bool]:
        """The mask and `is_causal` of a fused kernel, which needs no mask for causality where T = S.

        Where T ≠ S kernels count from the first query and key, this class from the last: causality is in the mask then.
        """
        mask = self.mask
        if self.segments is not None:
            mask = _both(mask, self.segments[:, None, :, None] == self.segments[:, None, None, :])
        if self.key_mask is not None:
            mask = _both(mask, self.key_mask[:, None, None, :])
        if self.is_causal and queries != keys:
            return _both(mask, causal(queries, keys)), False
        return mask, self.is_causal

    def for_blocks_of_keys(self) -> dict[str, Any]:
        """Arguments of `sigmarep.core.entropy.attention_statistics`, which forms the mask one block of keys at a time."""
        return {
            "mask": self.mask,
            "key_mask": self.key_mask,
            "segments": self.segments,
            "is_causal": self.is_causal,
        }


FULL = Visibility()
CAUSAL = Visibility(is_causal=True)


def causal(queries: int, keys: int) -> jax.Array:
    """Bool (T, S): query i sees keys up to i + S − T."""
    return jnp.tril(jnp.ones((queries, keys), bool), keys - queries)


def _both(mask: jax.Array | None, other: jax.Array) -> jax.Array:
    return other if mask is None else mask & other
