"""Sensitivity to the learning rate, on sweeps with known results."""

import json
import math
import shutil

import pytest

from sigmarep.diagnostics import sensitivity
from sigmarep.errors import BadInput
from sigmarep.training.metrics import MetricWriter


def sweep(tmp_path, losses, state="done"):
    """Runs of {(arm, rate, seed): losses}."""
    record = {}
    for (arm, rate, seed), values in losses.items():
        name = f"{arm}-{rate}-{seed}"
        writer = MetricWriter(str(tmp_path / name), resume_step=0, tensorboard=False, wandb_project="", run_config={})
        for step, loss in enumerate(values, 1):
            writer.write(step, {"train/loss": loss, "attention/entropy_min": 1.0 / step})
        writer.close()
        record[name] = {"point": {"arm": arm, "learning_rate": rate, "config.seed": seed}, "state": state, "status": 0}
    (tmp_path / "sweep.json").write_text(json.dumps(record))
    return str(tmp_path)


def test_the_range_is_that_of_neighbouring_rates_within_a_tenth_of_the_best_of_any_arm():
    by_rate = {1e-3: 1.05, 3e-3: 2.0, 1e-2: 1.1, 3e-2: 1.0, 0.1: 1.09, 0.3: 1.2}
    found = sensitivity.trained_range(by_rate, 1.0)
    assert (found.low, found.high) == (1e-2, 0.1)
    assert found.ratio == pytest.approx(10.0)
    assert sensitivity.trained_range(by_rate, 0.5) is None
    assert sensitivity.trained_range({1e-3: 1.0, 1e-2: math.inf}, 1.0) == (1e-3, 1e-3, 1.0)


def test_a_sweeps_outcomes_are_those_of_its_runs(tmp_path):
    # Twenty logged losses: the last tenth are two.
    def run(last):
        return [5.0] * 18 + [last - 0.5, last + 0.5]

    losses = {("a", rate, seed): run(last + seed) for rate, last in ((0.1, 1.0), (0.01, 3.0)) for seed in range(3)}
    losses |= {("b", 0.1, seed): [4.0, math.nan] for seed in range(3)} | {
        ("b", 0.01, seed): run(2.1) for seed in range(3)
    }
    table = sensitivity.read_sweep(sweep(tmp_path, losses))
    assert list(table["a"]) == [0.01, 0.1]
    assert [each.loss for each in table["a"][0.1]] == pytest.approx([1.0, 2.0, 3.0])
    assert table["a"][0.1][0].lowest == pytest.approx(1 / 20)
    assert sensitivity.medians(table) == {"a": {0.01: 4.0, 0.1: 2.0}, "b": {0.01: pytest.approx(2.1), 0.1: math.inf}}
    first, second = sensitivity.findings(table)
    # The best median is 2, so a run trains below 2.2: at 0.1 the seeds of a, with 1, 2 and 3, differ in that.
    assert first["split"] == [0.1]
    assert (first["rate"], first["range"]) == (0.1, (0.1, 0.1, 1.0))
    assert (second["rate"], second["range"]) == (0.01, (0.01, 0.01, 1.0))


def test_a_range_of_its_own_is_measured_against_the_arms_own_best():
    losses = {"best": {0.1: 1.0, 1.0: 2.0}, "flat": {0.1: 1.5, 1.0: 1.4}}
    table = {
        arm: {rate: [sensitivity.RunOutcome(loss, 0.3)] for rate, loss in by_rate.items()}
        for arm, by_rate in losses.items()
    }
    best, flat = sensitivity.findings(table)
    assert best["range"] == best["own"] == (0.1, 0.1, 1.0)
    assert (flat["range"], flat["own"]) == (None, (0.1, 1.0, 10.0))


def test_a_diverged_run_has_no_loss_whatever_was_logged(tmp_path):
    table = sensitivity.read_sweep(sweep(tmp_path, {("a", 0.1, 0): [3.0, 2.0]}, state="diverged"))
    assert table["a"][0.1][0].loss == math.inf


def test_a_run_whose_folder_was_removed_is_left_out(tmp_path):
    folder = sweep(tmp_path, {("a", 0.1, seed): [3.0, 2.0] for seed in range(2)} | {("b", 0.1, 0): [1.0]})
    shutil.rmtree(tmp_path / "a-0.1-1")
    shutil.rmtree(tmp_path / "b-0.1-0")
    table = sensitivity.read_sweep(folder)
    assert list(table) == ["a"]
    assert len(table["a"][0.1]) == 1
    shutil.rmtree(tmp_path / "a-0.1-0")
    assert sensitivity.findings(sensitivity.read_sweep(folder)) == []


def test_what_is_refused(tmp_path):
    with pytest.raises(BadInput, match="holds no sweep"):
        sensitivity.read_sweep(str(tmp_path))
    (tmp_path / "sweep.json").write_text(json.dumps({"x": {"point": {"arm": "a"}, "state": "diverged"}}))
    with pytest.raises(BadInput, match="its run x has no learning_rate of its own"):
        sensitivity.read_sweep(str(tmp_path))


@pytest.mark.parametrize("nan_at", [0, 1, 2])
def test_the_lowest_entropy_of_a_run_is_over_the_steps_that_have_one(nan_at):
    rows = [{"train/loss": 2.0, "attention/entropy_min": 1.5} for _ in range(3)]
    rows[nan_at] = {"train/loss": math.nan, "attention/entropy_min": math.nan}
    assert sensitivity.outcome(rows, diverged=True).lowest == 1.5
    # As versions before wrote it: a NaN was taken for 0.
    rows[nan_at] = {"train/loss": math.nan, "attention/entropy_min": 0.0}
    assert sensitivity.outcome(rows, diverged=True).lowest == 1.5
