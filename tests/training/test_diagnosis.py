"""The diagnosis of rows whose story is written here by hand."""

import math

import pytest

from sigmarep.training.diagnosis import CAUSES, diagnose, divergence_reason, lowest_entropy

NAN, INF = math.nan, math.inf


def row(step, loss, *entropies, gradient=1.0, max_logits=(), bounds=(), **more):
    """One step, healthy but for what is given; layers are block_0, block_1, …"""
    layers = {}
    for i, entropy in enumerate(entropies):
        layers[f"attention/entropy/block_{i}"] = entropy
        layers[f"attention/max_logit/block_{i}"] = max_logits[i] if max_logits else 1.0
        layers[f"attention/bound/block_{i}"] = bounds[i] if bounds else 0.1
    lowest = {"attention/entropy_min": NAN if any(map(math.isnan, entropies)) else min(entropies)} if entropies else {}
    return {"step": step, "train/loss": loss, "train/gradient_norm": gradient, **lowest, **layers, **more}


def healthy(*steps):
    return [row(step, 2.0, 2.5, 2.0) for step in steps]


STORIES = {
    "overflow of the loss": ("loss", [*healthy(1, 2), row(3, INF, 2.5, 1.9, gradient=NAN)]),
    "overflow of the loss, where attention was sharpened by the same update": (
        "loss",
        [*healthy(1, 2), row(3, NAN, 0.01, 1.9)],
    ),
    "a logit of +inf": ("logits", [*healthy(1, 2), row(3, NAN, NAN, NAN, max_logits=(INF, NAN), bounds=(NAN, NAN))]),
    "logits of inf − inf from finite inputs": (
        "logits",
        [*healthy(1, 2), row(3, NAN, 2.5, NAN, max_logits=(1.0, NAN), bounds=(0.1, 0.0))],
    ),
    "overflow of the logits some steps after the last log": (
        "logits",
        [*healthy(1, 50), row(100, NAN, 2.5, NAN, max_logits=(1.0, INF))],
    ),
    "a gradient that is not finite": (
        "gradient",
        [*healthy(1, 2), row(3, 2.0, 2.5, 2.0, gradient=INF), row(4, NAN, NAN, NAN)],
    ),
    "a gradient of the first step": ("gradient", [row(1, 2.0, 2.5, 2.0, gradient=NAN), row(2, NAN, NAN, NAN)]),
    "a NaN in a batch": (
        "data",
        [*healthy(1, 2), row(3, NAN, NAN, NAN, bounds=(NAN, NAN), **{"data/nonfinite/image": 3.0})],
    ),
    "a NaN in the first batch": ("data", [row(1, NAN, NAN, NAN, **{"data/nonfinite/image": 1.0})]),
    "NaN before the first update": ("initial values", [row(1, NAN, NAN, NAN)]),
    "an infinite loss before the first update": ("initial values", [row(1, INF, 2.5, 2.0)]),
    "a loss that rose": ("learning rate", [*healthy(1, 2), row(3, 9.0, 2.5, 1.9)]),
    "one update out of range": ("learning rate", [*healthy(1), row(2, NAN, NAN, NAN, bounds=(NAN, NAN))]),
    "one update that raised the loss and sharpened attention": (
        "learning rate",
        [*healthy(1, 2), row(3, 9.0, 2.5, 0.01)],
    ),
    "a collapse, then NaN": ("entropy collapse", [*healthy(1), row(2, 2.0, 2.5, 0.05), row(3, NAN, NAN, NAN)]),
    "a collapse, then a loss that rose": (
        "entropy collapse",
        [*healthy(1), row(2, 2.0, 2.5, 0.05), row(3, 9.0, 2.4, 0.01)],
    ),
    "a collapse from the start": ("entropy collapse", [row(1, 2.0, 0.0, 2.0), row(2, NAN, 0.0, 2.0)]),
    "a collapse in the step whose gradient broke": (
        "entropy collapse",
        [*healthy(1), row(2, 2.0, 2.5, 0.05, gradient=NAN), row(3, NAN, NAN, NAN)],
    ),
    "a layer that had recovered long before the loss overflowed": (
        "loss",
        [row(1, 2.0, 2.5, 0.05), *healthy(2, 3), row(4, NAN, 2.5, 2.0)],
    ),
    "a gradient that had recovered long before": (
        "loss",
        [row(1, 2.0, 2.5, 2.0), row(2, 2.0, 2.5, 2.0, gradient=INF), *healthy(3), row(4, NAN, 2.5, 2.0)],
    ),
    "infinite padding in every batch": (
        "loss",
        [row(step, loss, 2.5, **{"data/nonfinite/x": 8.0}) for step, loss in ((1, 2.0), (2, 2.0), (3, NAN))],
    ),
    "everything broken after a long gap": ("unknown", [*healthy(1, 50), row(100, NAN, NAN, NAN, bounds=(NAN, NAN))]),
    "loss and attention together after a long gap": ("unknown", [*healthy(1, 50), row(100, 9.0, 2.5, 0.01)]),
    "a step without statistics": ("unknown", [*healthy(1, 50), row(60, NAN)]),
    "nothing but broken steps": ("unknown", [row(50, NAN, NAN, NAN)]),
    "no attention at all": ("unknown", [row(1, 2.0), row(2, NAN)]),
}


