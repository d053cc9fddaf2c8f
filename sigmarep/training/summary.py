"""The result of a run, from the files in its folder."""

import os
from typing import Any

from sigmarep.training.diagnosis import diagnose
from sigmarep.training.metrics import read_metrics
from sigmarep.training.stopped import stopped_early


def summary(folder: str) -> dict[str, Any]:
    """The last evaluation of a run; the lowest layer's attention entropy in nats, with its layer and step, over the steps
    at which loss and attention statistics are finite; the first step at which these statistics are not, if there is one;
    and why the run was stopped early, if it was."""
    rows = read_metrics(os.path.join(folder, "metrics.jsonl"))
    last: dict[str, Any] = {}
    for row in rows:
        last |= {name: value for name, value in row.items() if name.startswith("eval/")}
    diagnosis = diagnose(rows)
    if diagnosis.lowest:
        for name, value in zip(("lowest", "lowest_layer", "lowest_step"), diagnosis.lowest, strict=True):
            last[f"attention/entropy_{name}"] = value
    if diagnosis.nonfinite:
        last["attention/entropy_nonfinite_step"], _ = diagnosis.nonfinite
    if stopped := stopped_early(folder):
        last["stopped_early"] = stopped.reason
    return last
