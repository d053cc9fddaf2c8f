"""Static pictures of runs, for papers. Color-blind readers can distinguish the colors, and none carries meaning alone."""

import io
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sigmarep.diagnostics import sensitivity
from sigmarep.diagnostics.files import number
from sigmarep.diagnostics.findings import SHARPNESS, Facts
from sigmarep.diagnostics.lines import LARGEST
from sigmarep.diagnostics.names import BLOCK, by_group, kind_and_stack, shortened
from sigmarep.diagnostics.panels import LOSS, LOWEST
from sigmarep.diagnostics.runs import Run
from sigmarep.errors import BadInput
from sigmarep.training import diagnosis

# The palette of Okabe and Ito without yellow, which is faint on white, and three more colors.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#7f7f7f", "#882255", "#6b8e23")
DASHES = ("-", "--", ":")
KINDS = ("png", "svg", "pdf")
# Inches: a column of a page with two, and the text of a page with one.
WIDTHS = {"single": 3.3, "double": 6.9}
# Inches left of the axes, and right of them.
LEFT, RIGHT = 0.62, 0.08
# Inches that an entry of a legend takes.
ENTRY = 1.3
DPI = 200
# Of a name in a legend.
MOST_CHARACTERS = 18
# Longer curves are thinned: more points than pixels cost time and show nothing.
MOST_POINTS = 600
# Ticks are multiples of these.
ROUND = (1, 2, 2.5, 5, 10)


def rendered(figure: Any, kind: str) -> bytes:
    """Renders a figure as the bytes of a file, "png", "svg" or "pdf"."""
    _arrange(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=DPI)
    return buffer.getvalue()


def save(draw: Callable[[], Any], path: str) -> None:
    """Draws a figure into the file of a flag --plot.

    Raises:
      BadInput: the name ends in no known kind of picture, matplotlib is missing, or the file cannot be written.
    """
    kind = path.rpartition(".")[2].lower()
    if kind not in KINDS:
        raise BadInput(f"--plot {path}: expected a name that ends in one of {', '.join(KINDS)}")
    picture = rendered(draw(), kind)
    try:
        with open(path, "wb") as file:
            file.write(picture)
    except OSError as error:
        raise BadInput(f"--plot {path}: cannot be written ({error.strerror})") from error


def plain(text: str) -> str:
    """A name for a label: nothing in it is mathematics, and it is not left out of a legend for its first letter."""
    text = re.sub(r"[\x00-\x1f\x7f\ud800-\udfff]", " ", text).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def load() -> Any:
    """Imports matplotlib, which takes a second, and returns its Figure class.

    Raises:
      BadInput: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise BadInput('static pictures need matplotlib; pip install "sigmarep[report]"') from None
    return Figure


def new_figure(heights: Sequence[float], width: float = WIDTHS["single"]) -> tuple[Any, list[Any]]:
    new = load()
    from matplotlib.ticker import MaxNLocator

    figure = new(figsize=(width, sum(heights)))
    axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.grid(alpha=0.25, linewidth=0.6)
        each.tick_params(labelsize=7)
        # Few ticks, because they take most of the time. Horizontal axes are steps, or logarithmic rates (see `rates`).
        each.xaxis.set_major_locator(MaxNLocator(round(1.5 * width), integer=True, min_n_ticks=1, steps=ROUND))
        each.yaxis.set_major_locator(MaxNLocator(5, steps=ROUND))
        # No offset or power above the axis, where the legend is.
        each.yaxis.set_major_formatter("{x:g}")
        each.margins(x=0.02)
        each.xaxis.label.set_size(8)
        each.yaxis.label.set_size(8)
    return figure, list(axes)


def _arrange(figure: Any) -> None:
    """Stacks the axes of a figure, with room for the legend above each.

    This takes half the time of matplotlib's own layouts, which draw everything twice.
    """
    legends = [axes.get_legend() for axes in figure.axes]
    width = figure.get_figwidth()
    above = [0.12 + (0.13 * math.ceil(len(each.get_texts()) / _columns(width)) if each else 0.0) for each in legends]
    heights = figure.axes[0].get_gridspec().get_height_ratios()
    from matplotlib.ticker import FixedLocator

    last = figure.axes[-1].xaxis
    # Only ticks with names of their own have several lines.
    names = last.get_ticklabels() if isinstance(last.get_major_locator(), FixedLocator) else ()
    bottom = 0.42 + 0.13 * max((each.get_text().count("\n") for each in names), default=0)
    total = sum(heights) + sum(above) + bottom
    figure.set_size_inches(width, total)
    top = total
    for axes, height, room in zip(figure.axes, heights, above, strict=True):
        top -= room + height
        axes.set_position((LEFT / width, top / total, 1 - (LEFT + RIGHT) / width, height / total))


def _line(axes: Any, steps: Sequence[float], values: Sequence[float], **options: Any) -> None:
    """Draws the finite points of a curve, evenly thinned to about `MOST_POINTS`; nothing if there are none."""
    points = [(x, y) for x, y in zip(steps, values, strict=True) if abs(y) <= LARGEST]
    if not points:
        return
    stride = max(len(points) // MOST_POINTS, 1)
    points = points[::stride] + (points[-1:] if stride > 1 else [])
    # A line of one point is invisible.
    marker = {"marker": "o", "markersize": 3} if len(points) < 3 else {}
    axes.plot([x for x, _ in points], [y for _, y in points], **(marker | options))


def _scale(axes: Any, values: Sequence[float]) -> None:
    """Makes an axis logarithmic if no value is negative and the positive ones span more than a decade.

    Zeros then lie below the axis. If no value is finite, a text in the axes tells so.
    """
    finite = [value for value in values if abs(value) <= LARGEST]
    if not finite:
        axes.text(0.03, 0.5, "no finite value", transform=axes.transAxes, fontsize=8, color="#595959")
        axes.set_yticks([])
    positive = [value for value in finite if value > 0]
    if positive and min(finite) >= 0 and max(positive) > 10 * min(positive):
        from matplotlib.ticker import LogLocator

        axes.set_yscale("log")
        # On an axis of one or two decades powers of ten would be too few ticks.
        subs = (1, 2, 5) if max(positive) < 100 * min(positive) else (1,)
        axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=5))
        # Formatting powers as mathematics would take as long as the rest of the axis.
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()


def add_legend(axes: Any, count: int) -> None:
    if count > 1:
        # Above the axes, so that it never covers curves.
        columns = _columns(axes.figure.get_figwidth())
        place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.1, "ncols": columns}
        axes.legend(fontsize=6.5, frameon=False, handlelength=1.6, columnspacing=1.0, labelspacing=0.2, **place)


def _columns(width: float) -> int:
    """Number of a legend's columns in a figure of this width."""
    return max(int((width - LEFT - RIGHT) / ENTRY), 1)


