"""The settings that an arm survives: test accuracy of every seed by setting, and the runs that failed.

The definitions are those of docs/experiments.md: a run fails at a threshold if it diverged, or if its test accuracy at the
end is below the threshold.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from sigmarep.diagnostics import plots
from sigmarep.errors import BadInput
from sigmarep.sweeps import Outcome, finished_runs, short
from sigmarep.training.diagnosis import lowest_entropy

ARM, SEED = "arm", "seed"
# Test accuracies; the first is the primary one.
THRESHOLDS = (0.5, 0.2, 0.7, 0.8)

# Outcomes of all seeds, by arm and by setting: a text such as "batch_size=512, warmup_epochs=0".
Grid = dict[str, dict[str, list[Outcome]]]


def read_grid(workdir: str) -> Grid:
    """Reads a sweep over settings; a setting is a point's values but arm, seed, and those that all points share.

    Raises:
      BadInput: the folder has no sweep, or a point has no arm.
    """
    outcomes = finished_runs(workdir)
    points = {name: short(run.point) for name, run in outcomes.items()}
    seen: dict[str, set[str]] = {}
    for name, point in points.items():
        if ARM not in point:
            raise BadInput(f"--workdir {workdir}: its run {name} has no {ARM}")
        for key, value in point.items():
            seen.setdefault(key, set()).add(str(value))
    varying = [key for key, each in seen.items() if len(each) > 1 and key not in (ARM, SEED)]
    grid: Grid = {}
    for name, point in sorted(points.items(), key=lambda each: _order(each[1], [*varying, SEED])):
        setting = ", ".join(f"{key}={point[key]}" for key in varying if key in point)
        grid.setdefault(str(point[ARM]), {}).setdefault(setting, []).append(outcomes[name])
    return dict(sorted(grid.items()))


def accuracy(run: Outcome, metric: str) -> float:
    """Accuracy at the end; NaN if the run diverged."""
    return run.evaluation.get(metric, math.nan)


def failures(runs: Sequence[Outcome], metric: str, threshold: float) -> int:
    """Number of runs that failed."""
    return sum(not accuracy(run, metric) >= threshold for run in runs)


def tables(grid: Grid, metric: str) -> list[str]:
    """Markdown tables: accuracy by setting and arm, every seed; then failed runs at every threshold, and lowest entropy."""
    settings = list(dict.fromkeys(setting for by_setting in grid.values() for setting in by_setting))
    rows = [f"| test accuracy, % | {' | '.join(grid)} |", f"|---{'|---' * len(grid)}|"]
    for setting in settings:
        cells = [_seeds(by_setting.get(setting, []), metric) for by_setting in grid.values()]
        rows.append(f"| {setting} | {' | '.join(cells)} |")
    thresholds = " | ".join(f"below {each:.0%}" for each in THRESHOLDS)
    counts = [
        f"| runs that failed | {thresholds} | best accuracy, median of seeds | lowest entropy, nats |",
        f"|---{'|---' * (len(THRESHOLDS) + 2)}|",
    ]
    for arm, by_setting in grid.items():
        runs = [run for each in by_setting.values() for run in each]
        cells = [f"{failures(runs, metric, each)} of {len(runs)}" for each in THRESHOLDS]
        medians = [statistics.median(accuracy(run, metric) for run in each) for each in by_setting.values()]
        best = max((each for each in medians if not math.isnan(each)), default=math.nan)
        lowest = min(filter(math.isfinite, (lowest_entropy(run.rows) for run in runs)), default=math.nan)
        counts.append(f"| {arm} | {' | '.join(cells)} | {_percent(best)} | {lowest:.3f} |")
    return ["\n".join(rows), "\n".join(counts)]


def draw(grid: Grid, metric: str) -> Any:
    """Draws the accuracy of every run by setting, settings side by side; the dash is the median of seeds.

    A run that diverged is at 0.
    """
    settings = list(dict.fromkeys(setting for by_setting in grid.values() for setting in by_setting))
    figure, (axes,) = plots.new_figure([2.6], plots.WIDTHS["double"])
    for i, (arm, by_setting) in enumerate(grid.items()):
        color = plots.PALETTE[i % len(plots.PALETTE)]
        shift = 0.1 * (i - (len(grid) - 1) / 2)
        shown = {
            settings.index(setting) + shift: [_drawn(run, metric) for run in runs]
            for setting, runs in by_setting.items()
        }
        axes.plot(list(shown), [statistics.median(each) for each in shown.values()], "_", color=color, markersize=9)
        x = [place for place, each in shown.items() for _ in each]
        axes.plot(x, [value for each in shown.values() for value in each], "o", color=color, markersize=3, label=arm)
    axes.axhline(THRESHOLDS[0], color="#595959", linewidth=0.8, linestyle=":")
    values = [[part.rsplit("=", 1)[-1] for part in setting.split(", ")] for setting in settings]
    names = [part.split("=", 1)[0] for part in settings[0].split(", ")]
    axes.set_xticks(range(len(settings)), ["\n".join(each) for each in values])
    axes.set(ylabel=plots.plain(metric.removeprefix("eval/")), ylim=(0, 1), xlabel=plots.plain(", ".join(names)))
    plots.add_legend(axes, len(grid))
    return figure


def _drawn(run: Outcome, metric: str) -> float:
    return 0.0 if math.isnan(value := accuracy(run, metric)) else value


def _order(point: Mapping[str, Any], keys: Sequence[str]) -> list[tuple[float, str]]:
    """Sorts numbers by their size, and texts behind them."""
    values = [point.get(key) for key in keys]
    return [(each, "") if isinstance(each, int | float) else (math.inf, str(each)) for each in values]


def _seeds(runs: Sequence[Outcome], metric: str) -> str:
    return ", ".join(_percent(accuracy(run, metric)) for run in runs)


def _percent(share: float) -> str:
    return "diverged" if math.isnan(share) else f"{100 * share:.1f}"
