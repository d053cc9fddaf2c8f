"""How much the outcome of a sweep depends on the learning rate."""

import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sigmarep.errors import BadInput
from sigmarep.sweeps import read_record
from sigmarep.training.metrics import read_metrics

RATE, SEED = "learning_rate", "seed"
# A learning rate trains if its median loss is at most so much above the best of any arm.
WITHIN = 0.1


class Outcome(NamedTuple):
    """Of one run: `loss`, the mean of the last tenth of the logged training losses, ∞ if it diverged; `lowest`, the lowest
    layer's attention entropy of the run in nats, NaN if none was recorded; `start`, the first logged loss, NaN without."""

    loss: float
    lowest: float
    start: float = math.nan


class Range(NamedTuple):
    """The learning rates from `low` to `high`, next to each other in the sweep, that train; `ratio` is high / low."""

    low: float
    high: float
    ratio: float


Table = dict[str, dict[float, list[Outcome]]]


def read_sweep(workdir: str) -> Table:
    """The outcomes of the runs of a sweep that are done or diverged, by arm and learning rate. An arm is what differs
    between points apart from the learning rate and the seed. Runs that are done and whose folders are gone are left out.

    Raises:
      BadInput: the folder holds no sweep, or a point has no learning rate.
    """
    record = read_record(workdir)
    if not record:
        raise BadInput(f"--workdir {workdir}: holds no sweep (there is no sweep.json, or nothing in it)")
    outcomes = []
    for name, run in record.items():
        if place(run["point"]) is None:
            raise BadInput(f"--workdir {workdir}: its run {name} has no {RATE} of its own")
        rows = _rows(os.path.join(workdir, name)) if run["state"] in ("done", "diverged") else []
        if rows or run["state"] == "diverged":
            outcomes.append((run["point"], outcome(rows, diverged=run["state"] == "diverged")))
    return tabulate(outcomes)


def place(point: Mapping[str, Any]) -> tuple[str, float] | None:
    """The arm and the learning rate of a point; None if it has no learning rate."""
    short = {key.rsplit(".", 1)[-1]: value for key, value in point.items()}
    if RATE not in short:
        return None
    return ",".join(str(value) for key, value in short.items() if key not in (RATE, SEED)) or "all", float(short[RATE])


def tabulate(outcomes: Sequence[tuple[Mapping[str, Any], Outcome]]) -> Table:
    """Outcomes by arm, in the order of their names, and rising learning rate; those of points without one are left out."""
    table: Table = {}
    for point, found in outcomes:
        if (where := place(point)) is not None:
            table.setdefault(where[0], {}).setdefault(where[1], []).append(found)
    # Runs end in any order; an arm has the same place, and the same colour, in every sweep.
    return {arm: dict(sorted(table[arm].items())) for arm in sorted(table)}


def _rows(folder: str) -> list[dict[str, Any]]:
    try:
        return read_metrics(os.path.join(folder, "metrics.jsonl"))
    except (OSError, json.JSONDecodeError) as error:
        raise BadInput(f"{folder}/metrics.jsonl: cannot be read ({error})") from None


def outcome(rows: Sequence[Mapping[str, Any]], *, diverged: bool) -> Outcome:
    """See `Outcome`."""
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    lowest = min((row["attention/entropy_min"] for row in rows if "attention/entropy_min" in row), default=math.nan)
    last = losses[-max(len(losses) // 10, 1) :]
    loss = math.inf if diverged or not last or not all(map(math.isfinite, last)) else statistics.mean(last)
    return Outcome(loss, lowest, losses[0] if losses else math.nan)


def medians(table: Table) -> dict[str, dict[float, float]]:
    """The median loss over seeds, by arm and learning rate."""
    return {
        arm: {rate: statistics.median(each.loss for each in outcomes) for rate, outcomes in by_rate.items()}
        for arm, by_rate in table.items()
    }


def best_loss(losses: Mapping[str, Mapping[float, float]]) -> float:
    """The lowest median loss of any arm and learning rate, ∞ of none."""
    return min((loss for by_rate in losses.values() for loss in by_rate.values()), default=math.inf)


def trained_range(by_rate: Mapping[float, float], best: float, within: float = WITHIN) -> Range | None:
    """The widest stretch of neighbouring learning rates whose loss is at most (1 + within)·best; None if there is none.

    A range's ends are rates that were tried: the true one may be wider by up to a step of the sweep on either side.
    """
    found: Range | None = None
    low = None
    for rate, loss in sorted(by_rate.items()):
        if not loss <= (1 + within) * best < math.inf:
            low = None
            continue
        low = rate if low is None else low
        if found is None or rate / low > found.ratio:
            found = Range(low, rate, rate / low)
    return found


def sensitivity(by_rate: Mapping[float, Sequence[Outcome]]) -> float:
    """Learning-rate sensitivity of one arm (Wortsman et al., 2023): the mean over the rates that were tried of
    min(loss, loss at the start) − the arm's best loss, of medians over seeds, in nats.

    They take the mean over a range of rates; here a rate counts as often as it was tried, so the rates should be evenly
    spaced in the logarithm. NaN if no run trained.
    """
    starts = [each.start for outcomes in by_rate.values() for each in outcomes if math.isfinite(each.start)]
    losses = [statistics.median(each.loss for each in outcomes) for outcomes in by_rate.values()]
    if not starts or not math.isfinite(min(losses, default=math.inf)):
        return math.nan
    start = statistics.median(starts)
    return statistics.mean(min(loss, start) for loss in losses) - min(losses)


def findings(table: Table) -> list[dict[str, Any]]:
    """One row for each arm: its `arm`, its best median loss (`loss`, at `rate`), its `range` against the best of any arm,
    its `own` against its best, its `sensitivity`, and the lowest `entropy` of its runs in `range`, NaN without one."""
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
            {
                "arm": arm,
                "loss": by_rate[rate],
                "rate": rate,
                "range": found,
                "own": trained_range(by_rate, by_rate[rate]),
                "sensitivity": sensitivity(table[arm]),
                "entropy": min(inside, default=math.nan),
            }
        )
    return rows


def said(found: Range | None) -> str:
    """A range in words."""
    if found is None:
        return "nowhere"
    return f"{found.low:g} alone" if found.ratio == 1 else f"{found.low:g} to {found.high:g} ({found.ratio:.3g} times)"
