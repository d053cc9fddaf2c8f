"""Measures of frozen features: nearest neighbours, a linear probe, alignment and uniformity.

All take features (N, D) of whole splits as NumPy arrays, compute in float32 on this process's first device, and are
deterministic.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sigmarep.errors import BadInput

# Rows of queries and of the bank that are compared at a time.
QUERIES, BANK = 1024, 16_384
# The part of the training split on which the probe's learning rate and weight decay are chosen.
HELD_OUT = 0.1
PROBE_MOMENTUM = 0.9
# A feature's variance counts as at least this share of the mean one: hardly ever lit pixels are not blown up.
LEAST_VARIANCE = 0.1


class Probe(NamedTuple):
    """`accuracy` on the test features; the `learning_rate` and `weight_decay` chosen, and their accuracy when held out."""

    accuracy: float
    learning_rate: float
    weight_decay: float
    held_out_accuracy: float


def normalised(features: np.ndarray) -> np.ndarray:
    """Rows of Euclidean norm 1."""
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.maximum(norms, 1e-12)


def knn_predictions(
    bank: np.ndarray,
    labels: np.ndarray,
    queries: np.ndarray,
    *,
    neighbours: int,
    temperature: float,
    num_classes: int,
) -> np.ndarray:
    """The class of every query by the weighted vote of Wu et al. (2018), section 3.4.

    The `neighbours` rows of the bank with the largest cosine similarity s vote for their class with weight
    exp(s / temperature).

    Args:
      bank, labels: (N, D) and (N,) int.
      queries: (M, D).

    Raises:
      BadInput: the bank has fewer rows than `neighbours`.
    """
    if neighbours > len(bank):
        raise BadInput(f"config.knn.neighbours = {neighbours}: expected at most the {len(bank)} training examples")
    bank, queries = normalised(bank), normalised(queries)
    predicted = []
    for start in range(0, len(queries), QUERIES):
        asked = jnp.asarray(queries[start : start + QUERIES], jnp.float32)
        best = (jnp.full((len(asked), neighbours), -jnp.inf), jnp.zeros((len(asked), neighbours), jnp.int32))
        for at in range(0, len(bank), BANK):
            best = _nearer(*best, asked, bank[at : at + BANK], labels[at : at + BANK].astype(np.int32))
        predicted.append(_vote(*best, temperature, num_classes))
    return np.concatenate(predicted)


@jax.jit
def _nearer(similarities, labels, queries, bank, bank_labels):
    new = jnp.matmul(queries, bank.T, precision="highest")
    everything = jnp.concatenate([similarities, new], axis=1)
    values, index = jax.lax.top_k(everything, similarities.shape[1])
    candidates = jnp.concatenate([labels, jnp.broadcast_to(bank_labels, new.shape)], axis=1)
    return values, jnp.take_along_axis(candidates, index, axis=1)


def _vote(similarities, labels, temperature, num_classes) -> np.ndarray:
    similarities, labels = np.asarray(similarities, np.float64), np.asarray(labels)
    # Relative to the nearest, whose weight could overflow at a low temperature.
    weights = np.exp((similarities - similarities[:, :1]) / temperature)
    votes = np.zeros((len(labels), num_classes))
    np.add.at(votes, (np.arange(len(labels))[:, None], labels), weights)
    return votes.argmax(1)


def linear_probe(
    features: np.ndarray,
    labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    *,
    num_classes: int,
    learning_rates: tuple[float, ...],
    weight_decays: tuple[float, ...],
    epochs: int,
    batch_size: int,
    seed: int = 0,
) -> Probe:
    """Softmax regression on standardised features, by SGD with Nesterov momentum and a cosine learning rate.

    Every pair of learning rate and weight decay is trained on nine tenths of the training features; the pair that
    reads most of the other tenth right (of equals, the one with the lowest loss) is trained anew on all of them, and
    that probe is measured on the test features, once.
    """
    scale = np.sqrt(features.var(0) + LEAST_VARIANCE * features.var(0).mean() + 1e-12)
    mean = features.mean(0)
    train, test = ((each - mean) / scale for each in (features, test_features))
    train, test = train.astype(np.float32), test.astype(np.float32)
    labels, test_labels = labels.astype(np.int32), test_labels.astype(np.int32)
    order = np.random.default_rng(seed).permutation(len(train))
    held = max(round(HELD_OUT * len(train)), 1)
    held_out, fitted = order[:held], order[held:]
    pairs = [(rate, decay) for rate in learning_rates for decay in weight_decays]

    def fit(rows, pairs):
        rates, decays = (jnp.asarray(column, jnp.float32) for column in zip(*pairs, strict=True))
        return _fit(
            train[rows],
            labels[rows],
            rates,
            decays,
            num_classes=num_classes,
            epochs=epochs,
            batch_size=min(batch_size, len(rows)),
            seed=seed,
        )

    losses, accuracies = (np.asarray(each) for each in _measure(fit(fitted, pairs), train[held_out], labels[held_out]))
    finite = np.isfinite(losses)
    best = np.lexsort((np.where(finite, losses, np.inf), -np.where(finite, accuracies, -1.0)))[0]
    _, accuracy = _measure(fit(order, [pairs[best]]), test, test_labels)
    rate, decay = pairs[best]
    return Probe(float(accuracy[0]), rate, decay, float(accuracies[best]))


@functools.partial(jax.jit, static_argnames=("num_classes", "epochs", "batch_size", "seed"))
def _fit(features, labels, rates, decays, *, num_classes, epochs, batch_size, seed):
    """Weights (G, D + 1, classes) of G probes trained side by side, bias last."""
    count, steps = len(features), len(features) // batch_size
    total = epochs * steps

    def gradient(weights, rows):
        x, targets = features[rows], jax.nn.one_hot(labels[rows], num_classes)
        error = jax.nn.softmax(_logits(weights, x)) - targets
        kernel = jnp.einsum("nd,gnc->gdc", x, error, precision="highest") / batch_size
        kernel = kernel + decays[:, None, None] * weights[:, :-1]
        return jnp.concatenate([kernel, error.mean(1, keepdims=True)], axis=1)

    def step(carry, indexed):
        weights, velocity = carry
        at, rows = indexed
        rate = rates[:, None, None] * 0.5 * (1 + jnp.cos(jnp.pi * at / total))
        slope = gradient(weights, rows)
        velocity = PROBE_MOMENTUM * velocity + slope
        return (weights - rate * (slope + PROBE_MOMENTUM * velocity), velocity), None

    def epoch(carry, number):
        shuffled = jax.random.permutation(jax.random.fold_in(jax.random.key(seed), number), count)
        rows = shuffled[: steps * batch_size].reshape(steps, batch_size)
        return jax.lax.scan(step, carry, (number * steps + jnp.arange(steps), rows))

    start = jnp.zeros((len(rates), features.shape[1] + 1, num_classes), jnp.float32)
    (weights, _), _ = jax.lax.scan(epoch, (start, start), jnp.arange(epochs))
    return weights


def _logits(weights, x):
    return jnp.einsum("nd,gdc->gnc", x, weights[:, :-1], precision="highest") + weights[:, -1:]


@jax.jit
def _measure(weights, features, labels):
    """Mean loss and accuracy of each of the probes."""
    logits = _logits(weights, features)
    picked = jnp.take_along_axis(logits, labels[None, :, None], axis=2)[..., 0]
    losses = jax.nn.logsumexp(logits, axis=2) - picked
    return losses.mean(1), (logits.argmax(2) == labels).mean(1)


def alignment(first: np.ndarray, second: np.ndarray) -> float:
    """Mean squared distance of the normalised rows of two views (Wang and Isola, 2020, eq. 1, α = 2): 0 is aligned."""
    difference = normalised(first.astype(np.float64)) - normalised(second.astype(np.float64))
    return float(np.mean(np.sum(difference**2, axis=1)))


def uniformity(features: np.ndarray) -> float:
    """log of the mean of exp(−2·‖x − y‖²) over all pairs of different rows (Wang and Isola, 2020, eq. 2, t = 2).

    0 where all rows are the same, the lower the more evenly they cover the sphere; not below −4.
    """
    rows = normalised(features.astype(np.float64))
    total = 0.0
    for start in range(0, len(rows), QUERIES):
        products = rows[start : start + QUERIES] @ rows.T
        total += float(np.sum(np.exp(4 * (products - 1))))
    # The diagonal's pairs of equal rows count 1 each.
    pairs = len(rows) * (len(rows) - 1)
    return float(np.log(max(total - len(rows), 1e-300) / pairs)) if pairs else 0.0
