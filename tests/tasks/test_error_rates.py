"""Error rates by hand and against a Levenshtein distance of the test's own."""

import sys

import numpy as np
import pytest

from sigmarep.errors import BadInput
from sigmarep.tasks import error_rates
from sigmarep.tasks.error_rates import ErrorRates


def levenshtein(one, other):
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        last, row[0] = row[0], i
        for j, b in enumerate(other, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (a != b))
    return row[-1]


@pytest.mark.parametrize(
    ("reference", "hypothesis", "expected"),
    [
        ("the cat sat", "the cat sat", ErrorRates(0.0, 0, 0, 0, 3)),
        ("the cat sat", "the dog sat", ErrorRates(1 / 3, 1, 0, 0, 3)),
        ("the cat sat", "cat sat", ErrorRates(1 / 3, 0, 1, 0, 3)),
        ("cat sat", "the cat sat down", ErrorRates(1.0, 0, 0, 2, 2)),
        ("the cat", "", ErrorRates(1.0, 0, 2, 0, 2)),
        ("cat", "a b c d", ErrorRates(4.0, 1, 0, 3, 1)),
        ("", "two words", ErrorRates(2.0, 0, 0, 2, 0)),
        ("", "", ErrorRates(0.0, 0, 0, 0, 0)),
        ("the  cat\n", " the cat", ErrorRates(0.0, 0, 0, 0, 2)),
    ],
)
def test_word_errors_by_hand(reference, hypothesis, expected):
    assert error_rates.word_errors([reference], [hypothesis]) == expected


@pytest.mark.parametrize(
    ("reference", "hypothesis", "expected"),
    [
        ("kitten", "sitting", ErrorRates(3 / 6, 2, 0, 1, 6)),
        ("a b", "ab", ErrorRates(1 / 3, 0, 1, 0, 3)),
        ("ab", "", ErrorRates(1.0, 0, 2, 0, 2)),
        ("", "a b", ErrorRates(3.0, 0, 0, 3, 0)),
        ("größe", "grösse", ErrorRates(2 / 5, 1, 0, 1, 5)),
    ],
)
def test_character_errors_by_hand(reference, hypothesis, expected):
    assert error_rates.character_errors([reference], [hypothesis]) == expected


def test_utterances_are_pooled_not_averaged():
    found = error_rates.word_errors(["a", "a b c d e f g h i", ""], ["b", "a b c d e f g h i", "x"])
    assert found == ErrorRates(2 / 10, 1, 0, 1, 10)


def test_no_utterances_have_no_errors():
    assert error_rates.word_errors([], []) == ErrorRates(0.0, 0, 0, 0, 0)


def utterances(count):
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(["a", "bc", "bd", "e"], rng.integers(0, 8))) for _ in range(count)]


@pytest.mark.parametrize("of_characters", [False, True])
def test_totals_are_those_of_levenshtein(of_characters):
    references, hypotheses = utterances(120)[:60], utterances(120)[60:]
    measure, parts = (error_rates.character_errors, list) if of_characters else (error_rates.word_errors, str.split)
    found = measure(references, hypotheses)
    pairs = [(parts(r), parts(h)) for r, h in zip(references, hypotheses, strict=True)]
    length = sum(len(r) for r, _ in pairs)
    errors = sum(levenshtein(r, h) for r, h in pairs)
    assert found.substitutions + found.deletions + found.insertions == errors
    assert found.deletions - found.insertions == length - sum(len(h) for _, h in pairs)
    assert found.reference_length == length
    assert found.rate == pytest.approx(errors / length)


def test_errors_of_each_utterance_are_those_of_levenshtein():
    references, hypotheses = utterances(60)[:30], utterances(60)[30:]
    expected = [levenshtein(r.split(), h.split()) for r, h in zip(references, hypotheses, strict=True)]
    assert error_rates.errors_of_each(references, hypotheses) == expected


def test_groups_come_in_the_order_of_their_first_utterance():
    rows = error_rates.by_group(["b", "a", "b"], ["x y", "z", "w"], ["x", "z", "v"])
    assert [(row.group, row.utterances) for row in rows] == [("b", 2), ("a", 1)]
    assert rows[0].words == ErrorRates(2 / 3, 1, 1, 0, 3)
    assert rows[0].characters == ErrorRates(3 / 4, 1, 2, 0, 4)
    assert rows[1].words.rate == 0.0


def test_durations_belong_to_the_group_whose_upper_end_they_do_not_exceed():
    found = error_rates.duration_groups([0.2, 1.0, 1.01, 2.5, 90.0], [1.0, 2.5])
    assert found == ["0-1", "0-1", "1-2.5", "1-2.5", "over 2.5"]


def test_unequal_numbers_of_utterances_are_refused():
    with pytest.raises(ValueError, match="zip"):
        error_rates.word_errors(["a"], ["a", "b"])


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "jiwer", None)
    with pytest.raises(BadInput, match=r'pip install "sigmarep\[speech\]"'):
        error_rates.word_errors(["a"], ["a"])
