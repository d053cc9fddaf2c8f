"""Attention entropy (Zhai et al., ICML 2023, section 3.1), exact, with the attention matrix or without it.

For one query i with logits a_ij = s·⟨q_i, k_j⟩ over its visible keys, p = softmax(a), the entropy in nats is

    H_i = −Σ_j p_ij ln p_ij = lse_i − Σ_j p_ij a_ij,        lse_i = ln Σ_j exp(a_ij).

Fused attention already returns lse, and Σ_j p_ij a_ij = s·⟨q_i, Σ_j p_ij k_j⟩ is one more attention call with the keys
as values. `attention_statistics` computes the same by blocks of keys on any backend, O(queries) memory a head.
Shapes: B batch, T queries, S keys, N heads, H head_dim.

A NaN among the logits that a query sees makes its statistics NaN, never an entropy of 0, which is that of a collapse.
On CPUs compiled maxima and minima of large arrays drop NaN (jaxlib 0.10: the maximum of (64, 4, 17, 17) NaNs over its
last axis is −inf). Sums and comparisons do not, so it is these that carry a NaN here.
"""

import math
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax

# Weights vanish long before a score is so far below the largest; from there on 0·ln 0 = 0.
FAR_BELOW = -1e30
LARGEST_SIGMA = 1e20


class AttentionStatistics(NamedTuple):
    """Statistics of every query over the keys that it sees, shape (B, N, T).

    A query that sees no key has entropy and variance 0, and max_logit −inf. One with a NaN among its logits has NaN
    throughout. A logit of +inf has max_logit +inf, variance NaN, and entropy NaN, as its softmax has; under sigmoid
    weights, where its weight is 1, the entropy is exact. A logit of −inf is a weight of 0, unless all are: then the softmax
    is NaN, and so are entropy and variance, and max_logit too where no mask is given.

    Attributes:
      entropy: in nats.
      max_logit: the largest logit.
      logit_variance: the variance of the logits; NaN from about 1e19 on, where their squares leave float32.
      visible: the number of keys that a query sees, broadcastable to (B, N, T).
    """

    entropy: jax.Array
    max_logit: jax.Array
    logit_variance: jax.Array
    visible: jax.Array


def entropy_of_weights(weights: jax.Array) -> jax.Array:
    """−Σ_j p_j ln p_j over the last axis, in nats, with 0·ln 0 = 0; the reference for everything below."""
    weights = weights.astype(jnp.float32)
    return -jnp.sum(jax.scipy.special.xlogy(weights, weights), axis=-1)


def entropy_from_lse(
    query: jax.Array, key_average: jax.Array, lse: jax.Array, *, scale: float | None = None
) -> jax.Array:
    """Entropy from what fused attention returns.

    Args:
      query: (B, T, N, H).
      key_average: (B, T, N, H), Σ_j p_ij k_j: attention called with the keys as values.
      lse: (B, T, N), the log-sum-exp of the logits.
      scale: s, 1/√H if None.

    Returns:
      (B, T, N) in nats.
    """
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    expected = scale * jnp.sum(query.astype(jnp.float32) * key_average.astype(jnp.float32), axis=-1)
    # Entropy is not negative; the difference of two rounded numbers can be, by an ulp of the logits.
    return _not_negative(lse - expected)


def _not_negative(x: jax.Array) -> jax.Array:
    """x where it is above 0 or NaN, else 0."""
    return jnp.where(x <= 0, 0.0, x)


def soft_capped(logits: jax.Array, cap: float | None) -> jax.Array:
    """cap · tanh(logits / cap), or the logits as they are if `cap` is None or 0 (Gemma 2)."""
    return cap * jnp.tanh(logits / cap) if cap else logits


def sigmoid_weights(logits: jax.Array, visible: jax.Array) -> jax.Array:
    """σ(a + b) with b = −ln n instead of a softmax (Ramapuram et al., 2024): weights that do not compete.

    Args:
      logits: a, (B, N, T, S).
      visible: bool, broadcastable to it. n is the number of keys that a query sees: the paper's, that of all keys, where it
        sees all, and the same whatever a sequence is padded to.

    Returns:
      The weights, 0 for keys that are not visible; they do not sum to 1.
    """
    return jnp.where(visible, jax.nn.sigmoid(logits + _sigmoid_bias(_count(visible, logits))), 0.0)


