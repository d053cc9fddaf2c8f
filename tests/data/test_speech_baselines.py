"""The figures that need no network, against a slow search."""

import numpy as np
import pytest

from sigmarep.data.audio import baselines

FILTERS = 6


def utterances(lengths, seed):
    """Smooth random filterbanks, float32."""
    rng = np.random.default_rng(seed)
    found = []
    for length in lengths:
        points = rng.normal(size=(7, FILTERS))
        time = np.linspace(0, 6, length)
        found.append(np.stack([np.interp(time, range(7), each) for each in points.T], axis=1).astype(np.float32))
    return found


def test_the_most_frequent_text():
    assert baselines.most_frequent(["a", "b", "b", "c"]) == "b"


def test_of_equally_frequent_texts_the_earliest():
    assert baselines.most_frequent(["c", "b", "a", "b", "c"]) == "c"


def test_the_nearest_is_that_of_a_slow_search():
    # Lengths that sixteen divides: each part is exactly so many frames.
    train, queries = utterances([32, 48, 64, 80, 96] * 8, seed=0), utterances([48, 16, 112] * 4, seed=1)
    # Noise between frames makes the averages shorter vectors, by a different factor each.
    rng = np.random.default_rng(2)
    train = [each + rng.normal(0, rng.uniform(0, 4), each.shape).astype(np.float32) for each in train]

    def parts(features):
        features = features.astype(np.float64)
        return ((features - features.mean()) / features.std()).reshape(16, -1, FILTERS).mean(axis=1)

    texts = [str(i) for i in range(len(train))]
    expected = [texts[int(np.argmin([np.sum((parts(q) - parts(t)) ** 2) for t in train]))] for q in queries]
    assert baselines.nearest_neighbor(train, texts, queries) == expected


@pytest.mark.parametrize(
    "changed",
    [lambda x: x, lambda x: 3.0 * x + 5.0, lambda x: np.repeat(x, 2, axis=0), lambda x: x[::2]],
    ids=["same", "louder", "slower", "faster"],
)
def test_an_utterance_is_found_again_however_loud_or_fast(changed):
    train = utterances([64, 80, 96, 73, 101], seed=2)
    found = baselines.nearest_neighbor(train, list("abcde"), [changed(each) for each in train])
    assert found == list("abcde")


@pytest.mark.parametrize("length", [1, 2, 5, 15, 17])
def test_utterances_of_few_frames_have_a_neighbour(length):
    train = utterances([length, 40, 3], seed=3)
    assert baselines.nearest_neighbor(train, list("abc"), train[:1]) == ["a"]


def test_silence_has_a_neighbour():
    train = [np.zeros((20, FILTERS), np.float32), *utterances([30], seed=4)]
    assert baselines.nearest_neighbor(train, ["silence", "speech"], [np.full((9, FILTERS), -3.0)]) == ["silence"]


def test_of_equally_near_ones_the_earlier():
    one, other = utterances([40, 50], seed=5)
    train = [other, *[one] * 37]
    texts = [str(i) for i in range(len(train))]
    assert baselines.nearest_neighbor(train, texts, [one, one]) == ["1", "1"]


def test_without_queries_nothing_is_found():
    assert baselines.nearest_neighbor(utterances([20], seed=6), ["a"], []) == []