def _events(axes: Sequence[Any], run: Run, facts: Facts) -> None:
    """Draws vertical lines where the loss rose or the run diverged, and where an intervention changed the run."""
    events = {"rise": (facts.rose, ":"), "change": (number(run.config.get("intervention.at_steps")), "-")}
    for step, dash in events.values():
        if step is not None and step <= run.last_step:
            for each in axes:
                each.axvline(step, color="#666666", linewidth=0.9, linestyle=dash)


def _by_depth(layers: Sequence[str]) -> Mapping[str, Any]:
    """Assigns a color to every layer, from dark to light with depth, on a scale suited to color-blind readers."""
    from matplotlib import colormaps

    shades = colormaps["viridis"]
    return {layer: shades(0.9 * i / max(len(layers) - 1, 1)) for i, layer in enumerate(layers)}


def _label(layer: str, layers: Sequence[str]) -> str | None:
    """Label of a layer in the legend: the number of its block. With many layers only first, middle and last have one."""
    shown = layers if len(layers) <= 6 else (layers[0], layers[len(layers) // 2], layers[-1])
    block = BLOCK.search(layer)
    return plain(f"block {block[1]}" if block else layer) if layer in shown else None


def entropy(run: Run, facts: Facts, width: float = WIDTHS["single"]) -> Any | None:
    """Draws the loss, below it the entropy of every layer, then of every head; None if no entropy was recorded."""
    prefix = "attention/entropy/"
    groups = by_group([name.removeprefix(prefix) for name in run.names if name.startswith(prefix)])
    if not groups:
        return None
    figure, axes = new_figure([1.2, *[1.2, 1.2] * len(groups)], width)
    losses = run.series(LOSS)
    _line(axes[0], *losses, color="#333333", linewidth=1.2)
    _scale(axes[0], losses.values)
    axes[0].set_ylabel("training loss")
    for (group, layers), above, below in zip(groups.items(), axes[1::2], axes[2::2], strict=True):
        colors = _by_depth(layers)
        for layer in layers:
            style = {"color": colors[layer], "linewidth": 1.3}
            _line(above, *run.series(prefix + layer), label=_label(layer, layers), **style)
            _line(above, *run.series(f"attention/bound/{layer}"), **(style | {"linewidth": 0.8, "linestyle": ":"}))
            for name in run.names:
                if name.startswith(f"attention/entropy_head/{layer}/"):
                    _line(below, *run.series(name), color=colors[layer], linewidth=0.6)
        for each, what in ((above, "layers"), (below, "heads")):
            each.axhline(diagnosis.COLLAPSED, color="#d55e00", linewidth=0.9, linestyle="--")
            each.set_ylabel(f"entropy of {what},\nnats")
            if len(groups) > 1:
                each.text(0.99, 0.96, plain(group), transform=each.transAxes, ha="right", va="top", fontsize=7)
            each.set_ylim(bottom=0)
        add_legend(above, len(layers))
    _events(axes, run, facts)
    axes[-1].set_xlabel("step")
    return figure


def spectra(run: Run, facts: Facts, width: float = WIDTHS["single"]) -> Any | None:
    """Draws spectral norms σ, |γ|, stable ranks and the largest logits; None if none of them was recorded."""
    panels = {
        "spectral norm σ(W)": "spectral/sigma/",
        "|γ|": "spectral/gamma/",
        "stable rank": "spectral/stable_rank/",
        "largest logit": "attention/max_logit/",
    }
    return _by_kind(run, facts, panels, width)


def updates(run: Run, facts: Facts, width: float = WIDTHS["single"]) -> Any | None:
    """Draws gradient norm and update-to-weight ratio of every layer; None if neither was recorded."""
    return _by_kind(run, facts, {"gradient norm": "gradient/norm/", "update / weight": "update/ratio/"}, width)


def _by_kind(run: Run, facts: Facts, panels: Mapping[str, str], width: float) -> Any | None:
    """Draws a panel for each prefix of metrics that was recorded, with a color per kind of layer and dashes per stack."""
    shown = {
        title: names
        for title, prefix in panels.items()
        if (names := {name.removeprefix(prefix): name for name in run.names if name.startswith(prefix)})
    }
    if not shown:
        return None
    figure, axes = new_figure([1.3] * len(shown), width)
    # A kind of layer has the same color, and a stack the same dashes, in all panels.
    places = {name: kind_and_stack(name) for names in shown.values() for name in names}
    kinds, stacks = (list(dict.fromkeys(each)) for each in zip(*places.values(), strict=True))
    named: set[str] = set()
    for (title, names), each in zip(shown.items(), axes, strict=True):
        everything: list[float] = []
        for layer, name in names.items():
            kind, stack = places[layer]
            options = {
                "color": PALETTE[kinds.index(kind) % len(PALETTE)],
                "linestyle": DASHES[stacks.index(stack) % len(DASHES)],
            }
            steps, values = run.series(name)
            values = [abs(value) for value in values] if title == "|γ|" else values
            everything += values
            _line(each, steps, values, linewidth=0.9, label=None if kind in named else plain(kind), **options)
            named.add(kind)
        _scale(each, everything)
        each.set_ylabel(title)
        add_legend(each, len(each.get_legend_handles_labels()[1]))
    _events(axes, run, facts)
    axes[-1].set_xlabel("step")
    return figure


def sharpness(run: Run, facts: Facts, width: float = WIDTHS["single"]) -> Any | None:
    """Draws sharpness and its threshold; None if it was not measured."""
    shown = [name for name in SHARPNESS if name in run.names]
    if not shown:
        return None
    figure, axes = new_figure([1.5] * len(shown), width)
    for name, each in zip(shown, axes, strict=True):
        values, limit = run.series(name), run.series(SHARPNESS[name])
        _line(each, *values, color=PALETTE[0], label="measured")
        _line(each, *limit, color=PALETTE[1], linestyle="--", label="threshold")
        _scale(each, [*values.values, *limit.values])
        each.set_ylabel("largest eigenvalue" + (",\npreconditioned Hessian" if "precond" in name else ",\nHessian"))
        add_legend(each, 2)
    _events(axes, run, facts)
    axes[-1].set_xlabel("step")
    return figure


def together(runs: Sequence[Run], arm: Callable[[Run], str], width: float = WIDTHS["single"]) -> Any | None:
    """Draws loss and lowest layer's entropy of all runs, colored by arm; None if nothing was logged."""
    shown = [run for run in runs if run.series(LOSS).values]
    if not shown:
        return None
    arms = list(dict.fromkeys(arm(run) for run in shown))
    with_entropy = any(LOWEST in run.names for run in shown)
    figure, axes = new_figure([1.8, 1.6] if with_entropy else [2.0], width)
    named = len(arms) <= len(PALETTE) * len(DASHES) and len(arms) <= 12
    seen: set[str] = set()
    everything: list[float] = []
    for run in shown:
        place = arms.index(arm(run))
        options: dict[str, Any] = {"color": "#444444", "linewidth": 0.9, "alpha": max(0.25, min(1.0, 8 / len(shown)))}
        if named:
            dash = DASHES[place // len(PALETTE) % len(DASHES)]
            options |= {"color": PALETTE[place % len(PALETTE)], "linestyle": dash}
        losses = run.series(LOSS)
        everything += losses.values
        _line(axes[0], *losses, **options)
        if with_entropy:
            _line(axes[1], *run.series(LOWEST), **options)
        if named and arm(run) not in seen:
            seen.add(arm(run))
            axes[0].plot([], [], label=plain(shortened(arm(run), MOST_CHARACTERS)), **(options | {"alpha": 1.0}))
    _scale(axes[0], everything)
    axes[0].set_ylabel("training loss")
    if with_entropy:
        axes[1].axhline(diagnosis.COLLAPSED, color="#d55e00", linewidth=0.9, linestyle="--")
        axes[1].set_ylabel("entropy of the\nlowest layer, nats")
        axes[1].set_ylim(bottom=0)
    add_legend(axes[0], len(seen))
    axes[-1].set_xlabel("step")
    return figure


# Learning rates whose numbers stand side by side below a column's plot.
MOST_TICKS = 7


def rates(table: sensitivity.Table, width: float = WIDTHS["single"]) -> Any:
    """Draws final loss and lowest entropy against the learning rate: every seed, their range, and the median."""
    figure, axes = new_figure([2.0, 1.5], width)
    losses = sensitivity.medians(table)
    best = sensitivity.best_loss(losses)
    starts = [each.start for by_rate in table.values() for runs in by_rate.values() for each in runs]
    ends = [loss for by_rate in losses.values() for loss in by_rate.values()]
    top = max((value for value in (*ends, *starts) if abs(value) <= LARGEST), default=1.0) * 1.15
    for i, (arm, by_rate) in enumerate(table.items()):
        style = {"color": PALETTE[i % len(PALETTE)], "linestyle": DASHES[i // len(PALETTE) % len(DASHES)]}
        # Slightly shifted, so that seeds of one rate do not cover each other.
        shift = 1.05 ** (i - (len(table) - 1) / 2)
        label = plain(shortened(arm, MOST_CHARACTERS))
        final = {rate: [min(each.loss, top) for each in runs] for rate, runs in by_rate.items()}
        draw_seeds(axes[0], final, shift=shift, lost=top, label=label, **style)
        lowest = {rate: [each.lowest for each in runs if math.isfinite(each.lowest)] for rate, runs in by_rate.items()}
        draw_seeds(axes[1], lowest, shift=shift, lost=math.inf, label=label, **style)
    if math.isfinite(best):
        axes[0].axhline((1 + sensitivity.WITHIN) * best, color="#666666", linestyle="--", linewidth=0.9)
    axes[0].set(ylabel="training loss at the end", xscale="log")
    tried = sorted({rate for by_rate in table.values() for rate in by_rate})
    # Every rate that was tried has its number.
    axes[1].set_xticks(tried, [f"{rate:g}" for rate in tried], rotation=60 if len(tried) > MOST_TICKS else 0)
    axes[1].minorticks_off()
    axes[1].axhline(diagnosis.COLLAPSED, color="#d55e00", linewidth=0.9, linestyle="--")
    axes[1].set(ylabel="lowest entropy\nof the run, nats", xlabel="learning rate", ylim=(0, None))
    add_legend(axes[0], len(table))
    return figure


def draw_seeds(
    axes: Any,
    by_rate: Mapping[float, Sequence[float]],
    *,
    shift: float,
    lost: float,
    label: str,
    color: str,
    linestyle: str,
) -> None:
    """Draws all seeds of an arm as dots, their range as a band, their median as a line; crosses where a seed is `lost`."""
    known = {rate: values for rate, values in by_rate.items() if values}
    if not known:
        return
    rates = list(known)
    axes.fill_between(
        rates, list(map(min, known.values())), list(map(max, known.values())), color=color, alpha=0.15, lw=0
    )
    middle = [statistics.median(values) for values in known.values()]
    axes.plot(rates, middle, color=color, linestyle=linestyle, linewidth=1.2, label=label)
    points = [(rate * shift, value) for rate, values in known.items() for value in values]
    for marker, size, drawn in (
        ("o", 2.5, [point for point in points if point[1] != lost]),
        ("x", 4, [point for point in points if point[1] == lost]),
    ):
        axes.plot([x for x, _ in drawn], [y for _, y in drawn], marker, color=color, markersize=size)
