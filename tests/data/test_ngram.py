"""The label n-gram against exact fractions of the published recursion."""

from fractions import Fraction

import numpy as np
import pytest

from sigmarep.data.audio.ngram import NGram

VOCABULARY = 5


def corpus(count=30):
    rng = np.random.default_rng(0)
    return [rng.choice([1, 1, 1, 2, 3], rng.integers(0, 7)).tolist() for _ in range(count)]


def witten_bell(sequences, order, prefix, following):
    """p(following | prefix) by Witten and Bell's recursion, from the sequences themselves; "end" is a symbol."""
    padded = [["begin"] * (order - 1) + list(sequence) + ["end"] for sequence in sequences]
    past = (["begin"] * (order - 1) + list(prefix))[len(prefix) :]

    def recursion(length):
        if length < 0:
            return Fraction(1, VOCABULARY + 1)
        context = past[len(past) - length :]
        seen = [row[i] for row in padded for i in range(order - 1, len(row)) if row[i - length : i] == context]
        shorter = recursion(length - 1)
        if not seen:
            return shorter
        return (seen.count(following) + len(set(seen)) * shorter) / (len(seen) + len(set(seen)))

    return recursion(order - 1)


@pytest.mark.parametrize("order", [1, 2, 3, 5])
@pytest.mark.parametrize("prefix", [(), (1,), (1, 2), (4,), (2, 4, 1), (1, 1, 1, 1, 3, 2)])
def test_probabilities_are_those_of_the_published_recursion(order, prefix):
    sequences = corpus()
    model = NGram.train(sequences, order=order, vocabulary_size=VOCABULARY)
    found = model.log_probabilities(prefix)
    assert found.shape == (VOCABULARY,)
    for label in range(VOCABULARY):
        assert np.exp(found[label]) == pytest.approx(float(witten_bell(sequences, order, prefix, label)), rel=1e-12)
    assert np.exp(model.log_end(prefix)) == pytest.approx(
        float(witten_bell(sequences, order, prefix, "end")), rel=1e-12
    )


@pytest.mark.parametrize("order", [1, 2, 4])
def test_labels_and_end_sum_to_one_after_any_prefix(order):
    model = NGram.train(corpus(), order=order, vocabulary_size=VOCABULARY)
    rng = np.random.default_rng(1)
    for length in range(8):
        prefix = rng.integers(0, VOCABULARY, length).tolist()
        total = np.exp(model.log_probabilities(prefix)).sum() + np.exp(model.log_end(prefix))
        assert total == pytest.approx(1.0, abs=1e-12)


def test_a_case_by_hand():
    # Of one label "1": the empty context saw 1 and the end, once each, so p = (1 + 2/3) / (2 + 2); the beginning saw 1.
    model = NGram.train([[1]], order=2, vocabulary_size=2)
    assert np.exp(model.log_probabilities(())[1]) == pytest.approx((1 + 5 / 12) / 2)
    assert np.exp(model.log_end((1,))) == pytest.approx((1 + 5 / 12) / 2)


def test_only_the_last_labels_count():
    model = NGram.train(corpus(), order=3, vocabulary_size=VOCABULARY)
    np.testing.assert_array_equal(model.log_probabilities((3, 2, 1, 1)), model.log_probabilities((1, 2, 1, 1)))
    assert np.any(model.log_probabilities((1, 1)) != model.log_probabilities((2, 1)))


def test_the_beginning_is_a_context():
    model = NGram.train([[1, 2, 2], [1, 2]], order=2, vocabulary_size=VOCABULARY)
    assert model.log_probabilities(())[1] > model.log_probabilities((2,))[1]


def test_without_sequences_all_is_equally_likely():
    model = NGram.train([], order=3, vocabulary_size=VOCABULARY)
    np.testing.assert_allclose(model.log_probabilities((1, 2)), -np.log(VOCABULARY + 1))


def test_arrays_and_lists_are_the_same_sequences():
    one = NGram.train(corpus(), order=3, vocabulary_size=VOCABULARY)
    other = NGram.train([np.array(each, np.int32) for each in corpus()], order=3, vocabulary_size=VOCABULARY)
    np.testing.assert_array_equal(one.log_probabilities((1, 2)), other.log_probabilities(np.array([1, 2])))


def test_an_order_below_one_is_refused():
    with pytest.raises(ValueError, match="order = 0: expected at least 1"):
        NGram.train(corpus(), order=0, vocabulary_size=VOCABULARY)
