"""When a run counts as diverged, and what its metrics say about how it came to that."""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sigmarep.errors import Diverged
from sigmarep.training.callbacks import Callback, Run
from sigmarep.training.metrics import FILE, metric_names, read_metrics

PREFIX = "attention/entropy/"
# A layer counts as collapsed below this many nats; the paper's own figures show collapsed layers at 0.02 to 0.1.
COLLAPSED = 0.1


def reason(loss: float, first_loss: float | None, factor: float) -> str | None:
    """Why a loss means divergence, None if it does not.

    Args:
      first_loss: the first logged loss of the run.
      factor: the accepted multiple of it; 0 looks at non-finite losses only.
    """
    if not math.isfinite(loss):
        return f"the loss became {loss}"
    if factor and first_loss is not None and loss > factor * abs(first_loss):
        return f"the loss rose to {loss:.4g}, more than {factor:g} times its start of {first_loss:.4g}"
    return None


def diagnose(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Which layers' attention entropy fell, in the order in which they did.

    Args:
      rows: the metrics of a run, in order.

    Returns:
      `layers`: of each layer the lowest entropy in nats, its step, and the step at which it first fell below
      `COLLAPSED` (None if it never did); `fell`: the collapsed layers, first first; `summary`: one sentence.
    """
    layers: dict[str, dict[str, Any]] = {}
    for name in metric_names(rows):
        if not name.startswith(PREFIX):
            continue
        found = [(row[name], row["step"]) for row in rows if math.isfinite(row.get(name, math.nan))]
        if found:
            lowest, step = min(found)
            collapsed = next((step for value, step in found if value < COLLAPSED), None)
            layers[name.removeprefix(PREFIX)] = {"lowest": lowest, "lowest_step": step, "collapsed_step": collapsed}
    fell = sorted(
        (name for name, layer in layers.items() if layer["collapsed_step"] is not None),
        key=lambda name: layers[name]["collapsed_step"],
    )
    return {"layers": layers, "fell": fell, "summary": _summary(layers, fell)}


def _summary(layers, fell) -> str:
    if not layers:
        return "no attention entropy was recorded"
    lowest = min(layers, key=lambda name: layers[name]["lowest"])
    value, step = layers[lowest]["lowest"], layers[lowest]["lowest_step"]
    if not fell:
        return (
            f"no attention entropy fell below {COLLAPSED} nats: the lowest was {value:.3g} in {lowest} at step {step}"
        )
    first = fell[0]
    return (
        f"the attention entropy of {first} fell first, below {COLLAPSED} nats by step "
        f"{layers[first]['collapsed_step']}; {len(fell)} of {len(layers)} layers did; "
        f"the lowest was {value:.3g} nats in {lowest} at step {step}"
    )


def write_diagnosis(workdir: str, step: int, why: str, rows: Sequence[dict[str, Any]]) -> str:
    """Writes `diagnosis.json` into the workdir and returns its message."""
    found = diagnose([row for row in rows if row["step"] <= step])
    message = f"diverged at step {step}: {why}; {found['summary']}"
    with open(os.path.join(workdir, "diagnosis.json"), "w") as file:
        json.dump({"step": step, "reason": why, "message": message, **found}, file, indent=2)
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
        loss = metrics["train/loss"]
        self.check(step, loss)
        self.first_loss = loss if self.first_loss is None else self.first_loss

    def check(self, step: int, loss: float) -> None:
        """Raises Diverged if `loss` says so."""
        why = reason(loss, self.first_loss, self._factor)
        if why is None:
            return
        message = write_diagnosis(self._workdir, step, why, read_metrics(os.path.join(self._workdir, FILE)))
        steps = self._checkpoints()
        raise Diverged(f"{message}; last finite checkpoint: {f'step {steps[-1]}' if steps else 'none'}")
