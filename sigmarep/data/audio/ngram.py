"""An n-gram model of label sequences, for decoding."""

import functools
from collections.abc import Iterable, Sequence

import numpy as np

# BEGIN fills contexts before the first label; END is counted as the label after the last.
BEGIN, END = -1, -2


class NGram:
    """Witten-Bell-smoothed n-gram model: p(label | the last order − 1 labels), interpolated with all shorter contexts.

    For a context that occurred n times and was followed by t different labels,
    p(w | context) = (count(context, w) + t · p(w | shorter context)) / (n + t). The empty context is interpolated with the
    uniform distribution over labels and the end (Witten and Bell, 1991; Chen and Goodman, 1998).
    """

    def __init__(self, counts: dict[tuple[int, ...], dict[int, int]], *, order: int, vocabulary_size: int):
        self._counts, self._order, self._size = counts, order, vocabulary_size
        self._of_context = functools.lru_cache(maxsize=100_000)(self._distribution)

    @classmethod
    def train(cls, sequences: Iterable[Sequence[int] | np.ndarray], *, order: int, vocabulary_size: int) -> "NGram":
        """Trains a model of `order` on sequences of labels from 0 to vocabulary_size − 1.

        Raises:
          ValueError: the order is below 1.
        """
        if order < 1:
            raise ValueError(f"order = {order}: expected at least 1")
        counts: dict[tuple[int, ...], dict[int, int]] = {}
        for sequence in sequences:
            padded = (*[BEGIN] * (order - 1), *(int(label) for label in sequence), END)
            for i in range(order - 1, len(padded)):
                for length in range(order):
                    following = counts.setdefault(padded[i - length : i], {})
                    following[padded[i]] = following.get(padded[i], 0) + 1
        return cls(counts, order=order, vocabulary_size=vocabulary_size)

    def log_probabilities(self, prefix: Sequence[int]) -> np.ndarray:
        """ln p of every label after `prefix`, (V,) float64."""
        return self._of_context(self._context(prefix))[:-1]

    def log_end(self, prefix: Sequence[int]) -> float:
        """ln p that the sequence ends after `prefix`."""
        return float(self._of_context(self._context(prefix))[-1])

    def _context(self, prefix: Sequence[int]) -> tuple[int, ...]:
        padded = (*[BEGIN] * (self._order - 1), *(int(label) for label in prefix))
        return padded[len(padded) - self._order + 1 :]

    def _distribution(self, context: tuple[int, ...]) -> np.ndarray:
        shorter = self._distribution(context[1:]) if context else None
        p = np.exp(shorter) if shorter is not None else np.full(self._size + 1, 1 / (self._size + 1))
        following = self._counts.get(context)
        if following:
            kinds, total = len(following), sum(following.values())
            seen = np.zeros(self._size + 1)
            for label, count in following.items():
                seen[-1 if label == END else label] = count
            p = (seen + kinds * p) / (total + kinds)
        with np.errstate(divide="ignore"):
            return np.log(p)
