"""Connectionist temporal classification (Graves et al., 2006): its loss, and what a model has heard. Label 0 is the blank.

Shapes: B utterances, T frames, V labels, U labels of a transcript.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

BLANK = 0


class CtcLosses(NamedTuple):
    """`nll` (B,) float32, −ln p of each transcript in nats, 0 where it has no alignment; `possible` (B,) bool."""

    nll: jax.Array
    possible: jax.Array


def required_frames(labels: jax.Array, label_lengths: jax.Array) -> jax.Array:
    """Frames that the shortest alignment has, (B,): one a label, and a blank between two equal ones."""
    inside = jnp.arange(1, labels.shape[1])[None] < label_lengths[:, None]
    return label_lengths + jnp.sum((labels[:, 1:] == labels[:, :-1]) & inside, axis=1)


def ctc_losses(logits: jax.Array, frames: jax.Array, labels: jax.Array, label_lengths: jax.Array) -> CtcLosses:
    """−ln of the summed probability of all alignments of each transcript.

    Args:
      logits: (B, T, V). frames: (B,) int, how many of T count.
      labels: (B, U) int. label_lengths: (B,) int, how many of U count; none is a transcript too, of blanks alone.
    """
    possible = (frames > 0) & (frames >= required_frames(labels, label_lengths))
    beyond = jnp.arange(logits.shape[1])[None] >= frames[:, None]
    unwritten = jnp.arange(labels.shape[1])[None] >= label_lengths[:, None]
    nll = optax.ctc_loss(
        logits.astype(jnp.float32), beyond.astype(jnp.float32), labels, unwritten.astype(jnp.float32), blank_id=BLANK
    )
    # Rounding makes a certain transcript's value slightly negative. The gradient is that of the unrounded value.
    nll = nll + jax.lax.stop_gradient(jnp.maximum(nll, 0.0) - nll)
    return CtcLosses(jnp.where(possible, nll, 0.0), possible)


def greedy(logits: jax.Array, frames: jax.Array) -> jax.Array:
    """The likeliest label of each frame, (B, T) int, the blank beyond `frames` (B,)."""
    return jnp.where(jnp.arange(logits.shape[1])[None] < frames[:, None], jnp.argmax(logits, axis=-1), BLANK)


def collapse(path: np.ndarray) -> list[int]:
    """The labels that an alignment (T,) stands for: equal neighbours count once, blanks not at all."""
    path = np.asarray(path)
    begins = np.append(True, path[1:] != path[:-1])[: len(path)]
    return [int(label) for label in path[begins & (path != BLANK)]]


class Hypothesis(NamedTuple):
    """`labels`; `log_probability`, ln p of all their alignments that the search has seen; `score`, by which they rank."""

    labels: tuple[int, ...]
    log_probability: float
    score: float


class _Prefix(NamedTuple):
    """`blank` and `label`: ln p of the alignments that end in a blank and in the last label; `language`: what the language
    model and the bonus add."""

    blank: float
    label: float
    language: float


def prefix_beam_search(
    log_probabilities: np.ndarray,
    *,
    beam_size: int,
    label_log_probability: Callable[[tuple[int, ...]], np.ndarray] | None = None,
    language_weight: float = 0.0,
    insertion_bonus: float = 0.0,
    prune: float = 0.0,
) -> list[Hypothesis]:
    """The best transcripts, best first, by prefix beam search (Hannun et al., 2014).

    A prefix ranks by ln p of its alignments + language_weight · ln p of its labels under the language model +
    insertion_bonus · its length.

    Args:
      log_probabilities: (T, V), ln p of every label at every frame.
      beam_size: prefixes kept at a frame.
      label_log_probability: ln p (V,) of what follows a prefix, under a language model.
      prune: labels below this probability at a frame are passed over there.
    """
    floor = np.log(prune) if prune > 0 else -np.inf
    beam = {(): _Prefix(0.0, -np.inf, 0.0)}
    for row in np.asarray(log_probabilities, np.float64):
        usable = [int(label) for label in np.flatnonzero(row > floor) if label != BLANK]
        grown: dict[tuple[int, ...], list[float]] = {}

        def add(prefix, ends, value, language, grown=grown):
            entry = grown.setdefault(prefix, [-np.inf, -np.inf, language])
            entry[ends] = np.logaddexp(entry[ends], value)

        for prefix, found in beam.items():
            total = np.logaddexp(found.blank, found.label)
            last = prefix[-1] if prefix else BLANK
            add(prefix, 0, total + row[BLANK], found.language)
            if prefix:
                add(prefix, 1, found.label + row[last], found.language)
            follows = None
            if label_log_probability is not None and language_weight and usable:
                follows = label_log_probability(prefix)
            for label in usable:
                # A label equal to the last is another one only behind a blank.
                value = (found.blank if label == last else total) + row[label]
                if value == -np.inf:
                    continue
                added = insertion_bonus + (language_weight * float(follows[label]) if follows is not None else 0.0)
                add((*prefix, label), 1, value, found.language + added)
        ranked = sorted(grown.items(), key=lambda item: -(np.logaddexp(item[1][0], item[1][1]) + item[1][2]))
        beam = {prefix: _Prefix(*entry) for prefix, entry in ranked[:beam_size]}
    return [
        Hypothesis(prefix, total, total + found.language)
        for prefix, found in beam.items()
        for total in [float(np.logaddexp(found.blank, found.label))]
    ]
