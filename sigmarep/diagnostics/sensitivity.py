"""Dependence of a sweep's outcome on the learning rate."""

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from sigmarep.diagnostics import curves
from sigmarep.errors import BadInput
from sigmarep.sweeps import finished_runs, short
from sigmarep.training.diagnosis import lowest_entropy

RATE, SEED = "learning_rate", "seed"
# A learning rate trains if its median loss exceeds the best of any arm by at most this share.
WITHIN = 0.1


class RunOutcome(NamedTuple):
    """Outcome of one run.

    Attributes:
      loss: the training loss at the end (`curves.at_end`); ∞ if the run diverged.
      lowest: lowest attention entropy of any layer in nats, over the steps at which it and the loss are finite; NaN
        without one.
      start: the first logged loss; NaN if there is none.
    """

    loss: float
    lowest: float
    start: float = math.nan


class Range(NamedTuple):
    """Neighboring learning rates of a sweep, from `low` to `high`, that all train; `ratio` is high / low."""

    low: float
    high: float
    ratio: float


# Outcomes of all seeds, by arm and learning rate.
Table = dict[str, dict[float, list[RunOutcome]]]


def read_sweep(workdir: str) -> Table:
    """Reads the outcomes of a sweep's runs that are done or diverged, by arm and learning rate.

    The arm of a point consists of its values other than learning rate and seed. Finished runs whose folders no longer
    exist are left out.

    Raises:
      BadInput: the folder has no sweep, or a point has no learning rate.
    """
    outcomes = []
    for name, run in finished_runs(workdir).items():
        if place(run.point) is None:
            raise BadInput(f"--workdir {workdir}: its run {name} has no {RATE} of its own")
        outcomes.append((run.point, outcome(run.rows, diverged=run.state == "diverged")))
    return tabulate(outcomes)


def place(point: Mapping[str, Any]) -> tuple[str, float] | None:
    """Arm and learning rate of a point; None if it has no learning rate, which is a number above 0."""
    try:
        rate = float(short(point)[RATE])
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    return (arm(point), rate) if 0 < rate < math.inf else None


def arm(point: Mapping[str, Any]) -> str:
    """Arm of a point: its values other than learning rate and seed."""
    return ",".join(str(value) for key, value in short(point).items() if key not in (RATE, SEED)) or "all"


def tabulate(outcomes: Sequence[tuple[Mapping[str, Any], RunOutcome]]) -> Table:
    """Groups outcomes by arm and learning rate, both sorted; points without a learning rate are left out."""
    table: Table = {}
    for point, result in outcomes:
        if (where := place(point)) is not None:
            table.setdefault(where[0], {}).setdefault(where[1], []).append(result)
    # Runs end in any order. Sorted, an arm has the same place and the same color in every sweep.
    return {arm: dict(sorted(table[arm].items())) for arm in sorted(table)}


def outcome(rows: Sequence[Mapping[str, Any]], *, diverged: bool) -> RunOutcome:
    """Computes the outcome of a run from its rows of metrics."""
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    loss = math.inf if diverged else curves.at_end(losses)
    return RunOutcome(loss, lowest_entropy(rows), losses[0] if losses else math.nan)


def medians(table: Table) -> dict[str, dict[float, float]]:
    """Median loss over seeds, by arm and learning rate."""
    return {
        arm: {rate: statistics.median(each.loss for each in outcomes) for rate, outcomes in by_rate.items()}
        for arm, by_rate in table.items()
    }


def best_loss(losses: Mapping[str, Mapping[float, float]]) -> float:
    """Lowest median loss of any arm and learning rate; ∞ if there is none."""
    return min((loss for by_rate in losses.values() for loss in by_rate.values()), default=math.inf)


def trained_range(by_rate: Mapping[float, float], best: float, within: float = WITHIN) -> Range | None:
    """Widest range of neighboring learning rates whose loss is at most (1 + within)·best; None if there is none.

    The ends are rates of the sweep: the true range may be wider by up to one step of the sweep on either side.
    """
    widest: Range | None = None
    low = None
    for rate, loss in sorted(by_rate.items()):
        if not loss <= (1 + within) * best < math.inf:
            low = None
            continue
        low = rate if low is None else low
        if widest is None or rate / low > widest.ratio:
            widest = Range(low, rate, rate / low)
    return widest


def sensitivity(by_rate: Mapping[float, Sequence[RunOutcome]]) -> float:
    """Learning-rate sensitivity of one arm in nats (Wortsman et al., 2023); NaN if no run trained.

    This is the mean over learning rates of min(loss, first loss) − the arm's best loss, where losses are medians over
    seeds. The paper averages over an interval of rates; here every rate of the sweep counts once, so the rates should be
    evenly spaced in the logarithm.
    """
    starts = [each.start for outcomes in by_rate.values() for each in outcomes if math.isfinite(each.start)]
    losses = [statistics.median(each.loss for each in outcomes) for outcomes in by_rate.values()]
    if not starts or not math.isfinite(min(losses, default=math.inf)):
        return math.nan
    start = statistics.median(starts)
    return statistics.mean(min(loss, start) for loss in losses) - min(losses)


def findings(table: Table) -> list[dict[str, Any]]:
    """Summarizes each arm in one row.

    Returns:
      For each arm its name `arm`; its best median `loss`, reached at `rate`; `range`, its `trained_range` relative to the
      best loss of any arm, and `own`, relative to its own best loss; `split`, the rates at which some seeds are within
      `WITHIN` of the best of any arm and others are not; its `sensitivity`; and `entropy`, the lowest entropy of its runs
      in `range`, NaN if there are none.
    """
    losses = medians(table)
    best = best_loss(losses)
    rows = []
    for arm, by_rate in losses.items():
        rate = min(by_rate, key=lambda rate: by_rate[rate])
        trained = trained_range(by_rate, best)
        inside = [
            each.lowest
            for tried, outcomes in table[arm].items()
            if trained and trained.low <= tried <= trained.high
            for each in outcomes
        ]
        rows.append(
            {
                "arm": arm,
                "loss": by_rate[rate],
                "rate": rate,
                "range": trained,
                "own": trained_range(by_rate, by_rate[rate]),
                "split": [
                    rate
                    for rate, outcomes in table[arm].items()
                    if len({each.loss <= (1 + WITHIN) * best for each in outcomes}) > 1
                ],
                "sensitivity": sensitivity(table[arm]),
                "entropy": min(filter(math.isfinite, inside), default=math.nan),
            }
        )
    return rows


def in_words(trained: Range | None, tried: Collection[float] = ()) -> str:
    """Describes a range in words, and where it ends only because no rate beyond was among those `tried`."""
    if trained is None:
        return "nowhere"
    if trained.ratio == 1:
        return f"{trained.low:g} alone"
    ends = [
        f"; {rate:g} is the {word} tried"
        for rate, end, word in ((trained.low, min, "lowest"), (trained.high, max, "highest"))
        if tried and rate == end(tried)
    ]
    return f"{trained.low:g} to {trained.high:g} (a factor of {trained.ratio:.3g}{''.join(ends)})"
