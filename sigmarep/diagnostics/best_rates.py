"""A sweep's held-out figure by arm and learning rate, every seed, and each arm's best rate.

The best rate of an arm is that of the best median over seeds; a run that diverged counts as worse than any other.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from sigmarep.diagnostics import plots
from sigmarep.errors import BadInput
from sigmarep.sweeps import finished_runs, short

ARM, RATE, SEED = "arm", "learning_rate", "seed"
# Ends of the names of metrics of which more is better; of all others less is.
HIGHER_IS_BETTER = ("accuracy", "bleu")
# Shares by which a loss may be above a reference; the first is the primary one (docs/experiments.md).
THRESHOLDS = (0.1, 0.02, 0.05, 0.2)
NAN = math.nan

# Figures of all seeds, NaN for a run that diverged, by setting ("optimizer=lars"), by arm and by learning rate.
Figures = dict[str, dict[str, dict[float, list[float]]]]


def read_figures(workdir: str, metric: str) -> Figures:
    """Reads a sweep over arms and rates; a setting has a point's other values, but the seed and those all points share.

    Raises:
      BadInput: the folder has no sweep, a point has no arm or no rate, or a run that ended has no such metric.
    """
    outcomes = finished_runs(workdir)
    points = {name: short(run.point) for name, run in outcomes.items()}
    values: dict[str, set[str]] = {}
    for name, point in points.items():
        for key in (ARM, RATE):
            if key not in point:
                raise BadInput(f"--workdir {workdir}: its run {name} has no {key}")
        for key, value in point.items():
            values.setdefault(key, set()).add(str(value))
    varying = [key for key, each in values.items() if len(each) > 1 and key not in (ARM, RATE, SEED)]
    figures: Figures = {}
    # Runs that were made together, or again, are not recorded in the order of their seeds.
    for name, point in sorted(points.items(), key=lambda item: int(item[1].get(SEED, 0))):
        run = outcomes[name]
        if run.state != "diverged" and metric not in run.evaluation:
            raise BadInput(f"--metric {metric}: the run {name} has {', '.join(run.evaluation) or 'no evaluation'}")
        setting = ", ".join(f"{key}={point[key]}" for key in varying if key in point)
        by_rate = figures.setdefault(setting, {}).setdefault(str(point[ARM]), {})
        by_rate.setdefault(float(point[RATE]), []).append(float(run.evaluation.get(metric, NAN)))
    return figures


def best_rate(by_rate: Mapping[float, Sequence[float]], metric: str) -> float:
    """The rate of the best median over seeds, NaN if there is none."""
    medians = {rate: median(seeds, metric) for rate, seeds in by_rate.items()}
    finite = {rate: each for rate, each in medians.items() if math.isfinite(each)}
    choose = max if _higher(metric) else min
    return choose(finite, key=finite.__getitem__) if finite else NAN


def median(seeds: Sequence[float], metric: str) -> float:
    """Median over seeds, where a run that diverged is the worst; NaN if such a run is the median."""
    worst = -math.inf if _higher(metric) else math.inf
    middle = statistics.median(worst if math.isnan(each) else each for each in seeds)
    return middle if math.isfinite(middle) else NAN


def tables(figures: Figures, metric: str) -> list[str]:
    """A Markdown table for each setting: every arm's best rate, the median and all seeds there, and all seeds at every
    rate."""
    texts = []
    for setting, by_arm in figures.items():
        rates = sorted({rate for by_rate in by_arm.values() for rate in by_rate})
        title = f"{metric} ({setting})" if setting else metric
        rows = [
            f"| {title} | best rate | median there | {' | '.join(f'{rate:g}' for rate in rates)} |",
            f"|---{'|---' * (len(rates) + 2)}|",
        ]
        for arm, by_rate in by_arm.items():
            best = best_rate(by_rate, metric)
            cells = [", ".join(map(_figure, by_rate.get(rate, []))) for rate in rates]
            chosen = "none | " if math.isnan(best) else f"{best:g} | {median(by_rate[best], metric):.4g}"
            rows.append(f"| {arm} | {chosen} | {' | '.join(cells)} |")
        texts.append("\n".join(rows))
    return texts


def reach(figures: Figures, metric: str, reference: str) -> list[str]:
    """A Markdown table for each setting: the rates at which an arm is as good as another arm at its best.

    Args:
      reference: that arm. A rate counts if the arm's median there is at most (1 + θ) times the reference's best median, for
        the four θ of `THRESHOLDS`. Given are how many rates count, and behind them which; where they are no neighbors,
        all of them.

    Raises:
      BadInput: more is better of the metric, or the reference has trained nowhere.
    """
    if _higher(metric):
        raise BadInput(f"--reference {reference}: is for losses; more is better of {metric}")
    texts = []
    for setting, by_arm in figures.items():
        if math.isnan(best := best_rate(by_arm.get(reference, {}), metric)):
            raise BadInput(f"--reference {reference}: expected an arm that trained, among {', '.join(by_arm)}")
        goal = median(by_arm[reference][best], metric)
        rates = sorted({rate for by_rate in by_arm.values() for rate in by_rate})
        title = f"{metric} within a share of the best of {reference}, {goal:.4g}" + (f" ({setting})" if setting else "")
        rows = [f"| {title} | {' | '.join(f'{share:.0%}' for share in THRESHOLDS)} |", "|---|---|---|---|---|"]
        for arm, by_rate in by_arm.items():
            medians = {rate: median(by_rate[rate], metric) for rate in rates if by_rate.get(rate)}
            good = [[rate for rate, each in medians.items() if each <= (1 + share) * goal] for share in THRESHOLDS]
            rows.append(f"| {arm} | {' | '.join(_reached(each, rates) for each in good)} |")
        texts.append("\n".join(rows))
    return texts


def draw(figures: Figures, metric: str) -> Any:
    """Draws the figure of every arm against the learning rate, a panel for each setting: all seeds, range, median.

    A cross at the edge is a run that diverged.
    """
    figure, axes = plots.new_figure([2.2] * len(figures), plots.WIDTHS["double"])
    for panel, (setting, by_arm) in zip(axes, figures.items(), strict=True):
        finite = [each for by_rate in by_arm.values() for seeds in by_rate.values() for each in seeds if each == each]
        edge = 0.0 if _higher(metric) else 1.1 * max(finite, default=1.0)
        for i, (arm, by_rate) in enumerate(by_arm.items()):
            color, dash = (kinds[i % len(kinds)] for kinds in (plots.PALETTE, plots.DASHES))
            shift = 1.04 ** (i - (len(by_arm) - 1) / 2)
            shown = {rate: [edge if each != each else each for each in by_rate[rate]] for rate in sorted(by_rate)}
            plots.draw_seeds(panel, shown, shift=shift, lost=edge, label=plots.plain(arm), color=color, linestyle=dash)
        panel.set(ylabel=plots.plain(f"{metric.removeprefix('eval/')}, {setting}".rstrip(", ")), xscale="log")
        plots.add_legend(panel, len(by_arm))
    rates = sorted({rate for by_arm in figures.values() for by_rate in by_arm.values() for rate in by_rate})
    axes[-1].set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes[-1].minorticks_off()
    axes[-1].set(xlabel="learning rate")
    return figure


def _reached(good: Sequence[float], rates: Sequence[float]) -> str:
    if not good:
        return "0"
    places = [rates.index(rate) for rate in good]
    neighbors = places == list(range(places[0], places[-1] + 1))
    if neighbors and len(good) > 1:
        return f"{len(good)}: {good[0]:g} to {good[-1]:g}"
    return f"{len(good)}: {', '.join(f'{rate:g}' for rate in good)}"


def _higher(metric: str) -> bool:
    return metric.endswith(HIGHER_IS_BETTER)


def _figure(value: float) -> str:
    return "diverged" if math.isnan(value) else f"{value:.4g}"
