"""Attention without a T × S array, and the exact statistics of every query from the same pass.

One kernel family in Pallas, for TPUs (Mosaic) and GPUs (Triton), and interpreted elsewhere. Blocks of logits are formed
with the keys as rows and the queries as columns: what belongs to a query, such as its largest logit, is then a row of the
block, which vector units hold without waste. The forward pass is an online softmax (Milakov and Gimelshein, 2018; Dao et
al., 2022) that carries, beside Σ exp(a − m), the sums that `sigmarep.core.entropy` makes its statistics of. The backward
pass forms the logits again, once for the keys and values and once for the queries.

Shapes: B batch, T queries, S keys, N heads, H head_dim. Inside they are (B, N, T, H).
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from sigmarep.core import flash_kernels
from sigmarep.core.entropy import AttentionStatistics, Sums, finished
from sigmarep.core.flash_kernels import ROWS, Plan

# Keys and queries of a block. A GPU's block is held by one multiprocessor.
BLOCKS = {"tpu": 512, "gpu": 64}
# Bytes of a token of one head in a TPU's memory, from where blocks are half as long: the backward pass holds all tokens of
# the other side, and 1,500 of 192 float32 features beside blocks of 512 are more than 16 MB.
WIDE = 512
LANES = 128
# Identities that nothing has, of the tokens that fill up the last block.
NO_QUERY, NO_KEY = -1, -2


def flash_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    query_identities: jax.Array | None = None,
    key_identities: jax.Array | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    logit_cap: float | None = None,
    dropout: float = 0.0,
    dropout_seeds: jax.Array | None = None,
    statistics: bool = False,
    block_size: int | None = None,
    platform: str | None = None,
) -> tuple[jax.Array, AttentionStatistics | None]:
    """softmax(s·Q Kᵀ)·V and, of the same logits, entropy, largest logit and variance of every query.

    Gradients flow through the first output, in reverse mode. A query that sees no key gets zeros.

    Args:
      query: (B, T, N, H), of float32, bfloat16 or float16.
      key, value: (B, S, N, H), of the same type.
      query_identities, key_identities: int (B, T) and (B, S): a query sees the keys of its own identity, such as its
        segment's. Padding is a key of `NO_KEY`; no query has a negative one. None: all see all.
      is_causal: query i sees keys up to i + S − T.
      scale: s, 1/√H if None.
      logit_cap: see `sigmarep.core.entropy.soft_capped`.
      dropout: rate of dropout on the attention weights, below 1.
      dropout_seeds: int32 (B, N), random; needed for dropout. The weights that are dropped depend on them and on the
        positions of query and key alone.
      statistics: also return `AttentionStatistics`, which have no gradient. Products of half precision are
        exact, those of float32 have `jax.lax.Precision.HIGHEST`.
      block_size: queries and keys a block; a power of two.
      platform: tpu, gpu, or cpu, where the kernels are interpreted; that of the default backend if None.

    Returns:
      The attended values, (B, T, N, H), and the statistics, None if not asked for.

    Raises:
      ValueError: one of the identities is missing, or the seeds of the dropout.
    """
    platform = platform or jax.default_backend()
    if (query_identities is None) != (key_identities is None):
        raise ValueError("query_identities, key_identities: expected both or neither")
    if dropout and dropout_seeds is None:
        raise ValueError(f"dropout = {dropout}: needs dropout_seeds")
    (_, queries, _, features), keys = query.shape, key.shape[1]
    block = block_size or BLOCKS.get(platform, LANES)
    if block_size is None and platform == "tpu" and -(-features // LANES) * LANES * query.dtype.itemsize > WIDE:
        block //= 2
    plan = Plan(
        queries=queries,
        keys=keys,
        block_q=_block(queries, block, platform),
        block_k=_block(keys, block, platform),
        scale=1.0 / math.sqrt(features) if scale is None else scale,
        cap=logit_cap or None,
        is_causal=is_causal,
        identities=query_identities is not None and key_identities is not None,
        dropout=dropout,
        statistics=statistics,
        platform=platform,
    )
    others: tuple[jax.Array, ...] = ()
    if query_identities is not None and key_identities is not None:
        others = (
            _padded(query_identities, 1, plan.block_q, NO_QUERY)[:, None, :],
            _padded(key_identities, 1, plan.block_k, NO_KEY)[:, :, None],
        )
    if dropout_seeds is not None and dropout:
        others = (*others, dropout_seeds[:, :, None, None])
    heads = [
        _padded(jnp.swapaxes(x, 1, 2), 2, size, 0)
        for x, size in zip((query, key, value), (plan.block_q, plan.block_k, plan.block_k), strict=True)
    ]
    if platform == "gpu":
        # Triton's blocks have sides that are powers of two.
        heads = [_padded(x, 3, pl.next_power_of_2(features), 0) for x in heads]
    attended, rows = _attend(plan, *heads, others)
    attended = jnp.swapaxes(attended[:, :, :queries, :features], 1, 2)
    return attended, _statistics(rows[..., :queries]) if statistics else None


def _block(tokens: int, most: int, platform: str) -> int:
    """Tokens a block: `most`, or for short sequences no more than hold them."""
    least = LANES if platform == "tpu" else 16
    return min(most, max(least, pl.next_power_of_2(tokens)))


def _padded(x: jax.Array, axis: int, multiple: int, value: int) -> jax.Array:
    """x with its axis lengthened to a multiple."""
    more = -x.shape[axis] % multiple
    return jnp.pad(x, [(0, more if i == axis else 0) for i in range(x.ndim)], constant_values=value) if more else x


def _statistics(rows: jax.Array) -> AttentionStatistics:
    top, total, weighted, first, second, keys = (rows[:, :, i] for i in range(6))
    return finished(Sums(top, total, weighted, top, first, second, keys.astype(jnp.int32)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    plan: Plan, query: jax.Array, key: jax.Array, value: jax.Array, others: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
    return _forward(plan, query, key, value, others)


def _attend_fwd(
    plan: Plan, query: jax.Array, key: jax.Array, value: jax.Array, others: tuple[jax.Array, ...]
) -> tuple[tuple[jax.Array, jax.Array], Any]:
    attended, rows = _forward(plan, query, key, value, others)
    return (attended, rows), (query, key, value, others, attended, rows[:, :, :2])


def _attend_bwd(plan: Plan, residuals: Any, cotangents: tuple[jax.Array, jax.Array]) -> tuple[Any, ...]:
    query, key, value, others, attended, rows = residuals
    gradient = cotangents[0]
    top, total = rows[:, :, 0], rows[:, :, 1]
    # Of a query that sees no key every weight is to be 0, and so of those that fill up the last block.
    lse = jnp.where(total == 0, jnp.inf, top + jnp.log(total))
    lse = jnp.where(jnp.arange(lse.shape[-1]) < plan.queries, lse, jnp.inf)
    delta = jnp.sum(attended.astype(jnp.float32) * gradient.astype(jnp.float32), axis=-1)
    rows = jnp.stack([lse, delta] + [jnp.zeros_like(lse)] * (ROWS - 2), axis=2)
    inputs = (query, key, value, gradient.astype(query.dtype), rows, *others)
    d_query = _backward_queries(plan, *inputs)
    d_key, d_value = _backward_keys(plan, *inputs)
    return d_query, d_key, d_value, jax.tree.map(lambda _: None, others)


_attend.defvjp(_attend_fwd, _attend_bwd)


def _specs(plan: Plan, features: int, *, by_queries: bool) -> dict[str, pl.BlockSpec]:
    """The part of each array that a program of the grid (B, N, blocks) sees: its own block, and all of the other side."""
    queries, keys = plan.query_blocks * plan.block_q, plan.key_blocks * plan.block_k

    def tokens(length: int, block: int, own: bool) -> pl.BlockSpec:
        shape = (1, 1, block if own else length, features)
        return pl.BlockSpec(shape, (lambda b, n, i: (b, n, i, 0)) if own else (lambda b, n, i: (b, n, 0, 0)))

    q_block = plan.block_q if by_queries else queries
    k_block = keys if by_queries else plan.block_k
    return {
        "query": tokens(queries, plan.block_q, by_queries),
        "key": tokens(keys, plan.block_k, not by_queries),
        "rows": pl.BlockSpec(
            (1, 1, ROWS, q_block), (lambda b, n, i: (b, n, 0, i)) if by_queries else (lambda b, n, i: (b, n, 0, 0))
        ),
        "query_identities": pl.BlockSpec(
            (1, 1, q_block), (lambda b, n, i: (b, 0, i)) if by_queries else (lambda b, n, i: (b, 0, 0))
        ),
        "key_identities": pl.BlockSpec(
            (1, k_block, 1), (lambda b, n, i: (b, 0, 0)) if by_queries else (lambda b, n, i: (b, i, 0))
        ),
        "seeds": pl.BlockSpec((1, 1, 1, 1), lambda b, n, i: (b, n, 0, 0)),
    }


def _call(kernel: Callable[..., None], plan: Plan, *arrays: jax.Array, products: int, **options: Any) -> Any:
    """`pl.pallas_call` of the arrays, the queries first, for the plan's platform.

    Args:
      products: number of matrix products of all queries with all keys, for the compiler's counts.
    """
    b, n, _, features = arrays[0].shape
    pairs = b * n * plan.queries * plan.keys // (2 if plan.is_causal else 1)
    moved = (*arrays, *jax.tree.leaves(options["out_shape"]))
    options["cost_estimate"] = pl.CostEstimate(
        flops=2 * products * pairs * features,
        transcendentals=pairs,
        bytes_accessed=sum(math.prod(x.shape) * x.dtype.itemsize for x in moved),
    )
    if plan.platform == "tpu":
        from jax.experimental.pallas import tpu as pltpu

        options["compiler_params"] = pltpu.CompilerParams(dimension_semantics=("parallel",) * 3)
    elif plan.platform == "gpu":
        from jax.experimental.pallas import triton

        options["compiler_params"] = triton.CompilerParams(num_warps=4, num_stages=2)
    else:
        options["interpret"] = True
    return pl.pallas_call(functools.partial(kernel, plan), name=f"flash_attention_{kernel.__name__}", **options)(
        *arrays
    )


def _forward(
    plan: Plan, query: jax.Array, key: jax.Array, value: jax.Array, others: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
    b, n, queries, features = query.shape
    specs = _specs(plan, features, by_queries=True)
    rows = jax.ShapeDtypeStruct((b, n, ROWS, queries), jnp.float32)
    attended, rows = _call(
        flash_kernels.forward,
        plan,
        *(query, key, value, *others),
        products=2,
        grid=(b, n, plan.query_blocks),
        in_specs=[specs["query"], specs["key"], specs["key"], *_other_specs(plan, specs)],
        out_specs=[specs["query"], specs["rows"]],
        out_shape=[jax.ShapeDtypeStruct(query.shape, query.dtype), rows],
    )
    return attended, rows


def _backward_queries(plan: Plan, query: jax.Array, *others: jax.Array) -> jax.Array:
    specs = _specs(plan, query.shape[-1], by_queries=True)
    d_query: jax.Array = _call(
        flash_kernels.backward_queries,
        plan,
        *(query, *others),
        products=3,
        grid=(*query.shape[:2], plan.query_blocks),
        in_specs=[specs[name] for name in ("query", "key", "key", "query", "rows")] + _other_specs(plan, specs),
        out_specs=specs["query"],
        out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
    )
    return d_query


def _backward_keys(
    plan: Plan, query: jax.Array, key: jax.Array, value: jax.Array, *others: jax.Array
) -> tuple[jax.Array, jax.Array]:
    specs = _specs(plan, query.shape[-1], by_queries=False)
    d_key, d_value = _call(
        flash_kernels.backward_keys,
        plan,
        *(query, key, value, *others),
        products=4,
        grid=(*key.shape[:2], plan.key_blocks),
        in_specs=[specs[name] for name in ("query", "key", "key", "query", "rows")] + _other_specs(plan, specs),
        out_specs=[specs["key"], specs["key"]],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (key, value)],
    )
    return d_key, d_value


def _other_specs(plan: Plan, specs: dict[str, pl.BlockSpec]) -> list[pl.BlockSpec]:
    names = ("query_identities", "key_identities") * plan.identities + ("seeds",) * bool(plan.dropout)
    return [specs[name] for name in names]
