"""The kernels of `sigmarep.core.flash_attention`: attention with its sums, and the backward pass of queries and of keys.

Each is one program of a grid (B, N, blocks): of one side it sees its own block, of the other all blocks, in a loop. Blocks
of logits, weights and their gradients are (keys, queries).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from sigmarep.core.entropy import Sums, moved, not_far_below, soft_capped

# Rows of the array of numbers that a query has, whose last axis is the queries: a register of a TPU has eight.
ROWS = 8


class Plan(NamedTuple):
    """All that a kernel is compiled for beside shapes: true numbers of tokens, blocks and options."""

    queries: int
    keys: int
    block_q: int
    block_k: int
    scale: float
    cap: float | None
    is_causal: bool
    identities: bool
    dropout: float
    statistics: bool
    platform: str

    @property
    def offset(self) -> int:
        """Query i sees keys up to i + offset where attention is causal."""
        return self.keys - self.queries

    @property
    def key_blocks(self) -> int:
        return -(-self.keys // self.block_k)

    @property
    def query_blocks(self) -> int:
        return -(-self.queries // self.block_q)


def _dot(a: jax.Array, b: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """The product of two matrices over an axis of each, in float32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(
        a, b, (((axes[0],), (axes[1],)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def _logits(
    plan: Plan, query: jax.Array, key: jax.Array, identities: Any, q_start: jax.Array, k_start: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """Logits (keys, queries) of a block, and where they are visible, None for everywhere."""
    logits = soft_capped(_dot(key, query, (1, 1)) * plan.scale, plan.cap)
    visible = None
    if plan.is_causal or (plan.keys % plan.block_k and not plan.identities):
        keys = k_start + lax.broadcasted_iota(jnp.int32, logits.shape, 0)
        queries = q_start + lax.broadcasted_iota(jnp.int32, logits.shape, 1)
        visible = keys <= queries + plan.offset if plan.is_causal else keys < plan.keys
    if plan.identities:
        same = identities[0] == identities[1]
        visible = same if visible is None else visible & same
    return logits, visible


def dropout_factors(plan: Plan, seed: jax.Array, shape: tuple[int, ...], q_start: Any, k_start: Any) -> jax.Array:
    """Factors of the weights of a block under dropout: 0, or 1/(1 − rate). The bits are MurmurHash3's finalizer of seed and
    positions, so that the backward pass has them again."""
    x = (k_start + lax.broadcasted_iota(jnp.int32, shape, 0)) * jnp.int32(_signed(0x9E3779B1))
    x = (x ^ seed) + (q_start + lax.broadcasted_iota(jnp.int32, shape, 1)) * jnp.int32(_signed(0x85EBCA77))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        x = (x ^ lax.shift_right_logical(x, jnp.int32(shift))) * jnp.int32(_signed(factor))
    # Uniform from −2³¹ to 2³¹.
    return jnp.where(x >= jnp.int32(round((plan.dropout - 0.5) * 2**32)), 1.0 / (1.0 - plan.dropout), 0.0)


def _signed(bits: int) -> int:
    return bits - 2**32 if bits >= 2**31 else bits


def _only(visible: jax.Array | None, x: jax.Array, otherwise: float) -> jax.Array:
    return x if visible is None else jnp.where(visible, x, otherwise)


def forward(plan: Plan, q_ref: Any, k_ref: Any, v_ref: Any, *refs: Any) -> None:
    *others, out_ref, rows_ref = refs
    i = pl.program_id(2)
    query = q_ref[0, 0]
    own = others[0][0] if plan.identities else None

    def step(j: jax.Array, carry: tuple[jax.Array, Sums]) -> tuple[jax.Array, Sums]:
        attended, sums = carry
        part = pl.ds(j * plan.block_k, plan.block_k)
        identities = (own, others[1][0, part, :]) if plan.identities else None
        logits, visible = _logits(plan, query, k_ref[0, 0, part, :], identities, i * plan.block_q, j * plan.block_k)
        top = jnp.maximum(sums.top, jnp.max(_only(visible, logits, -jnp.inf), axis=0, keepdims=True))
        earlier = moved(sums, top, top)
        # Where no key is visible any finite reference will do.
        differences = _only(visible, logits - jnp.where(jnp.abs(top) < jnp.inf, top, 0.0), 0.0)
        weights = _only(visible, jnp.exp(differences), 0.0)
        decay = jnp.exp(not_far_below(jnp.where(jnp.abs(sums.top) < jnp.inf, sums.top - top, 0.0)))
        value, used = v_ref[0, 0, part, :], weights
        if plan.dropout:
            used = weights * dropout_factors(plan, others[-1][0, 0], logits.shape, i * plan.block_q, j * plan.block_k)
        attended = decay * attended + _dot(value, used.astype(value.dtype), (0, 0))
        sums = earlier._replace(top=top, largest=top, total=earlier.total + _over_keys(weights))
        if plan.statistics:
            sums = sums._replace(
                weighted=earlier.weighted + _over_keys(weights * not_far_below(differences)),
                first=earlier.first + _over_keys(differences),
                second=earlier.second + _over_keys(differences * differences),
                keys=earlier.keys
                + (float(plan.block_k) if visible is None else _over_keys(visible.astype(jnp.float32))),
            )
        return attended, sums

    blocks = _visible_blocks(plan, i)
    row = jnp.zeros((1, plan.block_q), jnp.float32)
    start = Sums(row - jnp.inf, row, row, row - jnp.inf, row, row, row)
    attended, sums = lax.fori_loop(0, blocks, step, (jnp.zeros(query.shape[::-1], jnp.float32), start))
    attended = attended * jnp.where(sums.total == 0, 0.0, 1.0 / sums.total)
    out_ref[0, 0] = attended.T.astype(out_ref.dtype)
    place = lax.broadcasted_iota(jnp.int32, (ROWS, plan.block_q), 0)
    rows = jnp.zeros(place.shape, jnp.float32)
    values = (sums.top, sums.total, sums.weighted, sums.first, sums.second, sums.keys)
    for number, each in enumerate(values if plan.statistics else values[:2]):
        rows = jnp.where(place == number, each, rows)
    rows_ref[0, 0] = rows


def _quotient(x: jax.Array, block: int) -> jax.Array:
    """⌊x / block⌋ for a power of two; the division of a TPU's scalars asks which TPU it is, and there may be none yet."""
    return lax.shift_right_arithmetic(x, jnp.int32(block.bit_length() - 1))


def _visible_blocks(plan: Plan, i: jax.Array) -> jax.Array | int:
    """Blocks of keys up to the last that a query of block i sees: its last query sees the most."""
    if not plan.is_causal:
        return plan.key_blocks
    return jnp.clip(_quotient((i + 1) * plan.block_q - 1 + plan.offset, plan.block_k) + 1, 0, plan.key_blocks)


def _over_keys(x: jax.Array) -> jax.Array:
    return jnp.sum(x, axis=0, keepdims=True)


def _d_logits(
    plan: Plan,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    gradient: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    others: Any,
    identities: Any,
    q_start: jax.Array,
    k_start: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Weights of a block, as they are used, and the gradient of its products q·k, both (keys, queries)."""
    logits, visible = _logits(plan, query, key, identities, q_start, k_start)
    weights = _only(visible, jnp.exp(logits - lse), 0.0)
    d_weights, used = _dot(value, gradient, (1, 1)), weights
    if plan.dropout:
        factors = dropout_factors(plan, others[-1][0, 0], logits.shape, q_start, k_start)
        d_weights, used = d_weights * factors, weights * factors
    d_logits = weights * (d_weights - delta)
    if plan.cap is not None:
        d_logits = d_logits * (1.0 - (logits / plan.cap) ** 2)
    return used, d_logits * plan.scale


def backward_queries(
    plan: Plan, q_ref: Any, k_ref: Any, v_ref: Any, gradient_ref: Any, rows_ref: Any, *refs: Any
) -> None:
    *others, out_ref = refs
    i = pl.program_id(2)
    query, gradient = q_ref[0, 0], gradient_ref[0, 0]
    lse, delta = rows_ref[0, 0, 0:1, :], rows_ref[0, 0, 1:2, :]
    own = others[0][0] if plan.identities else None

    def step(j: jax.Array, total: jax.Array) -> jax.Array:
        part = pl.ds(j * plan.block_k, plan.block_k)
        identities = (own, others[1][0, part, :]) if plan.identities else None
        key, value = k_ref[0, 0, part, :], v_ref[0, 0, part, :]
        _, d_logits = _d_logits(
            plan,
            *(query, key, value, gradient, lse, delta, others, identities),
            q_start=i * plan.block_q,
            k_start=j * plan.block_k,
        )
        return total + _dot(d_logits.astype(key.dtype), key, (0, 0))

    blocks = _visible_blocks(plan, i)
    out_ref[0, 0] = lax.fori_loop(0, blocks, step, jnp.zeros(query.shape, jnp.float32)).astype(out_ref.dtype)


def backward_keys(plan: Plan, q_ref: Any, k_ref: Any, v_ref: Any, gradient_ref: Any, rows_ref: Any, *refs: Any) -> None:
    *others, d_key_ref, d_value_ref = refs
    j = pl.program_id(2)
    key, value = k_ref[0, 0], v_ref[0, 0]
    own = others[1][0] if plan.identities else None

    def step(i: jax.Array, totals: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        d_key, d_value = totals
        part = pl.ds(i * plan.block_q, plan.block_q)
        identities = (others[0][0, :, part], own) if plan.identities else None
        query, gradient = q_ref[0, 0, part, :], gradient_ref[0, 0, part, :]
        lse, delta = rows_ref[0, 0, 0:1, part], rows_ref[0, 0, 1:2, part]
        weights, d_logits = _d_logits(
            plan,
            *(query, key, value, gradient, lse, delta, others, identities),
            q_start=i * plan.block_q,
            k_start=j * plan.block_k,
        )
        d_value = d_value + _dot(weights.astype(gradient.dtype), gradient, (1, 0))
        return d_key + _dot(d_logits.astype(query.dtype), query, (1, 0)), d_value

    first: jax.Array | int = 0
    if plan.is_causal:
        # The first query that sees the block's first key.
        first = jnp.clip(_quotient(j * plan.block_k - plan.offset, plan.block_q), 0, plan.query_blocks)
    zeros = jnp.zeros(key.shape, jnp.float32)
    d_key, d_value = lax.fori_loop(first, plan.query_blocks, step, (zeros, zeros))
    d_key_ref[0, 0], d_value_ref[0, 0] = d_key.astype(d_key_ref.dtype), d_value.astype(d_value_ref.dtype)
