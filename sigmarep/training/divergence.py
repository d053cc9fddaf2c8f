"""The end of a run that diverged, and its `diagnosis.json`."""

import contextlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from sigmarep.errors import Diverged
from sigmarep.files import write_atomically
from sigmarep.training.callbacks import Callback, Run
from sigmarep.training.diagnosis import CAUSES, diagnose, divergence_reason
from sigmarep.training.metrics import FILE, read_metrics

DIAGNOSIS = "diagnosis.json"
# A checkpoint is good if the next step's loss is at most this multiple of that after the checkpoint before: losses of
# single batches, so that the mean over a test split stays within twice the one before.
ACCEPTED_RISE = 1.5
# Multiple of the first loss that no good checkpoint exceeds where `config.divergence_factor` sets none.
ACCEPTED_LOSS = 3.0


class GoodCheckpoints:
    """Tells good checkpoints by the loss of the step after each, the first to be computed with its parameters.

    Args:
      factor: `config.divergence_factor`.
      state: `state_dict` of the start before.

    Attributes:
      step: of the last good checkpoint, None before there is one; 0 for the initial parameters.
    """

    def __init__(self, factor: float, state: Mapping[str, Any] | None = None):
        self._factor = factor or ACCEPTED_LOSS
        self._state = {"step": None, "first_loss": None, "last_loss": None, **(state or {})}

    @property
    def step(self) -> int | None:
        return self._state["step"]

    def judge(self, step: int, loss: float) -> None:
        """Notes whether the checkpoint of `step` is good, from the loss of step + 1."""
        if not math.isfinite(loss):
            return
        first, last = (self._state[name] for name in ("first_loss", "last_loss"))
        rises = last is not None and loss > last + (ACCEPTED_RISE - 1) * abs(last)
        if not rises and divergence_reason(loss, first, self._factor) is None:
            self._state["step"] = step
        self._state["first_loss"] = loss if first is None else first
        self._state["last_loss"] = loss

    def state_dict(self) -> dict[str, Any]:
        return dict(self._state)


def nan_loss(metrics: Mapping[str, float]) -> str | None:
    """Name of the first loss of an evaluation that is NaN."""
    return next((name for name, value in metrics.items() if name.endswith("/loss") and math.isnan(value)), None)


def write_diagnosis(workdir: str, why: str, rows: Sequence[Mapping[str, Any]], *, factor: float) -> str:
    """Writes `diagnosis.json` into the workdir and returns its message.

    Args:
      why: the reason for which the last row's loss means divergence.
      rows: the metrics of the run.
      factor: `config.divergence_factor`.
    """
    diagnosis = diagnose(rows, factor=factor)
    step = rows[-1]["step"]
    # A file that lost its first row may know another first loss than the run.
    cause = diagnosis.cause or "unknown"
    explanation = diagnosis.explanation or CAUSES[cause]
    message = f"diverged at step {step}: {why}; cause: {cause}; {explanation}"
    content = {
        "step": step,
        "reason": why,
        "cause": cause,
        "explanation": explanation,
        "message": message,
        "healthy_step": diagnosis.healthy_step,
        "broken_step": diagnosis.broken_step,
        "collapsed": [name for name, _ in diagnosis.collapsed],
        "layers": {name: layer._asdict() for name, layer in diagnosis.layers.items()},
    }
    write_atomically(os.path.join(workdir, DIAGNOSIS), json.dumps(content, indent=2, allow_nan=False))
    return message


class DivergenceCheck(Callback):
    """Ends the run as diverged where a logged loss says so, with the diagnosis written.

    Args:
      workdir: of the run.
      factor: `config.divergence_factor`.
      last_good: the step of the last good checkpoint, 0 for the initial parameters, None for none.
      first_loss: the run's first logged loss, None before there is one.
    """

    def __init__(self, workdir: str, factor: float, last_good: Callable[[], int | None], *, first_loss: float | None):
        self._workdir, self._factor, self._last_good = workdir, factor, last_good
        self.first_loss = first_loss

    def on_start(self, run: Run) -> None:
        """Removes the diagnosis of an earlier start: a run that goes on has not diverged yet."""
        if jax.process_index() == 0:
            # A folder of this name is not its own.
            with contextlib.suppress(FileNotFoundError, IsADirectoryError, PermissionError):
                os.remove(os.path.join(self._workdir, DIAGNOSIS))

    def on_log(self, run: Run, step: int, metrics: Mapping[str, float]) -> None:
        """Raises Diverged if the loss says so."""
        loss = metrics["train/loss"]
        if why := self.reason(loss):
            # Of several processes one writes the file; its last row may not be visible to the others yet.
            rows = [row for row in read_metrics(os.path.join(self._workdir, FILE)) if row["step"] < step]
            message = write_diagnosis(self._workdir, why, [*rows, {"step": step, **metrics}], factor=self._factor)
            raise Diverged(f"{message}; {self._checkpoint()}")
        self.first_loss = loss if self.first_loss is None else self.first_loss

    def on_evaluation(self, run: Run, step: int, metrics: Mapping[str, float]) -> None:
        """Raises Diverged if a loss of the evaluation is NaN."""
        if name := nan_loss(metrics):
            rows = [row for row in read_metrics(os.path.join(self._workdir, FILE)) if row["step"] <= step]
            why = f"{name} is nan after its update"
            message = write_diagnosis(self._workdir, why, [*rows, {"step": step}], factor=self._factor)
            raise Diverged(f"{message}; {self._checkpoint()}")

    def _checkpoint(self) -> str:
        step = self._last_good()
        return f"last good checkpoint: {'none' if step is None else f'step {step}'}"

    def reason(self, loss: float) -> str | None:
        """Reason for which this loss means divergence, None if it does not."""
        return divergence_reason(loss, self.first_loss, self._factor)
