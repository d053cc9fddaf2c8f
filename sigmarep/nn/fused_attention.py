"""Attention by kernels that keep no attention matrix: cuDNN's, and that of `sigmarep.core.flash_attention`."""

from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from sigmarep.core.entropy import AttentionStatistics
from sigmarep.core.flash_attention import NO_KEY, flash_attention
from sigmarep.nn.axes import spec_of
from sigmarep.nn.visibility import Visibility


def flash(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    visibility: Visibility,
    *,
    logit_cap: float = 0.0,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
    statistics: bool = False,
) -> tuple[jax.Array, AttentionStatistics | None]:
    """`flash_attention` of the keys that each query sees, each device of a mesh with its own examples and heads.

    Args:
      query: (B, T, N, H). key, value: (B, S, N, H).
      visibility: without a `mask`.
      dropout_key: of the random numbers; needed for dropout.
      statistics: see `flash_attention`.

    Raises:
      ValueError: `visibility` has a mask.
    """
    if visibility.mask is not None:
        raise ValueError(
            "implementation = 'flash': knows padding, segments and causality, not Visibility.mask; use 'xla' or 'auto'"
        )
    (b, queries, n, _), keys = query.shape, key.shape[1]
    identities: tuple[jax.Array, ...] = ()
    if visibility.segments is not None or visibility.key_mask is not None:
        segments = visibility.segments
        of_queries = jnp.zeros((b, queries), jnp.int32) if segments is None else segments.astype(jnp.int32)
        of_keys = jnp.zeros((b, keys), jnp.int32) if segments is None else of_queries
        if visibility.key_mask is not None:
            of_keys = jnp.where(visibility.key_mask, of_keys, NO_KEY)
        identities = (of_queries, of_keys)
    seeds: tuple[jax.Array, ...] = ()
    if dropout:
        assert dropout_key is not None
        seeds = (jax.random.bits(dropout_key, (b, n), jnp.uint32).astype(jnp.int32),)
    platform = _platform()

    def attend(
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        identities: tuple[jax.Array, ...],
        seeds: tuple[jax.Array, ...],
    ) -> tuple[jax.Array, AttentionStatistics | None]:
        return flash_attention(
            query,
            key,
            value,
            query_identities=identities[0] if identities else None,
            key_identities=identities[1] if identities else None,
            is_causal=visibility.is_causal,
            logit_cap=logit_cap or None,
            dropout=dropout,
            dropout_seeds=seeds[0] if seeds else None,
            statistics=statistics,
            platform=platform,
        )

    spec = spec_of(query.shape, "batch", None, "heads", None)
    if spec is None or jax.sharding.get_abstract_mesh().size == 1:
        return attend(query, key, value, identities, seeds)
    examples, heads = spec[0], spec[2]
    tokens, rows = PartitionSpec(examples, None, heads, None), PartitionSpec(examples, heads)
    sharded = jax.shard_map(
        attend,
        in_specs=(tokens, tokens, tokens, PartitionSpec(examples), rows),
        out_specs=(tokens, rows),
        check_vma=False,
    )
    return cast(tuple[jax.Array, AttentionStatistics | None], sharded(query, key, value, identities, seeds))


def _platform() -> str:
    """That of the devices that the program is for; they may not be there."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def cudnn_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, *, mask: jax.Array | None, is_causal: bool
) -> jax.Array:
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
    attended: jax.Array = jax.nn.dot_product_attention(query, key, value, mask=mask, **lengths, **options)
    return attended[:, :length]


def with_even_lengths(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None, dict[str, Any]]:
    """Pads odd numbers of tokens, which cuDNN refuses in training, by one that is never seen, and broadcasts the mask.

    Returns:
      Queries, keys, values, the mask over all queries and keys or None, and the true lengths as arguments of
      `jax.nn.dot_product_attention`.
    """
    odd = [x.shape[1] % 2 for x in (query, key)]
    lengths: dict[str, Any] = {}
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


def cudnn_supports(query: jax.Array) -> bool:
    """True if cuDNN's kernel supports this GPU, and the type and head size of these queries."""
    if query.dtype not in (jnp.bfloat16, jnp.float16) or query.shape[-1] % 8 or query.shape[-1] > 128:
        return False
    if jax.default_backend() != "gpu":
        return False
    return float(getattr(jax.local_devices()[0], "compute_capability", 0)) >= 8.0
