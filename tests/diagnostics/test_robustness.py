"""Failed runs of a grid of settings, on sweeps with known results."""

import json

import pytest

from sigmarep.diagnostics import robustness
from sigmarep.errors import BadInput

METRIC = "eval/test/accuracy"


def written(tmp_path, runs):
    record = {}
    for number, (point, state, value) in enumerate(runs):
        folder = tmp_path / str(number)
        folder.mkdir()
        row = {"step": 1, "train/loss": 1.0, "attention/entropy_min": 0.5 + number}
        (folder / "metrics.jsonl").write_text(json.dumps(row | {METRIC: value} if value else row) + "\n")
        record[str(number)] = {"point": {"width": 48, **point}, "state": state}
    (tmp_path / "sweep.json").write_text(json.dumps(record))
    return str(tmp_path)


def test_a_run_fails_if_it_diverged_or_ends_below_the_threshold(tmp_path):
    runs = [
        ({"arm": "plain", "batch_size": 64, "config.seed": 0}, "done", 0.85),
        ({"arm": "plain", "batch_size": 64, "config.seed": 1}, "done", 0.45),
        # What it had reached before it diverged is no result.
        ({"arm": "plain", "batch_size": 256, "config.seed": 0}, "diverged", 0.9),
        ({"arm": "plain", "batch_size": 256, "config.seed": 1}, "done", 0.1),
        ({"arm": "sigma", "batch_size": 64, "config.seed": 0}, "done", 0.8),
        ({"arm": "sigma", "batch_size": 64, "config.seed": 1}, "running", None),
    ]
    grid = robustness.read_grid(written(tmp_path, runs))
    assert {arm: {setting: len(each) for setting, each in of_arm.items()} for arm, of_arm in grid.items()} == {
        "plain": {"batch_size=64": 2, "batch_size=256": 2},
        "sigma": {"batch_size=64": 1},
    }
    runs = [run for each in grid["plain"].values() for run in each]
    assert [robustness.failures(runs, METRIC, threshold) for threshold in (0.5, 0.2, 0.85)] == [3, 2, 3]
    accuracies, counts = robustness.tables(grid, METRIC)
    assert "| batch_size=64 | 85.0, 45.0 | 80.0 |" in accuracies
    assert "| batch_size=256 | diverged, 10.0 |  |" in accuracies
    assert "| plain | 3 of 4 | 2 of 4 | 3 of 4 | 3 of 4 | 65.0 | 0.500 |" in counts
    assert "| sigma | 0 of 1 | 0 of 1 | 0 of 1 | 0 of 1 | 80.0 | 4.500 |" in counts


def test_settings_and_seeds_are_in_order_however_the_runs_ended(tmp_path):
    runs = [
        ({"arm": "plain", "rate": rate, "config.seed": seed}, "done", (100 * rate + seed) / 2000)
        for rate, seed in ((10.0, 1), (2.5, 0), (10.0, 0), (2.5, 1))
    ]
    grid = robustness.read_grid(written(tmp_path, runs))
    assert list(grid["plain"]) == ["rate=2.5", "rate=10.0"]
    (table, _) = robustness.tables(grid, METRIC)
    assert table.splitlines()[2:] == ["| rate=2.5 | 12.5, 12.6 |", "| rate=10.0 | 50.0, 50.0 |"]


def test_every_run_is_a_dot_a_diverged_one_at_nothing(tmp_path):
    runs = [
        ({"arm": arm, "batch_size": size, "config.seed": seed}, "diverged" if size == 256 and seed else "done", 0.5)
        for arm in ("plain", "sigma")
        for size in (64, 256)
        for seed in (0, 1)
    ]
    grid = robustness.read_grid(written(tmp_path, runs))
    (axes,) = robustness.draw(grid, METRIC).axes
    dots = [line for line in axes.lines if line.get_marker() == "o"]
    assert [list(line.get_ydata()) for line in dots] == [[0.5, 0.5, 0.5, 0.0]] * 2
    assert [each.get_text() for each in axes.get_xticklabels()] == ["64", "256"]
    assert axes.get_xlabel() == "batch_size"


def test_a_sweep_without_arms_is_refused(tmp_path):
    with pytest.raises(BadInput, match="its run 0 has no arm"):
        robustness.read_grid(written(tmp_path, [({"config.seed": 0}, "done", 0.5)]))
