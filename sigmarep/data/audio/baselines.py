"""Baselines of speech recognition without a network, for models to beat."""

import collections
from collections.abc import Sequence

import numpy as np


def most_frequent(texts: Sequence[str]) -> str:
    """The most frequent text; the earliest wins a tie."""
    counts = collections.Counter(texts)
    return max(counts, key=lambda text: counts[text])


def nearest_neighbor(
    train_features: Sequence[np.ndarray],
    train_texts: Sequence[str],
    features: Sequence[np.ndarray],
    *,
    segments: int = 16,
) -> list[str]:
    """Transcribes each utterance by the text of the most similar training utterance.

    Features are normalized over all frames and filters of an utterance and averaged over `segments` equal parts of its
    length. The most similar utterance has the least Euclidean distance; the earliest wins a tie.

    Args:
      train_features: filterbanks (frames, filters) of each training utterance.
      train_texts: transcripts of the training utterances.
      features: filterbanks of the utterances to transcribe.
      segments: number of parts.
    """
    train = np.stack([_segments(each, segments) for each in train_features])
    squares = np.sum(train**2, axis=1)
    texts = []
    for each in features:
        distances = squares - 2 * train @ _segments(each, segments)
        texts.append(train_texts[int(distances.argmin())])
    return texts


def _segments(features: np.ndarray, count: int) -> np.ndarray:
    """Averages over `count` parts of the utterance, flattened; a part shorter than a frame takes the frame it lies in."""
    if not len(features):
        return np.zeros(count * features.shape[1], np.float32)
    normalized = (features - features.mean()) / (features.std() + 1e-7)
    ends = np.linspace(0, len(features), count + 1)
    starts = np.minimum(ends[:-1].astype(int), len(features) - 1)
    stops = np.maximum(ends[1:].astype(int), starts + 1)
    return np.concatenate([normalized[a:b].mean(axis=0) for a, b in zip(starts, stops, strict=True)])
