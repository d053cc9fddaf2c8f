"""Word and character error rates, counted by jiwer."""

from collections.abc import Sequence
from typing import NamedTuple

from sigmarep.errors import BadInput


class ErrorRates(NamedTuple):
    """Errors of all utterances together. `rate` is their number divided by `reference_length`, at least 1, so that it may
    exceed 1; the length counts words or characters."""

    rate: float
    substitutions: int
    deletions: int
    insertions: int
    reference_length: int


class GroupRates(NamedTuple):
    """Errors of a group of utterances."""

    group: str
    utterances: int
    words: ErrorRates
    characters: ErrorRates


def check_installed() -> None:
    """Raises BadInput where jiwer is missing."""
    _jiwer()


def word_errors(references: Sequence[str], hypotheses: Sequence[str]) -> ErrorRates:
    """Errors of words between white space.

    Raises:
      BadInput: jiwer is not installed.
    """
    return _errors(references, hypotheses, _jiwer().process_words, lambda text: len(text.split()))


def character_errors(references: Sequence[str], hypotheses: Sequence[str]) -> ErrorRates:
    """Errors of characters, single spaces included.

    Raises:
      BadInput: jiwer is not installed.
    """
    return _errors(references, hypotheses, _jiwer().process_characters, len)


def errors_of_each(references: Sequence[str], hypotheses: Sequence[str]) -> list[int]:
    """Word errors of each utterance."""
    counts = []
    for reference, hypothesis in zip(references, hypotheses, strict=True):
        rates = word_errors([reference], [hypothesis])
        counts.append(rates.substitutions + rates.deletions + rates.insertions)
    return counts


def by_group(groups: Sequence[str], references: Sequence[str], hypotheses: Sequence[str]) -> list[GroupRates]:
    """The errors of each group of utterances, in the order in which the groups come first."""
    members: dict[str, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    rows = []
    for group, indices in members.items():
        parts = [references[i] for i in indices], [hypotheses[i] for i in indices]
        rows.append(GroupRates(group, len(indices), word_errors(*parts), character_errors(*parts)))
    return rows


def duration_groups(seconds: Sequence[float], ends: Sequence[float]) -> list[str]:
    """The group of each duration: "1-2" is above 1 and up to 2 seconds; the last has no upper end."""
    names = [f"{low:g}-{high:g}" for low, high in zip((0, *ends[:-1]), ends, strict=True)] + [f"over {ends[-1]:g}"]
    return [names[sum(each > end for end in ends)] for each in seconds]


def _errors(references, hypotheses, process, length) -> ErrorRates:
    # jiwer refuses empty references: all that was heard in one is inserted.
    pairs = [(" ".join(r.split()), " ".join(h.split())) for r, h in zip(references, hypotheses, strict=True)]
    spoken = [pair for pair in pairs if pair[0]]
    inserted = sum(length(hypothesis) for reference, hypothesis in pairs if not reference)
    substitutions = deletions = 0
    if spoken:
        alignment = process([reference for reference, _ in spoken], [hypothesis for _, hypothesis in spoken])
        substitutions, deletions = alignment.substitutions, alignment.deletions
        inserted += alignment.insertions
    total = sum(length(reference) for reference, _ in spoken)
    return ErrorRates((substitutions + deletions + inserted) / max(total, 1), substitutions, deletions, inserted, total)


def _jiwer():
    try:
        import jiwer
    except ImportError:
        raise BadInput(
            'config.task = \'speech_recognition\': needs the extra "speech"; pip install "sigmarep[speech]"'
        ) from None
    return jiwer
