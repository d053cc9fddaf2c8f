"""Best rates of a sweep with known figures."""

import json

import pytest

from sigmarep.diagnostics import best_rates
from sigmarep.errors import BadInput

ACCURACY, LOSS = "eval/test/accuracy", "eval/test/loss"


def written(tmp_path, metric, runs):
    record = {}
    for number, (point, value) in enumerate(runs):
        folder = tmp_path / str(number)
        folder.mkdir()
        row = {"step": 1, "train/loss": 1.0} | ({} if value is None else {metric: value})
        (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        state = "diverged" if value is None else "done"
        record[str(number)] = {"point": {"width": 48, **point}, "state": state}
    (tmp_path / "sweep.json").write_text(json.dumps(record))
    return str(tmp_path)


def of_arm(arm, seeds_by_rate, **others):
    return [
        ({"arm": arm, "learning_rate": rate, "config.seed": seed, **others}, value)
        for rate, seeds in seeds_by_rate.items()
        for seed, value in enumerate(seeds)
    ]


def test_the_best_rate_has_the_best_median_and_diverged_runs_are_the_worst(tmp_path):
    runs = [
        *of_arm("sigma", {0.1: [0.7, 0.72, 0.69], 1.0: [0.9, None, 0.71]}, optimizer="sgd"),
        *of_arm("plain", {0.1: [0.1, None, None], 1.0: [None, None, None]}, optimizer="sgd"),
        *of_arm("sigma", {10.0: [0.5]}, optimizer="lars"),
    ]
    figures = best_rates.read_figures(written(tmp_path, ACCURACY, runs), ACCURACY)
    sgd, lars = best_rates.tables(figures, ACCURACY)
    assert "| eval/test/accuracy (optimizer=sgd) | best rate | median there | 0.1 | 1 |" in sgd
    assert "| sigma | 1 | 0.71 | 0.7, 0.72, 0.69 | 0.9, diverged, 0.71 |" in sgd
    assert "| plain | none |  | 0.1, diverged, diverged | diverged, diverged, diverged |" in sgd
    assert "| sigma | 10 | 0.5 | 0.5 |" in lars


def test_of_a_loss_the_lowest_median_is_the_best(tmp_path):
    runs = of_arm("deepnorm", {0.001: [5.9, 5.8, 6.1], 0.003: [5.7, 5.6, None], 0.01: [5.0, None, None]})
    (text,) = best_rates.tables(best_rates.read_figures(written(tmp_path, LOSS, runs), LOSS), LOSS)
    assert "| deepnorm | 0.003 | 5.7 | 5.9, 5.8, 6.1 | 5.7, 5.6, diverged | 5, diverged, diverged |" in text


def test_an_arm_is_as_good_as_another_at_its_best_by_four_shares(tmp_path):
    runs = [
        *of_arm("pre_ln", {0.01: [2.2, 2.0, 1.9], 0.1: [2.3, None, None], 1.0: [9.0, 9.0, 9.0]}),
        *of_arm("sigma", {0.01: [2.11, 2.09, 2.09], 0.1: [1.9, 1.9, None], 1.0: [2.3, 2.3, 2.3]}),
        *of_arm("apart", {0.01: [1.0, 1.0, 1.0], 0.1: [None, None, 1.0], 1.0: [2.03, 2.03, 2.03]}),
        *of_arm("lost", {0.01: [None, None, None]}),
    ]
    figures = best_rates.read_figures(written(tmp_path, LOSS, runs), LOSS)
    (text,) = best_rates.reach(figures, LOSS, "pre_ln")
    head, _, *rows = text.splitlines()
    assert head == "| eval/test/loss within a share of the best of pre_ln, 2 | 10% | 2% | 5% | 20% |"
    assert rows == [
        "| pre_ln | 1: 0.01 | 1: 0.01 | 1: 0.01 | 1: 0.01 |",
        "| sigma | 2: 0.01 to 0.1 | 1: 0.1 | 2: 0.01 to 0.1 | 3: 0.01 to 1 |",
        "| apart | 2: 0.01, 1 | 2: 0.01, 1 | 2: 0.01, 1 | 2: 0.01, 1 |",
        "| lost | 0 | 0 | 0 | 0 |",
    ]
    with pytest.raises(BadInput, match=r"--reference lost: expected an arm that trained, among pre_ln, sigma"):
        best_rates.reach(figures, LOSS, "lost")
    with pytest.raises(BadInput, match=r"is for losses; more is better of eval/test/accuracy"):
        best_rates.reach(figures, ACCURACY, "pre_ln")


def test_a_sweep_without_rates_and_a_metric_that_no_run_has_are_refused(tmp_path):
    workdir = written(tmp_path, LOSS, of_arm("sigma", {0.1: [5.0]}))
    with pytest.raises(BadInput, match=r"--metric eval/test/wer: the run 0 has eval/test/loss"):
        best_rates.read_figures(workdir, "eval/test/wer")
    record = {"0": {"point": {"arm": "sigma"}, "state": "done"}}
    (tmp_path / "sweep.json").write_text(json.dumps(record))
    with pytest.raises(BadInput, match="its run 0 has no learning_rate"):
        best_rates.read_figures(workdir, LOSS)


def test_the_plot_has_every_seed_and_a_cross_for_a_diverged_one(tmp_path):
    runs = [
        *of_arm("sigma", {0.1: [0.7, 0.72, 0.69], 1.0: [0.9, None, 0.71]}, optimizer="sgd"),
        *of_arm("sigma", {10.0: [0.5]}, optimizer="lars"),
    ]
    figure = best_rates.draw(best_rates.read_figures(written(tmp_path, ACCURACY, runs), ACCURACY), ACCURACY)
    first, second = figure.axes
    drawn = {line.get_marker(): sorted(map(float, line.get_ydata())) for line in first.lines}
    assert drawn["o"] == [0.69, 0.7, 0.71, 0.72, 0.9]
    assert drawn["x"] == [0.0]
    assert (first.get_ylabel(), second.get_ylabel()) == (
        "test/accuracy, optimizer=sgd",
        "test/accuracy, optimizer=lars",
    )