def _count(visible: jax.Array, logits: jax.Array) -> jax.Array:
    """Number of keys that a query sees; the last axis of the mask may be one for all keys."""
    return jnp.sum(jnp.broadcast_to(visible, (*visible.shape[:-1], logits.shape[-1])), axis=-1)


def _sigmoid_bias(count: jax.Array) -> jax.Array:
    """−ln n with an axis for the keys."""
    return -jnp.log(jnp.maximum(count, 1).astype(jnp.float32))[..., None]


def statistics_of_logits(
    logits: jax.Array,
    visible: jax.Array | None = None,
    *,
    sigmoid: bool = False,
    weights: jax.Array | None = None,
) -> AttentionStatistics:
    """The statistics of `attention_statistics`, where attention has formed its logits anyway.

    Args:
      logits: float32 (B, N, T, S), soft-capped if the model's are.
      visible: bool, broadcastable to it, True where a key is visible; all are if None.
      sigmoid: see `attention_statistics`.
      weights: the weights themselves, (B, N, T, S) and not negative, where they are neither softmax nor sigmoid; entropy
        is that of the weights divided by their sum.
    """
    scores = logits if weights is None else jnp.log(weights.astype(jnp.float32))
    if sigmoid:
        seen = jnp.ones((1, 1, 1, logits.shape[-1]), bool) if visible is None else visible
        scores = jax.nn.log_sigmoid(logits + _sigmoid_bias(_count(seen, logits)))
    return finished(_sums(logits, scores, visible))


