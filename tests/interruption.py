"""A run that is interrupted and resumed, for the tests of every task."""

import pytest

from sigmarep.training import loop, train_and_evaluate
from sigmarep.training.metrics import read_metrics


class Crash(Exception):
    """Interrupts the run."""


def run_whole_and_in_parts(config, folder, *, crash_at):
    """Metrics, without speeds, of two runs of `config`: one uninterrupted, and one that crashed when it was about to log
    step `crash_at` and was started again.
    """
    train_and_evaluate(config, str(folder / "whole"))
    log = loop._Run.log

    def crash(self):
        if self.unlogged is not None and self.unlogged[0] == crash_at:
            self.checkpoints.wait()
            raise Crash
        log(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Run, "log", crash)
        with pytest.raises(Crash):
            train_and_evaluate(config, str(folder / "parts"))
    train_and_evaluate(config, str(folder / "parts"))
    return [_without_speed(read_metrics(str(folder / name / "metrics.jsonl"))) for name in ("whole", "parts")]


def _without_speed(rows):
    return [{name: value for name, value in row.items() if not name.endswith("_per_second")} for row in rows]
