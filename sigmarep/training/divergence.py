"""The end of a run that diverged, and its `diagnosis.json`."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sigmarep.errors import Diverged
from sigmarep.files import write_atomically
from sigmarep.training.callbacks import Callback, Run
from sigmarep.training.diagnosis import CAUSES, diagnose, divergence_reason
from sigmarep.training.metrics import FILE, read_metrics


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
    write_atomically(os.path.join(workdir, "diagnosis.json"), json.dumps(content, indent=2, allow_nan=False))
    return message


class DivergenceCheck(Callback):
    """Ends the run as diverged where a logged loss says so, with the diagnosis written.

    Args:
      workdir: of the run.
      factor: `config.divergence_factor`.
      checkpoints: the steps that have one, oldest first.
      first_loss: the run's first logged loss, None before there is one.
    """

    def __init__(
        self, workdir: str, factor: float, checkpoints: Callable[[], Sequence[int]], *, first_loss: float | None
    ):
        self._workdir, self._factor, self._checkpoints = workdir, factor, checkpoints
        self.first_loss = first_loss

    def on_log(self, run: Run, step: int, metrics: Mapping[str, float]) -> None:
        """Raises Diverged if the loss says so."""
        loss = metrics["train/loss"]
        if why := self.reason(loss):
            # Of several processes one writes the file; its last row may not be visible to the others yet.
            rows = [row for row in read_metrics(os.path.join(self._workdir, FILE)) if row["step"] < step]
            message = write_diagnosis(self._workdir, why, [*rows, {"step": step, **metrics}], factor=self._factor)
            steps = self._checkpoints()
            raise Diverged(f"{message}; last finite checkpoint: {f'step {steps[-1]}' if steps else 'none'}")
        self.first_loss = loss if self.first_loss is None else self.first_loss

    def reason(self, loss: float) -> str | None:
        """Reason for which this loss means divergence, None if it does not."""
        return divergence_reason(loss, self.first_loss, self._factor)
