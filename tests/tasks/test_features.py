"""Nearest neighbours, linear probe, alignment and uniformity, against scikit-learn and sums by hand."""

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from sigmarep.errors import BadInput
from sigmarep.tasks import features

SWEEP = {"learning_rates": (0.1, 1.0), "weight_decays": (1e-3, 1e-2), "epochs": 60, "batch_size": 128}


@pytest.fixture(scope="module")
def digits():
    """Training features and labels, test features and labels."""
    bunch = load_digits()
    x, y = bunch.data.astype(np.float32), bunch.target
    return x[:1000], y[:1000], x[1000:1400], y[1000:1400]


@pytest.mark.parametrize("temperature", [0.01, 0.07, 10.0])
def test_neighbours_vote_as_in_scikit_learn(digits, temperature, monkeypatch):
    # Several blocks of queries and of the bank, the last of each a partial one.
    monkeypatch.setattr(features, "QUERIES", 150)
    monkeypatch.setattr(features, "BANK", 300)
    train, labels, test, _ = digits
    # Cosine distance is 1 − s.
    other = KNeighborsClassifier(20, metric="cosine", weights=lambda d: np.exp((1 - d - 1) / temperature))
    expected = other.fit(train.astype(np.float64), labels).predict(test.astype(np.float64))
    options = {"neighbours": 20, "temperature": temperature, "num_classes": 10}
    found = features.knn_predictions(train, labels, test, **options)
    assert np.mean(found == expected) >= 0.995


def test_more_neighbours_than_examples_are_refused(digits):
    train, labels, test, _ = digits
    with pytest.raises(BadInput, match=r"config\.knn\.neighbours = 20: expected at most the 10 training examples"):
        features.knn_predictions(train[:10], labels[:10], test, neighbours=20, temperature=0.1, num_classes=10)


def test_the_probe_reads_as_much_as_scikit_learns_logistic_regression(digits):
    train, labels, test, test_labels = digits
    scaled = [(x - train.mean(0)) / (train.std(0) + 1) for x in (train, test)]
    expected = max(
        LogisticRegression(C=c, max_iter=2000).fit(scaled[0], labels).score(scaled[1], test_labels)
        for c in (0.01, 0.1, 1.0)
    )
    found = features.linear_probe(train, labels, test, test_labels, num_classes=10, **SWEEP)
    assert found.accuracy == pytest.approx(expected, abs=0.015)
    assert found.held_out_accuracy > 0.9
    assert found == features.linear_probe(train, labels, test, test_labels, num_classes=10, **SWEEP)


def test_the_probe_converges_to_the_minimum_that_scikit_learn_finds(digits):
    train, labels, _, _ = digits
    x = ((train - train.mean(0)) / (train.std(0) + 1)).astype(np.float32)
    decay = 0.01
    # scikit-learn minimises C·Σ loss + ½‖W‖², this probe the mean loss + ½·decay·‖W‖².
    other = LogisticRegression(C=1 / (decay * len(x)), tol=1e-8, max_iter=5000).fit(x.astype(np.float64), labels)
    options = {"num_classes": 10, "epochs": 400, "batch_size": len(x), "seed": 0}
    (weights,) = np.asarray(features._fit(x, labels, np.float32([1.0]), np.float32([decay]), **options))
    np.testing.assert_allclose(weights[:-1].T, other.coef_, atol=0.01)
    bias = weights[-1] - weights[-1].mean()
    np.testing.assert_allclose(bias, other.intercept_ - other.intercept_.mean(), atol=0.02)


def test_the_sweep_never_looks_at_the_test_split(digits):
    train, labels, test, test_labels = digits
    first = features.linear_probe(train, labels, test, test_labels, num_classes=10, **SWEEP)
    wrong = features.linear_probe(train, labels, test, (test_labels + 1) % 10, num_classes=10, **SWEEP)
    assert wrong[1:] == first[1:]
    assert wrong.accuracy < 0.2


def test_a_learning_rate_that_diverges_is_not_chosen(digits):
    train, labels, test, test_labels = digits
    options = SWEEP | {"learning_rates": (1e30, 0.1), "weight_decays": (0.1,)}
    found = features.linear_probe(train, labels, test, test_labels, num_classes=10, **options)
    assert found.learning_rate == 0.1


def test_alignment_and_uniformity_are_wang_and_isolas(monkeypatch):
    monkeypatch.setattr(features, "QUERIES", 7)
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 30, 5))
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (first, second))
    distances = [np.sum((a[i] - b[i]) ** 2) for i in range(30)]
    assert features.alignment(first, second) == pytest.approx(np.mean(distances))
    pairs = [np.exp(-2 * np.sum((a[i] - a[j]) ** 2)) for i in range(30) for j in range(i)]
    assert features.uniformity(first) == pytest.approx(np.log(np.mean(pairs)))
    assert features.alignment(first, 3 * first) == pytest.approx(0, abs=1e-12)
    assert features.uniformity(np.ones((10, 4))) == pytest.approx(0, abs=1e-9)
