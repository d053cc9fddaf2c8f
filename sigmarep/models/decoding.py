"""Batched, compiled sampling and beam search over any autoregressive model.

A model is given as a function `step(tokens, position, cache)`. For `tokens` (N,) at `position` () it returns ln p of the
next token, (N, V) float32, and the new cache. Arrays of a cache have the N sequences on their first axis, or on the second
where they are stacked over layers (below the name `blocks`).

Beam search ranks finished hypotheses by ln p(Y) / lp(Y) with lp(Y) = (5 + |Y|)^α / 6^α (Wu et al., 2016, equation 14),
where |Y| counts the end-of-sentence token.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Step = Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, Any]]
NEVER = -1e30


class Hypotheses(NamedTuple):
    """Finished hypotheses of a beam search, best first.

    Attributes:
      tokens: (B, K, L), padded after the end-of-sentence token.
      scores: (B, K), ln p / lp; −1e30 in the place of missing hypotheses if fewer than K were finished.
    """

    tokens: jax.Array
    scores: jax.Array


def empty_cache(step: Step, count: int) -> Any:
    """Creates the cache of `count` sequences before their first token, by calling `step` with an empty cache.

    Entries computed from a source remain; the entry of the dummy token is overwritten by the first real token.
    """
    _, cache = step(jnp.zeros(count, jnp.int32), jnp.zeros((), jnp.int32), {})

    def rewound(path, x):
        return jnp.zeros_like(x) if path[-1].key == "cached_index" else x

    return jax.tree_util.tree_map_with_path(rewound, cache)


def length_penalty(length: jax.Array | int, alpha: float) -> jax.Array:
    """Returns lp = ((5 + length) / 6)^alpha."""
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
    """Finds the best complete sentences by beam search.

    A hypothesis that reaches its limit must end there. The search of a sentence stops when no unfinished hypothesis can
    still score above the worst of its `beam_size` finished ones.

    Args:
      step: see the module docstring, with N = batch · beam_size; the beams of a sentence are adjacent rows.
      cache: the initial cache.
      batch: B.
      beam_size: K.
      max_length: L, maximal number of tokens, including the end-of-sentence token.
      limits: (B,), maximal number of tokens of each sentence, at most L; None for L.
      alpha: exponent of the length penalty.
      bos, eos, pad: tokens for beginning and end of sentence and for padding.
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
        # All beams start identical, so only the first may be extended in the first step.
        alive_log=jnp.where(jnp.arange(k) == 0, 0.0, NEVER) * jnp.ones((b, 1)),
        done=jnp.full((b, k, max_length), pad, jnp.int32),
        done_score=jnp.full((b, k), NEVER),
        cache=cache,
    )
    end = jax.lax.while_loop(searching, body, start)
    return Hypotheses(end.done, end.done_score)


def _rows(cache: Any, rows: jax.Array) -> Any:
    """Selects sequences `rows` of the cache; entries of the source are the same for all beams of a sentence."""
    if not isinstance(cache, Mapping):
        return cache
    if "cached_index" not in cache:
        # What is kept of a source has no index: it does not grow.
        return {name: _rows(value, rows) for name, value in cache.items()}
    # Keys and values are (…, N, length, heads, head_dim), behind axes over stacked layers.
    return {name: jnp.take(x, rows, axis=x.ndim - 4) if x.ndim >= 4 else x for name, x in cache.items()}


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
    """Samples continuations of prompts, whose lengths may differ.

    Args:
      step: see the module docstring, with N = B.
      cache: the initial cache.
      prompt: (B, P) int32.
      lengths: (B,), number of valid tokens of each prompt, at least 1.
      rng: key of the draws.
      max_length: L ≥ P, number of tokens of the result.
      temperature: divides the logits; 0 takes the most likely token.
      top_k: draws from the k most likely tokens only; 0 for all.
      top_p: draws from the smallest set of most likely tokens whose probabilities sum to at least p.
      eos, pad: tokens for end of sentence and for padding.

    Returns:
      (B, L) int32, the prompt and its continuation, padded after the end-of-sentence token.
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
    """Draws one token per row, (B,), from ln p (B, V); see `sample` for the options."""
    if temperature == 0:
        return jnp.argmax(log_p, axis=-1).astype(jnp.int32)
    logits = log_p / temperature
    if top_k:
        least = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p < 1:
        ordered = -jnp.sort(-logits, axis=-1)
        p = jax.nn.softmax(ordered, axis=-1)
        # Tokens whose predecessors sum to less than top_p: always the first, up to the one that reaches it.
        nucleus = jnp.cumsum(p, axis=-1) - p < top_p
        least = jnp.min(jnp.where(nucleus, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)
