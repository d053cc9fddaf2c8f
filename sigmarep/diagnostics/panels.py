"""The interactive plots of runs: which lines, axes and marks each has."""

import collections
import itertools
import math
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from sigmarep.diagnostics import lines, sensitivity
from sigmarep.diagnostics.changes import intervention
from sigmarep.diagnostics.figures import Axis, Line, Panel
from sigmarep.diagnostics.findings import SHARPNESS, Facts
from sigmarep.diagnostics.lines import by_step
from sigmarep.diagnostics.names import BLOCK, by_group, kind_and_stack
from sigmarep.diagnostics.runs import Run
from sigmarep.sweeps import short
from sigmarep.training.diagnosis import COLLAPSED

LOSS, LOWEST = "train/loss", "attention/entropy_min"
# The metrics that `together` draws.
ALL = (LOSS, LOWEST)
ENTROPY, HEADS, BOUND = "attention/entropy/", "attention/entropy_head/", "attention/bound/"
# By prefix of the metrics: title of the plot, and label of its axis.
KINDS = {
    "spectral/sigma/": ("Spectral norm of the kernels", "σ(W)"),
    "spectral/gamma/": ("Gain γ", "γ"),
    "spectral/norm/": ("Effective norm of the kernels", "‖Ŵ‖₂"),
    "spectral/stable_rank/": ("Stable rank of the kernels", "stable rank"),
    "attention/max_logit/": ("Largest attention logit", "logit"),
    "gradient/norm/": ("Gradient norm", "gradient norm"),
    "update/ratio/": ("Update-to-weight ratio", "update / weight"),
}
# Colors and dashes of the page's style; of more arms no color is told apart.
COLORS, DASHES = 10, 3
MOST_ARMS = 12
SEEDS = (
    "A dot for each seed (those of different arms side by side), a band from the lowest to the highest, lines through the "
    "medians"
)
DEPTH = "Colors run from the block nearest the input (darkest) to the one nearest the output."
# Legend of the layer "head", which is no head of an attention.
OUTPUT = "head (output layer)"
# Steps of a plot. More than pixels show nothing.
MOST_STEPS = 300
LEAST_STEPS = 60
# Numbers of one run, and of all runs, that a page may carry; one takes 5.3 bytes.
RUN_NUMBERS = 120_000
PAGE_NUMBERS = 600_000


