"""How much the outcome of a sweep depends on the learning rate."""

import json
import math
import os
import statistics
from collections.abc import Mapping
from typing import Any, NamedTuple

from sigmarep.errors import BadInput
from sigmarep.sweeps import read_record
from sigmarep.training.metrics import read_metrics

RATE, SEED = "learning_rate", "seed"
# A learning rate trains if its median loss is at most so much above the best of any arm.
WITHIN = 0.1


class Outcome(NamedTuple):
    """Of one run: `loss`, the mean of the last tenth of the logged training losses, ∞ if it diverged; `lowest`, the lowest
    layer's attention entropy of the run in nats, NaN if none was recorded."""

    loss: float
    lowest: float


class Range(NamedTuple):
    """The learning rates from `low` to `high`, next to each other in the sweep, that train; `ratio` is high / low."""

    low: float
    high: float
    ratio: float


Table = dict[str, dict[float, list[Outcome]]]


def read_sweep(workdir: str) -> Table:
    """The outcomes of the runs of a sweep that are done or diverged, by arm and learning rate. An arm is what differs
    between points apart from the learning rate and the seed.

    Raises:
      BadInput: the folder holds no sweep, or a point has no learning rate.
    """
    record = read_record(workdir)
    if not record:
        raise BadInput(f"--workdir {workdir}: holds no sweep (there is no sweep.json, or nothing in it)")
    table: Table = {}
    for name, run in record.items():
        point = {key.rsplit(".", 1)[-1]: value for key, value in run["point"].items()}
        if RATE not in point:
            raise BadInput(f"--workdir {workdir}: its run {name} has no {RATE} of its own")
        if run["state"] in ("done", "diverged"):
            arm = ",".join(str(value) for key, value in point.items() if key not in (RATE, SEED)) or "all"
            outcomes = table.setdefault(arm, {}).setdefault(float(point[RATE]), [])
            outcomes.append(outcome(os.path.join(workdir, name), diverged=run["state"] == "diverged"))
    return {arm: dict(sorted(by_rate.items())) for arm, by_rate in table.items()}


def outcome(folder: str, *, diverged: bool) -> Outcome:
    """See `Outcome`."""
    try:
        rows = read_metrics(os.path.join(folder, "metrics.jsonl"))
    except (OSError, json.JSONDecodeError) as error:
        raise BadInput(f"{folder}/metrics.jsonl: cannot be read ({error})") from None
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    lowest = min((row["attention/entropy_min"] for row in rows if "attention/entropy_min" in row), default=math.nan)
    last = losses[-max(len(losses) // 10, 1) :]
    loss = math.inf if diverged or not last or not all(map(math.isfinite, last)) else statistics.mean(last)
    return Outcome(loss, lowest)


def medians(table: Table) -> dict[str, dict[float, float]]:
    """The median loss over seeds, by arm and learning rate."""
    return {
        arm: {rate: statistics.median(each.loss for each in outcomes) for rate, outcomes in by_rate.items()}
        for arm, by_rate in table.items()
    }


def best_loss(losses: Mapping[str, Mapping[float, float]]) -> float:
    """The lowest median loss of any arm and learning rate."""
    return min(loss for by_rate in losses.values() for loss in by_rate.values())


def trained_range(by_rate: Mapping[float, float], best: float, within: float = WITHIN) -> Range | None:
    """The widest stretch of neighbouring learning rates whose loss is at most (1 + within)·best; None if there is none.

    A range's ends are rates that were tried: the true one may be wider by up to a step of the sweep on either side.
    """
    found: Range | None = None
    low = None
    for rate, loss in sorted(by_rate.items()):
        if loss > (1 + within) * best:
            low = None
            continue
        low = rate if low is None else low
        if found is None or rate / low > found.ratio:
            found = Range(low, rate, rate / low)
    return found


def findings(table: Table) -> list[dict[str, Any]]:
    """One row for each arm: its `arm`, its best median loss (`loss`, at `rate`), its `range`, and the lowest `entropy` of
    its runs within that range, NaN without one."""
    losses = medians(table)
    best = best_loss(losses)
    rows = []
    for arm, by_rate in losses.items():
        rate = min(by_rate, key=lambda rate: by_rate[rate])
        found = trained_range(by_rate, best)
        inside = [
            each.lowest
            for tried, outcomes in table[arm].items()
            if found and found.low <= tried <= found.high
            for each in outcomes
        ]
        rows.append(
            {"arm": arm, "loss": by_rate[rate], "rate": rate, "range": found, "entropy": min(inside, default=math.nan)}
        )
    return rows