@pytest.mark.parametrize("story", STORIES)
def test_the_cause_is_the_first_that_broke(story):
    cause, rows = STORIES[story]
    diagnosis = diagnose(rows, factor=3.0)
    assert diagnosis.cause == cause
    assert diagnosis.diverged_step == rows[-1]["step"]
    assert ("fell first" in diagnosis.explanation) == (cause == "entropy collapse")


def test_every_cause_has_a_story():
    assert {cause for cause, _ in STORIES.values()} == set(CAUSES)


def test_the_last_healthy_step_is_named():
    diagnosis = diagnose([*healthy(1, 50), row(100, INF, 2.5, 1.9)])
    assert (diagnosis.healthy_step, diagnosis.broken_step, diagnosis.diverged_step) == (50, 100, 100)
    assert diagnosis.reason == "the loss became inf"
    assert diagnosis.explanation == (
        "the attention statistics were finite at step 100 (loss inf, lowest entropy 1.9 nats in block_1); step 50, the "
        "last one recorded before, was healthy (loss 2, lowest entropy 2 nats in block_1)"
    )


def test_the_count_of_broken_inputs_is_named():
    diagnosis = diagnose([*healthy(1), row(2, NAN, NAN, **{"data/nonfinite/image": 3.0})])
    assert "values of the batch were not finite at step 2 (3 of image): check the data" in diagnosis.explanation


def test_the_layer_that_fell_first_is_named():
    rows = [
        row(1, 2.0, 2.0, 2.0),
        row(2, 2.0, 1.0, 0.09),
        row(3, 2.0, 0.05, 0.5),
        row(4, 2.0, 0.02, 1.0),
        row(5, NAN, 0.0, 0.0),
    ]
    diagnosis = diagnose(rows)
    assert diagnosis.collapsed == [("block_1", 2), ("block_0", 3)]
    # Entropies of a step whose loss is not finite do not count.
    assert diagnosis.explanation == (
        "the attention entropy of block_1 fell first, below 0.1 nats by step 2; 2 of 2 layers did; the lowest was 0.02 "
        "nats in block_0 at step 4"
    )


def test_the_first_of_many_broken_layers_is_the_lowest_block():
    layers = {f"attention/{name}/block_{i}": NAN for i in (10, 9, 11) for name in ("entropy", "max_logit")}
    good = {f"attention/entropy/block_{i}": 2.0 for i in (10, 9, 11)}
    diagnosis = diagnose([{"step": 1, "train/loss": 2.0, **good}, {"step": 2, "train/loss": NAN, **layers}])
    assert diagnosis.nonfinite == (2, "block_9")


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_the_lowest_entropy_does_not_depend_on_where_a_nan_stands(order):
    rows = [row(1, 2.0, NAN, 2.0), row(2, 2.0, 2.5, 2.0), row(3, NAN, 0.0, 0.0)]
    rows = [rows[i] for i in order]
    assert lowest_entropy(rows) == 2.0
    assert diagnose(rows).lowest == (2.0, "block_1", 2)
    assert math.isnan(lowest_entropy([row(1, 2.0, NAN)]))


def test_a_run_that_has_not_diverged_has_no_cause():
    rows = [*healthy(1, 2), row(3, 2.0, 0.05, NAN, gradient=INF), *healthy(4)]
    diagnosis = diagnose(rows, factor=3.0)
    assert diagnosis.cause is diagnosis.diverged_step is diagnosis.reason is None
    assert diagnosis.explanation == ""
    assert diagnosis.nonfinite == (3, "block_1")
    assert diagnosis.collapsed == []
    assert diagnose([]).lowest is None


def test_a_layer_without_queries_is_not_broken():
    assert diagnose([row(1, 2.0, 2.5, max_logits=(-INF,))]).nonfinite is None


def test_rows_of_other_kinds_between_are_passed_over():
    rows = [
        *healthy(1, 2),
        {"step": 2, "eval/test/loss": NAN},
        {"step": 2, "sharpness/hessian": NAN},
        row(3, NAN, 2.5, 2.0),
    ]
    assert diagnose(rows).cause == "loss"


def test_divergence_is_a_loss_that_is_not_finite_or_far_above_its_start():
    assert divergence_reason(2.0, 1.0, 3.0) is None
    assert "nan" in divergence_reason(NAN, 1.0, 3.0)
    assert "more than 3 times" in divergence_reason(3.5, 1.0, 3.0)
    assert divergence_reason(100.0, 1.0, 0.0) is None
    # An accepted multiple below 1 ends a run at its first step.
    assert diagnose([row(1, 2.0, 2.5)], factor=0.5).cause == "unknown"
