"""Connectionist temporal classification (Graves et al., 2006): loss and decoding. Label 0 is the blank.

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
    """CTC losses of transcripts.

    Attributes:
      nll: (B,) float32, −ln p in nats; 0 for a transcript without an alignment.
      possible: (B,) bool, True if the transcript has an alignment.
    """

    nll: jax.Array
    possible: jax.Array


def repeats(labels: jax.Array, label_lengths: jax.Array) -> jax.Array:
    """Number of labels that equal the label before them, (B,).

    Args:
      labels: (B, U).
      label_lengths: (B,), number of valid labels among the U.
    """
    inside = jnp.arange(1, labels.shape[1])[None] < label_lengths[:, None]
    return jnp.sum((labels[:, 1:] == labels[:, :-1]) & inside, axis=1)


def required_frames(labels: jax.Array, label_lengths: jax.Array) -> jax.Array:
    """Length of the shortest alignment in frames, (B,): one per label, and a blank between two equal labels."""
    return label_lengths + repeats(labels, label_lengths)


def ctc_losses(logits: jax.Array, frames: jax.Array, labels: jax.Array, label_lengths: jax.Array) -> CtcLosses:
    """Computes −ln of the summed probability of all alignments of each transcript.

    Args:
      logits: (B, T, V).
      frames: (B,) int, number of valid frames among the T.
      labels: (B, U) int.
      label_lengths: (B,) int, number of valid labels among the U; 0 is the empty transcript, aligned with blanks only.
    """
    possible = (frames > 0) & (frames >= required_frames(labels, label_lengths))
    beyond = jnp.arange(logits.shape[1])[None] >= frames[:, None]
    unwritten = jnp.arange(labels.shape[1])[None] >= label_lengths[:, None]
    # Logits beyond the valid frames may be infinite or NaN, and would reach the loss through a product with 0.
    logits = jnp.where(beyond[..., None], 0.0, logits.astype(jnp.float32))
    # optax picks the labels' ln p by a product with one-hot rows, which accelerators would round to TF32 or bfloat16.
    with jax.default_matmul_precision("highest"):
        nll = optax.ctc_loss(logits, beyond.astype(jnp.float32), labels, unwritten.astype(jnp.float32), blank_id=BLANK)
    # Rounding can make the loss of a certain transcript slightly negative. Clipping leaves the gradient as it is.
    nll = nll + jax.lax.stop_gradient(jnp.maximum(nll, 0.0) - nll)
    return CtcLosses(jnp.where(possible, nll, 0.0), possible)


def greedy(logits: jax.Array, frames: jax.Array) -> jax.Array:
    """The most likely label of each frame, (B, T) int; the blank beyond `frames` (B,)."""
    return jnp.where(jnp.arange(logits.shape[1])[None] < frames[:, None], jnp.argmax(logits, axis=-1), BLANK)


def collapse(path: np.ndarray) -> list[int]:
    """Labels of an alignment (T,): runs of equal labels merged, then blanks removed."""
    path = np.asarray(path)
    begins = np.append(True, path[1:] != path[:-1])[: len(path)]
    return [int(label) for label in path[begins & (path != BLANK)]]


class Hypothesis(NamedTuple):
    """A transcript of a beam search.

    Attributes:
      labels: the transcript.
      log_probability: ln of the summed probability of those of its alignments that the search visited.
      score: the value by which hypotheses are ranked.
    """

    labels: tuple[int, ...]
    log_probability: float
    score: float


def prefix_beam_search(
    log_probabilities: np.ndarray,
    *,
    beam_size: int,
    label_log_probability: Callable[[tuple[int, ...]], np.ndarray] | None = None,
    end_log_probability: Callable[[tuple[int, ...]], float] | None = None,
    language_weight: float = 0.0,
    insertion_bonus: float = 0.0,
    prune: float = 0.0,
) -> list[Hypothesis]:
    """Finds the best transcripts, best first, by prefix beam search (Hannun et al., 2014).

    A prefix is ranked by ln p of its alignments + language_weight · ln p of its labels under the language model +
    insertion_bonus · its length.

    Args:
      log_probabilities: (T, V), ln p of every label at every frame.
      beam_size: number of prefixes that survive a frame.
      label_log_probability: maps a prefix to ln p (V,) of its next label under a language model.
      end_log_probability: maps a prefix to ln p of ending there under the language model; added after the last frame.
      language_weight: weight of the language model.
      insertion_bonus: added per label.
      prune: at each frame labels below this probability are skipped.
    """
    rows = np.asarray(log_probabilities, np.float64)
    floor = np.log(prune) if prune > 0 else -np.inf
    prefixes: list[tuple[int, ...]] = [()]
    # Per prefix: ln p of its alignments that end in a blank, ln p of those that end in its last label, and the terms added
    # to rank it.
    blank, label, prior = np.zeros(1), np.full(1, -np.inf), np.zeros(1)
    follows: dict[tuple[int, ...], np.ndarray] = {}
    for row in rows:
        usable = np.flatnonzero(row > floor)
        usable = usable[usable != BLANK]
        total = np.logaddexp(blank, label)
        last = np.array([prefix[-1] if prefix else BLANK for prefix in prefixes])
        # A label equal to the prefix's last label extends the prefix only after a blank.
        longer = np.where(usable == last[:, None], blank[:, None], total[:, None]) + row[usable]
        label = label + row[last]
        _merge(prefixes, usable, longer, label)
        longer_prior = np.broadcast_to(prior[:, None] + insertion_bonus, longer.shape)
        if label_log_probability is not None and language_weight and usable.size:
            follows = {p: follows[p] if p in follows else label_log_probability(p) for p in prefixes}
            longer_prior = longer_prior + language_weight * np.stack([follows[p] for p in prefixes])[:, usable]

        # Candidates: first the unchanged prefixes, then every prefix extended by every label.
        blank = np.concatenate([total + row[BLANK], np.full(longer.size, -np.inf)])
        label = np.concatenate([label, longer.ravel()])
        prior = np.concatenate([prior, longer_prior.ravel()])
        scores = np.logaddexp(blank, label) + prior
        best = np.argsort(-scores, kind="stable")[:beam_size]
        best = best[: max(np.count_nonzero(scores[best] > -np.inf), 1)]
        blank, label, prior = blank[best], label[best], prior[best]
        prefixes = _candidates(prefixes, usable, best.tolist())
    totals = np.logaddexp(blank, label)
    if end_log_probability is not None and language_weight:
        prior = prior + language_weight * np.array([end_log_probability(prefix) for prefix in prefixes])
    order = np.argsort(-(totals + prior), kind="stable")
    return [Hypothesis(prefixes[i], float(totals[i]), float(totals[i] + prior[i])) for i in order.tolist()]


def _candidates(prefixes: list[tuple[int, ...]], usable: np.ndarray, chosen: list[int]) -> list[tuple[int, ...]]:
    """The candidates of the numbers `chosen`: the prefixes first, then each of them extended by each usable label."""
    count, width = len(prefixes), max(usable.size, 1)
    return [
        prefixes[i] if i < count else (*prefixes[(i - count) // width], int(usable[(i - count) % width]))
        for i in chosen
    ]


def _merge(prefixes: list[tuple[int, ...]], usable: np.ndarray, longer: np.ndarray, label: np.ndarray) -> None:
    """Moves probability that extends a prefix into another prefix of the beam from `longer` to that prefix's `label`."""
    place = {prefix: i for i, prefix in enumerate(prefixes)}
    column = {int(symbol): j for j, symbol in enumerate(usable)}
    for i, prefix in enumerate(prefixes):
        if prefix and prefix[:-1] in place and prefix[-1] in column:
            parent, j = place[prefix[:-1]], column[prefix[-1]]
            label[i] = np.logaddexp(label[i], longer[parent, j])
            longer[parent, j] = -np.inf