def attention_statistics(
    query: jax.Array,
    key: jax.Array,
    *,
    mask: jax.Array | None = None,
    key_mask: jax.Array | None = None,
    segments: jax.Array | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    logit_cap: float | None = None,
    sigmoid: bool = False,
    block_size: int = 128,
) -> AttentionStatistics:
    """Entropy, largest logit and variance of the logits of every query, by an online softmax over blocks of keys.

    Sums are taken relative to the running maximum, so that large logits cost no precision. Products are exact to float32
    whatever the inputs' type.

    Args:
      query: (B, T, N, H).
      key: (B, S, N, H).
      mask: bool, broadcastable to (B, N, T, S), True where a key is visible. An array of that size is the caller's.
      key_mask: bool (B, S), True for real keys.
      segments: int (B, T) with T = S; a query sees the keys of its own segment.
      is_causal: query i sees keys up to i + S − T.
      scale: s, 1/√H if None.
      logit_cap: see `soft_capped`.
      sigmoid: the weights are those of `sigmoid_weights`; entropy is that of the weights divided by their sum.
      block_size: keys a block; up to twice as many are one.
    """
    b, t, n, h = query.shape
    s = key.shape[1]
    scale = 1.0 / math.sqrt(h) if scale is None else scale
    # Half precision is left as it is: its products are exact in float32, and accelerators have units for them.
    half = query.dtype == key.dtype and query.dtype in (jnp.bfloat16, jnp.float16)
    if not half:
        query, key = query.astype(jnp.float32), key.astype(jnp.float32)
    # One short block needs no padding: 0.80 ms for 1.37 with 256 sequences, 12 heads, 197 keys in blocks of 128 (H200).
    block = s if s <= 2 * block_size else block_size
    blocks = -(-s // block)
    padding = blocks * block - s

    def by_block(array: jax.Array, axis: int) -> jax.Array:
        """Pads `axis` (of size S) and moves its blocks to the front."""
        widths = [(0, 0)] * array.ndim
        widths[axis] = (0, padding)
        array = jnp.pad(array, widths)
        shape = (*array.shape[:axis], blocks, block, *array.shape[axis + 1 :])
        return jnp.moveaxis(array.reshape(shape), axis, 0)

    inputs = {"key": by_block(key, 1), "position": by_block(jnp.arange(1, s + 1), 0) - 1}
    if key_mask is not None:
        inputs["key_mask"] = by_block(key_mask, 1)
    if segments is not None:
        inputs["segments"] = by_block(segments, 1)
    if mask is not None:
        mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
        if mask.shape[3] == s:
            inputs["mask"] = by_block(mask, 3)

    def visible_keys(part: dict[str, jax.Array]) -> jax.Array:
        position = part["position"]
        # Positions that pad the last block are −1.
        visible = (position >= 0)[None, None, None, :]
        if is_causal:
            visible &= (position[None, :] <= jnp.arange(t)[:, None] + (s - t))[None, None]
        if key_mask is not None:
            visible &= part["key_mask"][:, None, None, :]
        if segments is not None:
            visible &= (part["segments"][:, None, :] == segments[:, :, None])[:, None]
        if mask is not None:
            visible = visible & part.get("mask", mask)
        return visible

    def body(carry: Sums, part: dict[str, jax.Array]) -> tuple[Sums, None]:
        # Accelerators would round float32 operands.
        product = jnp.einsum(
            "btnh,bsnh->bnts",
            query,
            part["key"],
            precision=None if half else lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )
        logits = soft_capped(scale * product, logit_cap)
        scores = jax.nn.log_sigmoid(logits + bias) if sigmoid else logits
        return _merged(carry, _sums(logits, scores, visible_keys(part))), None

    zeros = jnp.zeros((b, n, t), jnp.float32)
    count_shape = jax.eval_shape(lambda p: jnp.sum(visible_keys(p), axis=-1), _first(inputs)).shape
    no_keys = jnp.zeros(count_shape, jnp.int32)
    if sigmoid:
        counts, _ = lax.scan(lambda seen, part: (seen + jnp.sum(visible_keys(part), axis=-1), None), no_keys, inputs)
        bias = _sigmoid_bias(counts)
    carry, _ = lax.scan(body, Sums(zeros - jnp.inf, zeros, zeros, zeros - jnp.inf, zeros, zeros, no_keys), inputs)
    return finished(carry)


class Sums(NamedTuple):
    """Over visible keys, of scores s (the softmax's logits) with maximum m: `top` m, `total` Σ exp(s − m), `weighted`
    Σ exp(s − m)·(s − m); of logits a with maximum l: `largest` l, `first` Σ (a − l), `second` Σ (a − l)²; `keys`, how many.
    Shape (B, N, T), `keys` broadcastable to it. Where no key is visible maxima are −inf and sums 0."""

    top: jax.Array
    total: jax.Array
    weighted: jax.Array
    largest: jax.Array
    first: jax.Array
    second: jax.Array
    keys: jax.Array


def _sums(logits: jax.Array, scores: jax.Array, visible: jax.Array | None) -> Sums:
    def only_visible(x: jax.Array, otherwise: float) -> jax.Array:
        return x if visible is None else jnp.where(visible, x, otherwise)

    def below(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The maximum of x, and how far x is below it."""
        most = jnp.max(only_visible(x, -jnp.inf), axis=-1, keepdims=True)
        if visible is not None:
            # Where no key is visible any finite reference will do.
            return most[..., 0], only_visible(x - jnp.where(jnp.isfinite(most), most, 0.0), 0.0)
        # These are the softmax's own differences. TPUs' compiler takes them, and all their sums, in the kernel of the
        # product that makes x, as long as the maximum itself is no result: it is the x that no difference is below.
        relative = x - most
        return jnp.max(jnp.where(relative < 0, -jnp.inf, x), axis=-1), relative

    (top, relative), (largest, differences) = below(scores), below(logits)
    weights = only_visible(jnp.exp(relative), 0.0)
    relative = not_far_below(relative)
    return Sums(
        top=top,
        total=jnp.sum(weights, axis=-1),
        weighted=jnp.sum(weights * relative, axis=-1),
        largest=largest,
        first=jnp.sum(differences, axis=-1),
        second=jnp.sum(differences * differences, axis=-1),
        keys=jnp.full((1, 1, 1), logits.shape[-1]) if visible is None else _count(visible, logits),
    )


def not_far_below(relative: jax.Array) -> jax.Array:
    """Scores relative to the largest, finite where the weight is 0, so that weight times score is 0 there."""
    return jnp.where(relative < FAR_BELOW, FAR_BELOW, relative)


def _merged(a: Sums, b: Sums) -> Sums:
    """The sums over the keys of both."""
    top, largest = jnp.maximum(a.top, b.top), jnp.maximum(a.largest, b.largest)
    sums = cast(Sums, jax.tree.map(jnp.add, moved(a, top, largest), moved(b, top, largest)))
    return sums._replace(top=top, largest=largest)


def moved(sums: Sums, top: jax.Array, largest: jax.Array) -> Sums:
    """The sums relative to other maxima; sums over no keys are 0 whatever they are relative to."""
    # In comparisons, which kernels have, for isfinite.
    down, by = (
        jnp.where(jnp.abs(old) < jnp.inf, old - new, 0.0) for old, new in ((sums.top, top), (sums.largest, largest))
    )
    down = not_far_below(down)
    decay = jnp.exp(down)
    return sums._replace(
        total=decay * sums.total,
        weighted=decay * (sums.weighted + down * sums.total),
        first=sums.first + by * sums.keys,
        second=sums.second + 2 * by * sums.first + by**2 * sums.keys,
    )


def finished(sums: Sums) -> AttentionStatistics:
    """The statistics that sums over all keys make."""
    keys = jnp.maximum(sums.keys, 1)
    # Of a query that sees a key the sum is at least 1, or broken; of one that sees none it is 0.
    total = jnp.where(sums.keys > 0, sums.total, 1.0)
    # Sums keep a NaN where the largest logit may have lost it. Beside −inf a logit of +inf makes them NaN as well.
    broken = jnp.isnan(sums.first) & (sums.largest != jnp.inf)
    return AttentionStatistics(
        entropy=_not_negative(jnp.log(total) - sums.weighted / total),
        max_logit=jnp.where(broken, jnp.nan, sums.largest),
        logit_variance=_not_negative(sums.second / keys - (sums.first / keys) ** 2),
        visible=sums.keys,
    )


def largest(x: jax.Array, axis: int | tuple[int, ...]) -> jax.Array:
    """Maximum over `axis`, NaN where one of the values is, on every device (module docstring)."""
    return jnp.where(jnp.any(jnp.isnan(x), axis=axis), jnp.nan, jnp.max(x, axis=axis))


def _first(inputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: array[0] for name, array in inputs.items()}


def normalised_entropy(entropy: jax.Array, visible: jax.Array) -> jax.Array:
    """Entropy divided by its largest value ln(visible keys): 1 is uniform. A query that sees at most one key gives 1, or
    NaN where its entropy is."""
    most = jnp.log(jnp.maximum(visible, 1).astype(jnp.float32))
    share = jnp.where(visible > 1, entropy / jnp.where(visible > 1, most, 1.0), 1.0)
    return jnp.where(jnp.isnan(entropy), entropy, share)


def entropy_lower_bound(sigma: jax.typing.ArrayLike, tokens: jax.Array | int) -> jax.Array:
    """The least attention entropy in nats that a logit operator of norm σ allows (Theorem 3.1).

    With β = exp(−σ·√(T/(T−1))),

        Ent ≥ ln(1 + (T−1)β) + σ·√(T(T−1))·β / (1 + (T−1)β).

    Args:
      sigma: s·‖W_K W_Qᵀ‖₂·‖X Xᵀ‖₂, the softmax scale s included; any shape. The bound of an infinite one is 0.
      tokens: T, the number of visible keys; broadcastable. The bound of one key is 0.

    Returns:
      The bound, NaN where σ is.
    """
    sigma = jnp.asarray(sigma, jnp.float32)
    # β is 0 long before; an infinite σ times it would be NaN.
    sigma = jnp.where(sigma > LARGEST_SIGMA, LARGEST_SIGMA, sigma)
    t = jnp.maximum(jnp.asarray(tokens, jnp.float32), 2.0)
    beta = jnp.exp(-sigma * jnp.sqrt(t / (t - 1)))
    z = (t - 1) * beta
    bound = jnp.log1p(z) + sigma * jnp.sqrt(t * (t - 1)) * beta / (1 + z)
    return jnp.where((jnp.asarray(tokens) > 1) | jnp.isnan(sigma), bound, 0.0)
