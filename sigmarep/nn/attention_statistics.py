"""Statistics that an attention layer records of one call: per head, averaged over its queries.

Shapes: B batch, T queries, S keys, N heads, H head_dim, D width.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sigmarep.core import entropy, norms
from sigmarep.nn.axes import shared_among_devices
from sigmarep.nn.fold import fold
from sigmarep.nn.grouped_queries import repeated


class CountedQueries(NamedTuple):
    """The queries that statistics count: the real ones that see a key.

    Attributes:
      mask: bool (B, N, T).
      number: (N,) of these, at least 1.
    """

    mask: jax.Array
    number: jax.Array

    @classmethod
    def of(cls, statistics: entropy.AttentionStatistics, query_mask: jax.Array | None) -> "CountedQueries":
        """Args: statistics of every query; query_mask, bool (B, T), True for real queries, or None for all."""
        counted = statistics.visible > 0
        if query_mask is not None:
            counted = counted & query_mask[:, None, :]
        counted = jnp.broadcast_to(counted, statistics.entropy.shape)
        return cls(counted, jnp.maximum(jnp.sum(counted, axis=(0, 2)), 1))

    def mean(self, values: jax.Array) -> jax.Array:
        """Mean over the counted queries, (B, N, T) to (N,)."""
        return jnp.sum(jnp.where(self.mask, values, 0.0), axis=(0, 2)) / self.number

    def max(self, values: jax.Array) -> jax.Array:
        """Maximum over the counted queries, (B, N, T) to (N,); NaN where one of them has it."""
        return entropy.largest(jnp.where(self.mask, values, -jnp.inf), (0, 2))


class QueryKeyKernels(NamedTuple):
    """Effective kernels (N, D, H) of queries and keys, and their biases as rows (N, 1, H), None for a layer without."""

    kernels: Sequence[jax.Array]
    biases: tuple[jax.Array, jax.Array] | None

    def norms(self) -> tuple[jax.Array, jax.Array]:
        """‖W_q W_kᵀ‖₂ of every head, (N,), without the biases and with them as a row of each kernel."""
        rows = (None, None) if self.biases is None else self.biases
        grams = [norms.gram(kernel, row) for kernel, row in zip(self.kernels, rows, strict=True)]
        # Heads are independent, and so are both norms of one.
        flat = [norms.Gram(each.matrix.reshape(-1, *each.matrix.shape[-2:]), each.scale.reshape(-1)) for each in grams]
        products = shared_among_devices(norms.product_norm, *flat).reshape(-1, len(self.kernels[0]))
        return products[0], products[-1]


def query_key_kernels(variables: Mapping[str, Any], *, stored_sigma: bool, use_bias: bool) -> QueryKeyKernels:
    """Kernels and biases that make the queries and the keys of an attention layer.

    Args:
      variables: of the layer; the projections are separate or fused.
      stored_sigma: the projections of this call have stored their σ already.
      use_bias: the layer has biases.
    """
    names = [name for name in ("query", "key", "qk", "qkv") if name in variables["params"]]
    state = variables.get("spectral", {})
    folded = fold(
        {
            "params": {name: variables["params"][name] for name in names},
            "spectral": {name: state[name] for name in names if name in state},
        },
        stored_sigma=stored_sigma,
    )
    if "query" in folded:
        pair = [folded[name] for name in ("query", "key")]
    else:
        fused = folded[names[0]]
        pair = [{name: x[:, slot] if name == "kernel" else x[slot] for name, x in fused.items()} for slot in (0, 1)]
    kernels = [jnp.moveaxis(jax.lax.stop_gradient(each["kernel"]), 1, 0) for each in pair]
    kernels[1] = repeated(kernels[1], len(kernels[0]), axis=0)
    if not use_bias:
        return QueryKeyKernels(kernels, None)
    query_bias, key_bias = (jax.lax.stop_gradient(each["bias"])[:, None] for each in pair)
    return QueryKeyKernels(kernels, (query_bias, repeated(key_bias, len(query_bias), axis=0)))


def summary(statistics: entropy.AttentionStatistics, counted: CountedQueries) -> dict[str, jax.Array]:
    """Statistics of the attention weights, each (N,): entropies are in nats, see `sigmarep.nn.MultiHeadAttention`."""
    return {
        "entropy": counted.mean(statistics.entropy),
        "entropy_normalised": counted.mean(entropy.normalised_entropy(statistics.entropy, statistics.visible)),
        "max_logit": counted.max(statistics.max_logit),
        "logit_variance": counted.mean(statistics.logit_variance),
    }


def bound(sigma: jax.Array, statistics: entropy.AttentionStatistics, counted: CountedQueries) -> jax.Array:
    """Mean over queries of the least entropy that Theorem 3.1 allows, (N,), in nats.

    Args:
      sigma: (B, N), the norm of the operator of the logits, the softmax scale included.
    """
    return counted.mean(entropy.entropy_lower_bound(sigma[:, :, None], statistics.visible))


def norms_of_inputs(
    queries: jax.Array, keys: jax.Array, query_mask: jax.Array | None, key_mask: jax.Array | None
) -> jax.Array:
    """‖X‖₂·‖Y‖₂ of every pair of sequences, (B,), padding left out.

    Args:
      queries: X, (B, T, D), what queries are projected from. Both have a column of ones, for the biases.
      keys: Y, (B, S, D), what keys are projected from; X itself in self-attention.
      query_mask, key_mask: bool (B, T) and (B, S), True for real tokens.
    """
    pair = [_sequence_norms(queries, query_mask, ones=True)] * 2
    # In self-attention both are one; two loops would be compiled as two.
    if keys is not queries or key_mask is not query_mask:
        pair[1] = _sequence_norms(keys, key_mask, ones=True)
    return pair[0] * pair[1]


def norms_of_heads(
    query: jax.Array, key: jax.Array, query_mask: jax.Array | None, key_mask: jax.Array | None
) -> jax.Array:
    """‖Q‖₂·‖K‖₂ of every head's queries (B, T, N, H) and keys (B, S, N, H), (B, N), padding left out."""
    pair = [_sequence_norms(jnp.moveaxis(x, 2, 0), real) for x, real in ((query, query_mask), (key, key_mask))]
    return (pair[0] * pair[1]).T


def _sequence_norms(x: jax.Array, real: jax.Array | None, *, ones: bool = False) -> jax.Array:
    """‖X‖₂ of every sequence (…, B, T, D) without padding, where `real` (B, T) is False; `ones` adds a column of ones."""
    x = jax.lax.stop_gradient(x)
    column = jnp.ones(x.shape[:-1], x.dtype) if ones else None
    if real is not None:
        x = jnp.where(real[..., None], x, 0)
        column = real.astype(x.dtype) if ones else None
    return norms.sequence_norm(x, column)
