"""The highest stable rate against the width, on ladders whose answers are known by hand."""

import json
import math

import pytest

from sigmarep.diagnostics import plots, stable_rates
from sigmarep.diagnostics.stable_rates import Edge, edge
from sigmarep.errors import BadInput


@pytest.mark.parametrize(
    ("losses", "bound", "rate", "is_open"),
    [
        # The loss crosses 1.5 halfway from 1 to 2: the geometric mean of the rates.
        ({0.01: 1.0, 1.0: 2.0}, 1.5, 0.1, False),
        # A loss above the start counts as the start, 5: an eighth of the way.
        ({0.01: 1.0, 1.0: math.inf}, 1.5, 0.01 * 100 ** (0.5 / 4), False),
        ({0.01: 1.0, 1.0: 1.5}, 1.5, 1.0, True),
        # A rate that is stable by luck behind one that is not does not count.
        ({0.001: 1.0, 0.01: 1.0, 0.1: 3.0, 1.0: 1.1}, 2.0, 0.01 * math.sqrt(10), False),
        # Lower rates that have not learned enough yet do not end the stretch.
        ({0.001: 4.0, 0.01: 1.0}, 1.5, 0.01, True),
    ],
)
def test_the_edge_is_where_the_loss_crosses_the_bound(losses, bound, rate, is_open):
    result = edge(losses, bound, 5.0)
    assert result.rate == pytest.approx(rate)
    assert result.open == is_open


def test_a_seed_that_is_never_stable_has_no_edge():
    for losses in ({0.1: 3.0}, {0.1: math.inf}, {}):
        result = edge(losses, 2.0, 5.0)
        assert math.isnan(result.rate)
        assert not result.open


def of_power(power, widths=(32, 128), seeds=(0, 1), ratio=1.0):
    """A ladder's arm whose loss rises as the square of rate · width^−power, seeds apart by `ratio` in the rate."""
    rates = [10.0 ** (i / 4 - 4) for i in range(25)]
    return {
        width: {
            seed: {rate: 1 + (rate / 0.05 * ratio**seed * (width / 32) ** -power) ** 2 for rate in rates}
            for seed in seeds
        }
        for width in widths
    }


@pytest.mark.parametrize("power", [-1.0, -0.5, 0.0])
def test_the_exponent_is_that_of_the_law_at_every_threshold(power):
    for within in stable_rates.THRESHOLDS:
        slope = stable_rates.exponent(of_power(power, widths=(32, 64, 128)), within, 5.0)
        assert slope.each == pytest.approx([power, power], abs=0.06)
        assert not slope.open


def test_thresholds_are_measured_from_the_arms_own_best_median_over_seeds():
    of_seeds = {0: {0.1: 1.0, 1.0: 9.0}, 1: {0.1: 3.0, 1.0: 9.0}, 2: {0.1: 2.0, 1.0: 9.0}}
    assert stable_rates.best_loss(of_seeds) == 2.0
    # 2.2 is the bound: of seed 1 no rate is stable.
    first, second, third = stable_rates.edges(of_seeds, 0.1, 9.0)
    assert math.isnan(second.rate)
    assert first.rate == pytest.approx(0.1 * 10 ** (1.2 / 8))
    assert third.rate == pytest.approx(0.1 * 10 ** (0.2 / 7))
    assert stable_rates.edges(of_seeds, 0.1, 9.0, best=9.0) == [Edge(1.0, True)] * 3


def written(tmp_path, runs):
    record = {}
    for number, (point, state, loss) in enumerate(runs):
        folder = tmp_path / str(number)
        folder.mkdir()
        rows = [{"step": 1, "train/loss": 5.5}, {"step": 9, "train/loss": 1.0, "eval/test/loss": loss}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        record[str(number)] = {"point": point, "state": state}
    (tmp_path / "sweep.json").write_text(json.dumps(record))
    return str(tmp_path)


def test_a_sweep_becomes_tables_and_a_picture_with_every_seed(tmp_path):
    runs = []
    for arm, top in (("plain", 3.0), ("sigma", 1.05)):
        for width in (32, 64):
            for seed in (0, 1):
                for rate, loss in ((0.01, 1.0), (0.1, top)):
                    point = {"arm": arm, "width": width, "learning_rate": rate, "config.seed": seed}
                    runs.append((point, "done", loss))
    runs[3] = (runs[3][0], "diverged", 1.0)
    ladder, start = stable_rates.read_ladder(written(tmp_path, runs), "eval/test/loss")
    assert start == 5.5
    assert ladder["plain"][32] == {0: {0.01: 1.0, 0.1: 3.0}, 1: {0.01: 1.0, 0.1: math.inf}}
    first, *_, last = stable_rates.tables(ladder, start)
    # 10 % of the way from 1 to 3, and from 1 to the start.
    assert "| plain | 0.011 (0.011 to 0.011) | 0.011 (0.011 to 0.011) |" in first
    assert "| sigma | ≥ 0.1 (0.1 to 0.1) | ≥ 0.1 (0.1 to 0.1) | 0.00 (0.00 to 0.00) (open) |" in first
    assert "| plain | 1.000 (1.000 to 1.000), 0.01 | 1.000 (1.000 to 1.000), 0.01 |" in last
    picture = plots.rendered(stable_rates.draw(ladder, start), "svg")
    assert picture.count(b"<svg") == 1
    assert b"plain" in picture


def test_what_is_refused(tmp_path):
    with pytest.raises(BadInput, match="holds no sweep"):
        stable_rates.read_ladder(str(tmp_path), "eval/test/loss")
    folder = written(tmp_path, [({"arm": "a", "learning_rate": 0.1, "config.seed": 0}, "done", 1.0)])
    with pytest.raises(BadInput, match="its run 0 lacks one of arm, width, learning_rate, seed"):
        stable_rates.read_ladder(folder, "eval/test/loss")
