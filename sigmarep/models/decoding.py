"""Sampling and beam search, batched and compiled, over any model that can say what follows.

`step(tokens, position, cache)` gives ln p of the next token (N, V), float32, after `tokens` (N,) at `position` (), and the
new cache. Every array of a cache has the N sequences on its first axis, or on its second where it is stacked over layers
(below the name `blocks`).

Beam search ranks finished hypotheses by ln p(Y) / lp(Y), lp(Y) = (5 + |Y|)^α / 6^α (Wu et al., 2016, equation 14), where
|Y| counts the end-of-sentence token.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Step = Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, Any]]
NEVER = -1e30


class Hypotheses(NamedTuple):
    """The best first: `tokens` (B, K, L), padded behind the end of sentence; `scores` (B, K), ln p / lp; −1e30 where
    fewer than K were found."""

    tokens: jax.Array
    scores: jax.Array


def empty_cache(step: Step, count: int) -> Any:
    """The cache before the first token of `count` sequences: `step` makes one when it is given none.

    What it keeps of a source stays; what it wrote of that call's token is overwritten by the first real one.
    """
    _, cache = step(jnp.zeros(count, jnp.int32), jnp.zeros((), jnp.int32), {})

    def rewound(path, x):
        return jnp.zeros_like(x) if path[-1].key == "cached_index" else x

    return jax.tree_util.tree_map_with_path(rewound, cache)


def length_penalty(length: jax.Array | int, alpha: float) -> jax.Array:
    """((5 + length) / 6)^alpha."""
    return ((5.0 + length) / 6.0) ** alpha


def beam_search(
    step: Step,
    cache: Any,
    *,
    batch: int,
    beam_size: int,
    max_length: int,
    limits: jax.Array | None = None,
    alpha: float = 0.6,
    bos: int,
    eos: int,
    pad: int = 0,
) -> Hypotheses:
    """The best complete sentences that a beam of `beam_size` finds.

    A hypothesis that reaches its limit must end there. The search of a sentence ends when no living hypothesis can still
    score above the worst of its `beam_size` finished ones.

    Args:
      step: see the module docstring, with N = batch · beam_size; the beams of a sentence lie together.
      cache: at the start.
      batch: B.
      max_length: L, tokens of the longest hypothesis, the end of sentence among them.
      limits: (B,), a length for each sentence, at most L.
      alpha: of the length penalty.
    """
    b, k = batch, beam_size
    limits = jnp.full(b, max_length) if limits is None else jnp.clip(limits, 1, max_length)
    reach = jnp.max(limits)

    class State(NamedTuple):
        length: jax.Array
        alive: jax.Array
        alive_log: jax.Array
        done: jax.Array
        done_score: jax.Array
        cache: Any

    def searching(state: State):
        best_possible = state.alive_log[:, 0] / length_penalty(limits, alpha)
        hopeful = (best_possible > state.done_score[:, -1]) & (state.length < limits)
        return jnp.any(hopeful) & (state.length < reach)

    def body(state: State):
        previous = jnp.where(
            state.length == 0, bos, jnp.take(state.alive, jnp.maximum(state.length - 1, 0), axis=2)
        ).astype(jnp.int32)
        log_p, new_cache = step(previous.reshape(-1), state.length, state.cache)
        vocabulary = log_p.shape[-1]
        token = jnp.arange(vocabulary)
        log_p = jnp.where((token == pad) | (token == bos), NEVER, log_p).reshape(b, k, vocabulary)
        length = state.length + 1
        last, over = (length == limits)[:, None, None], (length > limits)[:, None, None]
        log_p = jnp.where((last & (token != eos)) | over, NEVER, log_p)
        candidates = jnp.maximum(state.alive_log[:, :, None] + log_p, NEVER)

        ending = candidates[:, :, eos]
        scores = jnp.where(ending > NEVER / 2, ending / length_penalty(length, alpha), NEVER)
        ended = jax.lax.dynamic_update_slice_in_dim(
            state.alive, jnp.full((b, k, 1), eos, jnp.int32), state.length, axis=2
        )
        done_score, chosen = jax.lax.top_k(jnp.concatenate([state.done_score, scores], axis=1), k)
        done = jnp.take_along_axis(jnp.concatenate([state.done, ended], axis=1), chosen[:, :, None], axis=1)

        going = candidates.at[:, :, eos].set(NEVER).reshape(b, k * vocabulary)
        alive_log, chosen = jax.lax.top_k(going, k)
        beam, token = chosen // vocabulary, chosen % vocabulary
        alive = jnp.take_along_axis(state.alive, beam[:, :, None], axis=1)
        alive = jax.lax.dynamic_update_slice_in_dim(alive, token[:, :, None].astype(jnp.int32), state.length, axis=2)
        rows = (jnp.arange(b)[:, None] * k + beam).reshape(-1)
        return State(length, alive, alive_log, done, done_score, _rows(new_cache, rows))

    start = State(
        length=jnp.zeros((), jnp.int32),
        alive=jnp.full((b, k, max_length), pad, jnp.int32),
        # All beams begin alike; only the first counts until they differ.
        alive_log=jnp.where(jnp.arange(k) == 0, 0.0, NEVER) * jnp.ones((b, 1)),
        done=jnp.full((b, k, max_length), pad, jnp.int32),
        done_score=jnp.full((b, k), NEVER),
        cache=cache,
    )
    end = jax.lax.while_loop(searching, body, start)
    return Hypotheses(end.done, end.done_score)


def _rows(cache: Any, rows: jax.Array) -> Any:
    """The cache of the sequences `rows`; what is kept of a source is the same for all beams of it."""

    def taken(path, x):
        names = [entry.key for entry in path]
        if x.ndim < 3 or "cross_attention" in names:
            return x
        return jnp.take(x, rows, axis=1 if "blocks" in names else 0)

    return jax.tree_util.tree_map_with_path(taken, cache)


def sample(
    step: Step,
    cache: Any,
    prompt: jax.Array,
    lengths: jax.Array,
    rng: jax.Array,
    *,
    max_length: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eos: int,
    pad: int = 0,
) -> jax.Array:
    """Continues prompts of different lengths.

    Args:
      step: see the module docstring, with N = B.
      prompt: (B, P) int32, the first `lengths` (B,) ≥ 1 tokens of each row count.
      max_length: L ≥ P, tokens of the result.
      temperature: 0 takes the likeliest token.
      top_k: draws from the k likeliest tokens, 0 for all.
      top_p: draws from the least number of tokens whose probabilities reach p.

    Returns:
      (B, L) int32, the prompt with its continuation, padded behind the end-of-sentence token.
    """
    batch, width = prompt.shape
    tokens = jnp.pad(prompt, ((0, 0), (0, max_length - width)), constant_values=pad)

    def body(carry, position):
        tokens, cache, ended = carry
        log_p, cache = step(tokens[:, position], position, cache)
        new = draw(jnp.where(jnp.arange(log_p.shape[-1]) == pad, NEVER, log_p), jax.random.fold_in(rng, position))
        given = position + 1 < lengths
        new = jnp.where(given, tokens[:, position + 1], jnp.where(ended, pad, new))
        ended = ended | (~given & (new == eos))
        return (tokens.at[:, position + 1].set(new), cache, ended), None

    def draw(log_p, key):
        return draw_token(log_p, key, temperature=temperature, top_k=top_k, top_p=top_p)

    carry = (tokens, cache, jnp.zeros(batch, bool))
    (tokens, _, _), _ = jax.lax.scan(body, carry, jnp.arange(max_length - 1))
    return tokens


def draw_token(log_p: jax.Array, key: jax.Array, *, temperature: float, top_k: int, top_p: float) -> jax.Array:
    """One token (B,) from ln p (B, V); see `sample`."""
    if temperature == 0:
        return jnp.argmax(log_p, axis=-1).astype(jnp.int32)
    logits = log_p / temperature
    if top_k:
        least = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p < 1:
        ordered = -jnp.sort(-logits, axis=-1)
        p = jax.nn.softmax(ordered, axis=-1)
        # The tokens before which less than top_p has been gathered: always the first, then up to reaching it.
        kept = jnp.cumsum(p, axis=-1) - p < top_p
        least = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)