def of_run(run: Run, facts: Facts, *, runs: int) -> Iterator[tuple[str, Callable[[], list[Panel]]]]:
    """Yields names of pictures of one run, and functions that make their plots.

    Args:
      runs: number of runs that the page draws one by one, which share its size.
    """
    most = max(min(RUN_NUMBERS, PAGE_NUMBERS // runs) // max(len(run.names), 1), LEAST_STEPS)
    most = min(most, MOST_STEPS)
    yield "loss", lambda: _finish(_loss(run, facts), run, most)
    yield "entropy", lambda: _finish([*_heads(run), *_layers(run)], run, most, _events(run, facts))
    yield "metrics", lambda: _finish(_metrics(run), run, most, _events(run, facts))
    yield "spectra", lambda: _finish(_by_kind(run), run, most, _events(run, facts))
    yield "sharpness", lambda: _finish(_sharpness(run), run, most, _events(run, facts))
    yield "pace", lambda: _finish(_pace(run), run, most)


def _finish(panels: Iterable[Panel], run: Run, most: int, marks: Sequence[tuple[int, str, str]] = ()) -> list[Panel]:
    """The plots that have a value, thinned, with the run's marks."""
    finished = []
    for panel in panels:
        if not any(line.values for line in panel.lines):
            continue
        always = [step for step, _, _ in (*marks, *panel.marks)]
        values = lines.thinned([line.values for line in panel.lines], most, always)
        finished.append(
            panel._replace(
                lines=[line._replace(values=each) for line, each in zip(panel.lines, values, strict=True) if each],
                marks=panel.marks or marks,
                group=run.folder,
            )
        )
    return finished


def _events(run: Run, facts: Facts) -> list[tuple[int, str, str]]:
    changed = intervention(run)
    events = [
        (None if changed is None else changed[0], "changed on purpose", "changed"),
        (facts.rose if facts.rose != facts.diverged else None, "loss rose", "rose"),
        (facts.diverged, "diverged", "diverged"),
    ]
    return [(step, text, kind) for step, text, kind in events if step is not None and step <= run.last_step]


def _loss(run: Run, facts: Facts) -> list[Panel]:
    losses, lowest = by_step(run, LOSS), by_step(run, LOWEST)
    # Neutral: the colors of this plot's neighbors are arms.
    shown = [Line("training loss", "training loss", losses)]
    axes = [_axis("training loss", losses.values())]
    caption = "The run in one picture."
    if lowest:
        shown.append(Line("lowest entropy of any layer", "lowest entropy of any layer", lowest, dash=1, axis=1))
        axes.append(Axis("entropy, nats", zero=True))
        caption = (
            "Training loss (left), and attention entropy of the layer with the lowest (right, dashed); ▼ a layer fell "
            f"below {COLLAPSED} nats."
        )
    marks = [(step, f"{layer} fell", "fell") for layer, step in facts.fell]
    levels = [(COLLAPSED, 1, f"{COLLAPSED} nats")] if lowest else []
    return [
        Panel("Loss and lowest entropy", caption, shown, axes, [*_events(run, facts), *marks], levels, topic="loss")
    ]


def _named(run: Run, prefix: str) -> dict[str, str]:
    return {name.removeprefix(prefix): name for name in run.names if name.startswith(prefix)}


def _order(name: str) -> list[tuple[int, int, str]]:
    """A key that sorts names by their numbers: block_2 before block_10."""
    parts = re.findall(r"\d+|\D+", name[: lines.MOST_CHARACTERS])
    return [(0, int(part), "") if part.isascii() and part.isdigit() else (1, 0, part) for part in parts]


def _heads(run: Run) -> list[Panel]:
    names, what = _named(run, HEADS), "heads"
    if not names:
        names, what = _named(run, ENTROPY), "layers"
    if not names:
        return []
    groups = by_group(sorted(names, key=_order))
    rows = [
        Line(_head(name) if what == "heads" else name, group, by_step(run, names[name]))
        for group, members in groups.items()
        for name in members
    ]
    caption = f"A row for each of {len(rows)} {what}, those nearest the input on top; dark is sharp attention."
    if what == "heads":
        caption += (
            f" Orange cells are single heads below {COLLAPSED} nats; a layer is said to have collapsed only where the mean "
            "over its heads is below."
        )
    else:
        caption += f" Orange cells are layers below {COLLAPSED} nats."
    title = f"Attention entropy of all {what}"
    return [Panel(title, caption, rows, [Axis("entropy, nats")], kind="heat", topic="entropy")]


def _head(name: str) -> str:
    layer, _, head = name.rpartition("/")
    return f"{layer}, head {head}"


def _layers(run: Run) -> list[Panel]:
    names = _named(run, ENTROPY)
    groups = by_group(sorted(names, key=_order))
    panels = []
    for group, layers in groups.items():
        shown, bounds = [], []
        for i, layer in enumerate(layers):
            color = _depth(i, len(layers))
            shown.append(Line(layer, _block(layer, layers), by_step(run, names[layer]), color))
            if bound := by_step(run, BOUND + layer):
                bounds.append(Line(f"{layer}, lower bound", "lower bounds", bound, color, 2))
        where = f": {group}" if len(groups) > 1 else ""
        panels.append(
            Panel(
                f"Attention entropy of layers{where}",
                DEPTH + (" Dotted: the bound of Theorem 3.1." if bounds else ""),
                [*shown, *bounds],
                [Axis("entropy, nats", zero=True)],
                levels=[(COLLAPSED, 0, f"{COLLAPSED} nats")],
            )
        )
    return panels


def _metrics(run: Run) -> list[Panel]:
    evaluated = [name for name in run.names if name.startswith("eval/")]
    kinds = dict.fromkeys(name.rsplit("/", 1)[-1] for name in evaluated)
    panels = []
    for kind in kinds:
        names = [name for name in evaluated if name.rsplit("/", 1)[-1] == kind]
        if f"train/{kind}" in run.names:
            names.insert(0, f"train/{kind}")
        shown = [
            Line(name, name, values, ("kind", i % COLORS), i % DASHES if len(values) > 2 else 0)
            for i, (name, values) in enumerate((name, by_step(run, name)) for name in names)
        ]
        if max(len(line.values) for line in shown) > 1:
            panels.append(Panel(f"Metric: {kind}", "Training, and evaluations.", shown, [Axis(kind)]))
    return panels


def _by_kind(run: Run) -> list[Panel]:
    """A plot for each kind of metric, with a color per kind of layer and dashes per stack, the same in all of them."""
    metrics = {prefix: names for prefix in KINDS if (names := _named(run, prefix))}
    places = {name: kind_and_stack(name) for names in metrics.values() for name in names}
    kinds, stacks = ([*dict.fromkeys(place[i] for place in places.values())] for i in (0, 1))
    panels = []
    for prefix, names in metrics.items():
        title, label = KINDS[prefix]
        if all(BLOCK.search(layer) and BLOCK.fullmatch(layer.rsplit("/", 1)[-1]) for layer in names):
            # One quantity for each block: its depth tells a line from the others.
            ordered = sorted(names, key=_order)
            shown = [
                Line(layer, _block(layer, ordered), by_step(run, names[layer]), _depth(i, len(ordered)))
                for i, layer in enumerate(ordered)
            ]
            caption = DEPTH
        else:
            shown = [
                Line(
                    layer,
                    OUTPUT if layer == "head" else places[layer][0],
                    by_step(run, names[layer]),
                    ("kind", kinds.index(places[layer][0]) % COLORS),
                    stacks.index(places[layer][1]) % DASHES,
                )
                for layer in names
            ]
            parts = dict.fromkeys(places[layer][1] for layer in names)
            dashed: dict[str, list[str]] = {word: [] for word in ("solid", "dashed", "dotted")}
            for part in parts:
                list(dashed.values())[stacks.index(part) % DASHES].append(lines.shortened(part) or "outside of blocks")
            words = "; ".join(f"{word}: {', '.join(each)}" for word, each in dashed.items() if each)
            caption = "A color per kind of layer" + (f". {words[0].upper()}{words[1:]}." if len(parts) > 1 else ".")
        values = itertools.chain.from_iterable(line.values.values() for line in shown)
        panels.append(Panel(title, caption, shown, [_axis(label, values)], topic=prefix))
    return panels


def _depth(place: int, count: int) -> tuple[str, float]:
    return "depth", place / max(count - 1, 1)


def _block(layer: str, layers: Sequence[str]) -> str:
    """`block 3`, or the whole name where several stacks have a block of that number."""
    block = BLOCK.search(layer)
    alone = len({BLOCK.sub("", each) for each in layers}) == 1
    return f"block {block[1]}" if block and alone else layer


def _sharpness(run: Run) -> list[Panel]:
    panels = []
    for name, limit in SHARPNESS.items():
        if values := by_step(run, name):
            threshold = by_step(run, limit)
            shown = [Line("measured", "measured", values)]
            shown += [Line("threshold", "threshold", threshold, dash=1)] if threshold else []
            label = "largest eigenvalue of the " + ("preconditioned Hessian" if "precond" in name else "Hessian")
            axis = _axis("sharpness", [*values.values(), *threshold.values()])
            caption = "Above its threshold (dashed) a step no longer descends."
            panels.append(Panel(f"Sharpness: {label}", caption, shown, [axis], topic=name))
    return panels


def _pace(run: Run) -> list[Panel]:
    rates = {"Learning rate": ["train/learning_rate"]}
    rates["Throughput"] = [name for name in run.names if name.startswith("train/") and name.endswith("_per_second")]
    panels = []
    for title, names in rates.items():
        shown = [
            Line(name.removeprefix("train/"), name.removeprefix("train/"), by_step(run, name), ("kind", i % COLORS))
            for i, name in enumerate(names)
        ]
        label = (
            title.lower() if title in names or len(names) != 1 else names[0].removeprefix("train/").replace("_", " ")
        )
        panels.append(Panel(title, "As logged.", shown, [Axis(label, zero=True)], topic=names[0] if names else ""))
    return panels


def _axis(label: str, values: Iterable[float]) -> Axis:
    """An axis that gains by being logarithmic if no value is negative and the positive ones span more than a decade."""
    finite = [value for value in values if lines.drawn(value)]
    positive = [value for value in finite if value > 0]
    signed = bool(finite) and min(finite) < 0
    return Axis(label, log=bool(positive) and not signed and max(positive) > 10 * min(positive), signed=signed)


def together(runs: Sequence[Run], arm: Callable[[Run], str]) -> list[Panel]:
    """Loss and lowest layer's entropy of all runs, colored by arm; tasks, whose losses differ in kind, have their own."""
    tasks: dict[str, list[Run]] = {}
    for run in runs:
        if LOSS in run.names:
            tasks.setdefault(str(run.config.get("task", "")), []).append(run)
    panels = []
    for task, members in tasks.items():
        # Sorted as those of a sweep are, so that an arm has one color on the page.
        arms = sorted({arm(run) for run in members})
        most = max(min(PAGE_NUMBERS // 4 // len(runs), MOST_STEPS), LEAST_STEPS)
        curves = [lines.thinned([by_step(run, name) for name in ALL], most) for run in members]
        where = f": {lines.shortened(task)}" if len(tasks) > 1 else ""
        shades = _shades(members)
        each_line = "A line for each run" + ("." if len(arms) > MOST_ARMS else ", a color for each arm.")
        if shades:
            each_line += (
                " Lines become stronger from the lowest learning rate to the highest, and less broken where few."
            )
        for i, (title, label) in enumerate((("Training loss", "training loss"), ("Lowest entropy", "entropy, nats"))):
            shown = [
                Line(run.name, lines.shortened(arm(run)), each[i], *_style(arms.index(arm(run)), len(arms)))._replace(
                    **(shades.get(run.folder, {}))
                )
                for run, each in zip(members, curves, strict=True)
                if each[i]
            ]
            if not shown:
                continue
            if len(arms) > MOST_ARMS:
                shown = [line._replace(legend="all runs") for line in shown]
            values = (value for line in shown for value in line.values.values())
            axis = Axis(label, zero=True) if i else _axis(label, values)
            panels.append(
                Panel(
                    f"{title} of all runs{where}",
                    each_line,
                    shown,
                    [axis],
                    levels=[(COLLAPSED, 0, f"{COLLAPSED} nats")] if i == 1 else [],
                    group=f"all runs {task}",
                    topic="all entropies" if i else "all losses",
                )
            )
    return panels


def _shades(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """Fields of the lines of runs that tell their learning rates, by folder; {} where all have one rate."""
    known = {run.folder: place[1] for run in runs if (place := sensitivity.place(run.point))}
    rates = sorted(set(known.values()))
    if len(rates) < 2:
        return {}
    return {
        folder: {"shade": round(rates.index(rate) / (len(rates) - 1), 3), "rate": f"{rate:g}"}
        for folder, rate in known.items()
    }


def _style(place: int, count: int) -> tuple[tuple[str, float], int]:
    if count > MOST_ARMS:
        return ("plain", 0), 0
    return ("kind", place % COLORS), place // COLORS % DASHES


def rates(
    table: sensitivity.Table, outcomes: Sequence[tuple[Mapping[str, Any], sensitivity.RunOutcome]], folder: str
) -> list[Panel]:
    """Loss at the end and lowest entropy against the learning rate, all seeds as dots and their median as a line."""
    dots: dict[tuple[str, str], dict[float, sensitivity.RunOutcome]] = collections.defaultdict(dict)
    for point, outcome in outcomes:
        if where := sensitivity.place(point):
            dots[where[0], str(short(point).get(sensitivity.SEED, ""))][where[1]] = outcome
    arms, ended = list(table), [outcome for _, outcome in outcomes]
    losses = sensitivity.medians(table)
    best = sensitivity.best_loss(losses)
    lowest = {
        arm: {
            rate: statistics.median(finite)
            for rate, outcomes in by_rate.items()
            if (finite := [each.lowest for each in outcomes if math.isfinite(each.lowest)])
        }
        for arm, by_rate in table.items()
    }
    kinds = (
        ("Training loss at the end", "loss at the end", "loss", losses),
        ("Lowest entropy of the run", "entropy, nats", "lowest", lowest),
    )
    panels = []
    for title, label, field, medians in kinds:
        shown = [
            Line(f"{arm}, median", arm, medians[arm], ("kind", i % COLORS), i // COLORS % DASHES)
            for i, arm in enumerate(arms)
        ]
        shown += [
            Line(
                f"{arm}, seed {seed}",
                arm,
                {rate: getattr(outcome, field) for rate, outcome in sorted(by_rate.items())},
                ("kind", arms.index(arm) % COLORS),
                dots=True,
            )
            for (arm, seed), by_rate in dots.items()
        ]
        if field == "loss":
            caption = f"{SEEDS}; crosses at the top diverged. An arm trains where its line is below the dashed one."
            within = (1 + sensitivity.WITHIN) * best
            levels = [(within, 0, "trains below")] if math.isfinite(within) else []
        else:
            caption, levels = (
                f"{SEEDS}.",
                [(COLLAPSED, 0, f"{COLLAPSED} nats")],
            )
        axes = [Axis(label, zero=True) if field == "lowest" else _axis(label, (each.loss for each in ended))]
        panels.append(
            Panel(
                title, caption, shown, axes, levels=levels, group=f"rates {folder}", topic=f"rates {folder}", rates=True
            ),
        )
    return panels
