"""What can be said of speech without a network: the error rates that a model has to beat."""

import collections
from collections.abc import Sequence

import numpy as np


def most_frequent(texts: Sequence[str]) -> str:
    """The most frequent text, of equally frequent ones the earliest."""
    counts = collections.Counter(texts)
    return max(counts, key=lambda text: counts[text])


def nearest_neighbour(
    train_features: Sequence[np.ndarray],
    train_texts: Sequence[str],
    features: Sequence[np.ndarray],
    *,
    segments: int = 16,
) -> list[str]:
    """For each utterance the text of the training utterance most like it.

    Each is normalised over all its frames and filters and averaged over `segments` equal parts of its length; the least
    Euclidean distance counts, of equal ones the earlier.

    Args:
      train_features, features: filterbanks (frames, filters) of each utterance.
    """
    train = np.stack([_segments(each, segments) for each in train_features])
    squares = np.sum(train**2, axis=1)
    found = []
    for each in features:
        distances = squares - 2 * train @ _segments(each, segments)
        found.append(train_texts[int(distances.argmin())])
    return found


def _segments(features: np.ndarray, count: int) -> np.ndarray:
    """Averages over `count` parts of the utterance, flat; a part of less than a frame is the frame that it falls into."""
    if not len(features):
        return np.zeros(count * features.shape[1], np.float32)
    normalised = (features - features.mean()) / (features.std() + 1e-7)
    ends = np.linspace(0, len(features), count + 1)
    starts = np.minimum(ends[:-1].astype(int), len(features) - 1)
    stops = np.maximum(ends[1:].astype(int), starts + 1)
    return np.concatenate([normalised[a:b].mean(axis=0) for a, b in zip(starts, stops, strict=True)])
