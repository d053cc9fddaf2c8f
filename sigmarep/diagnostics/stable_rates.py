"""The highest stable learning rate of every arm against the width of its model.

The definitions are those of docs/experiments.md. A run is stable at a threshold θ if its held-out loss at the end is at
most (1 + θ) times the best of its arm at its width, where the best is the lowest median over seeds of any rate.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sigmarep.diagnostics import plots
from sigmarep.diagnostics.sensitivity import RATE, SEED
from sigmarep.errors import BadInput
from sigmarep.sweeps import finished_runs, short

WIDTH, ARM = "width", "arm"
# Shares by which the loss may exceed the best; the first is the primary one.
THRESHOLDS = (0.1, 0.02, 0.05, 0.2)

# Loss at the end, ∞ if the run diverged, by learning rate.
Losses = dict[float, float]
# Losses by arm, width and seed.
Ladder = dict[str, dict[int, dict[int, Losses]]]


class Edge(NamedTuple):
    """The highest stable learning rate of a seed.

    Attributes:
      rate: where the loss crosses the threshold, interpolated linearly in loss and ln(rate); the highest rate tried if that
        one is stable; NaN if none is stable.
      open: the highest rate tried is stable, so that the true edge is at or above it.
    """

    rate: float
    open: bool


def read_ladder(workdir: str, metric: str) -> tuple[Ladder, float]:
    """Reads a sweep over widths: the loss at the end of every finished run, and the first training loss, the median of all.

    Raises:
      BadInput: the folder has no sweep, or a point lacks arm, width, learning rate or seed.
    """
    ladder: Ladder = {}
    starts = []
    for name, run in finished_runs(workdir).items():
        point = short(run.point)
        try:
            arm, width, seed, rate = str(point[ARM]), int(point[WIDTH]), int(point[SEED]), float(point[RATE])
        except (KeyError, TypeError, ValueError):
            raise BadInput(f"--workdir {workdir}: its run {name} lacks one of {ARM}, {WIDTH}, {RATE}, {SEED}") from None
        starts += [row["train/loss"] for row in run.logged[:1]]
        loss = run.evaluation.get(metric, math.inf)
        of_seed = ladder.setdefault(arm, {}).setdefault(width, {}).setdefault(seed, {})
        of_seed[rate] = loss if math.isfinite(loss) else math.inf
    if not ladder:
        raise BadInput(f"--workdir {workdir}: has no finished run")
    finite = [each for each in starts if math.isfinite(each)]
    ordered = {arm: dict(sorted(by_width.items())) for arm, by_width in sorted(ladder.items())}
    return ordered, statistics.median(finite) if finite else math.inf


def medians(of_seeds: Mapping[int, Losses]) -> Losses:
    """Median loss over seeds by rate, in the order of the rates."""
    rates = sorted({rate for losses in of_seeds.values() for rate in losses})
    return {rate: statistics.median(each[rate] for each in of_seeds.values() if rate in each) for rate in rates}


def best_loss(of_seeds: Mapping[int, Losses]) -> float:
    """Lowest median loss over seeds of any rate."""
    return min(medians(of_seeds).values(), default=math.inf)


def edge(losses: Losses, bound: float, start: float) -> Edge:
    """The highest stable learning rate: the end of the stretch of stable rates around the rate of the lowest loss.

    Args:
      bound: highest loss of a stable run, (1 + θ) times the best.
      start: the loss before training, which stands for a higher one where the crossing is interpolated.
    """
    rates = sorted(losses)
    low = min(rates, key=lambda rate: losses[rate], default=math.nan)
    if not rates or not losses[low] <= bound < math.inf:
        return Edge(math.nan, False)
    for rate in rates[rates.index(low) + 1 :]:
        if not losses[rate] <= bound:
            above = max(min(losses[rate], start), bound)
            part = (bound - losses[low]) / (above - losses[low]) if above > losses[low] else 1.0
            return Edge(low * (rate / low) ** part, False)
        low = rate
    return Edge(low, True)


def edges(of_seeds: Mapping[int, Losses], within: float, start: float, best: float | None = None) -> list[Edge]:
    """The edge of every seed; `best` is `best_loss` if None."""
    bound = (1 + within) * (best_loss(of_seeds) if best is None else best)
    return [edge(losses, bound, start) for _, losses in sorted(of_seeds.items())]


class Exponent(NamedTuple):
    """Slopes of ln(highest stable rate) against ln(width), fitted by least squares to every seed.

    Attributes:
      each: by seed, in the order of the seeds that have an edge at every width.
      open: True if an edge is open: the slope is then that of lower bounds.
    """

    each: list[float]
    open: bool


def exponent(by_width: Mapping[int, Mapping[int, Losses]], within: float, start: float) -> Exponent:
    """Exponent p of the law edge ∝ widthᵖ; without a seed that has two widths or more, `each` is empty."""
    edges_by_width = {width: edges(of_seeds, within, start) for width, of_seeds in by_width.items()}
    count = min(map(len, edges_by_width.values()), default=0)
    slopes = []
    for i in range(count):
        points = [
            (math.log(width), math.log(each[i].rate)) for width, each in edges_by_width.items() if each[i].rate > 0
        ]
        if len(points) == len(edges_by_width) > 1:
            slopes.append(statistics.linear_regression(*zip(*points, strict=True)).slope)
    return Exponent(slopes, any(each.open for of_width in edges_by_width.values() for each in of_width))


def tables(ladder: Ladder, start: float) -> list[str]:
    """Markdown tables: the edges at every threshold, with their exponents; then the best losses and their rates."""
    widths = sorted({width for by_width in ladder.values() for width in by_width})
    head = f"{' | '.join(map(str, widths))} |"
    pieces = []
    for within in THRESHOLDS:
        rows = [f"| highest stable rate, {within:.0%} | {head} exponent |", f"|---{'|---' * len(widths)}|---|"]
        for arm, by_width in ladder.items():
            cells = [
                _edges_in_words(edges(by_width[width], within, start)) if width in by_width else "" for width in widths
            ]
            slope = exponent(by_width, within, start)
            rows.append(f"| {arm} | {' | '.join(cells)} | {_spread(slope.each, '{:.2f}')}{' (open)' * slope.open} |")
        pieces.append("\n".join(rows))
    rows = [f"| best held-out loss, at | {head}", f"|---{'|---' * len(widths)}|"]
    for arm, by_width in ladder.items():
        rows.append(f"| {arm} | {' | '.join(_best(by_width.get(width, {})) for width in widths)} |")
    pieces.append("\n".join(rows))
    return pieces


def _best(of_seeds: Mapping[int, Losses]) -> str:
    by_rate = medians(of_seeds)
    if not by_rate:
        return ""
    rate = min(by_rate, key=lambda rate: by_rate[rate])
    seeds = [losses[rate] for losses in of_seeds.values() if rate in losses]
    return f"{_spread(seeds, '{:.3f}')}, {rate:g}"


def _edges_in_words(each: Sequence[Edge]) -> str:
    known = [one.rate for one in each if not math.isnan(one.rate)]
    if not known:
        return "none"
    lost = f", {len(each) - len(known)} none" if len(known) < len(each) else ""
    return f"{'≥ ' * any(one.open for one in each)}{_spread(known, '{:.2g}')}{lost}"


def _spread(each: Sequence[float], form: str) -> str:
    """Median and range of some numbers."""
    if not each:
        return ""
    middle = form.format(statistics.median(each))
    return f"{middle} ({form.format(min(each))} to {form.format(max(each))})" if len(each) > 1 else middle


def draw(ladder: Ladder, start: float, within: float = THRESHOLDS[0]) -> Any:
    """Draws the highest stable rate and the best loss against the width: every seed, their range, and the median.

    An upward triangle is a seed that is stable at the highest rate tried.
    """
    figure, axes = plots.new_figure([2.4, 1.6], plots.WIDTHS["double"])
    for i, (arm, by_width) in enumerate(ladder.items()):
        style = {"color": plots.PALETTE[i % len(plots.PALETTE)], "linestyle": plots.DASHES[i % len(plots.DASHES)]}
        shift = 1.02 ** (i - (len(ladder) - 1) / 2)
        edges_by_width = {width: edges(of_seeds, within, start) for width, of_seeds in by_width.items()}
        rates = {float(width): [one.rate for one in each if one.rate > 0] for width, each in edges_by_width.items()}
        plots.draw_seeds(axes[0], rates, shift=shift, lost=math.inf, label=plots.plain(arm), **style)
        opened = [(width * shift, one.rate) for width, each in edges_by_width.items() for one in each if one.open]
        axes[0].plot([x for x, _ in opened], [y for _, y in opened], "^", color=style["color"], markersize=5)
        best = {float(width): _at_best(of_seeds) for width, of_seeds in by_width.items()}
        plots.draw_seeds(axes[1], best, shift=shift, lost=math.inf, label=plots.plain(arm), **style)
    axes[0].set(ylabel=f"highest stable rate ({within:.0%})", xscale="log", yscale="log")
    axes[1].set(ylabel="best held-out loss", xlabel="width")
    widths = sorted({width for by_width in ladder.values() for width in by_width})
    axes[1].set_xticks(widths, list(map(str, widths)))
    axes[1].minorticks_off()
    plots.add_legend(axes[0], len(ladder))
    return figure


def _at_best(of_seeds: Mapping[int, Losses]) -> list[float]:
    """Finite losses of all seeds at the rate of the lowest median."""
    by_rate = medians(of_seeds)
    rate = min(by_rate, key=lambda rate: by_rate[rate])
    return [losses[rate] for losses in of_seeds.values() if math.isfinite(losses.get(rate, math.inf))]
