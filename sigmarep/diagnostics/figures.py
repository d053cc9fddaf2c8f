"""A plot as data: its lines, axes and marks, its alternative in words, and what the page carries of it."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

from sigmarep.diagnostics import lines
from sigmarep.diagnostics.lines import Steps, Values
from sigmarep.training.diagnosis import COLLAPSED

# Smaller numbers are as good as zero to a reader.
NOTHING = 1e-20


class Line(NamedTuple):
    """A line of a plot.

    Attributes:
      name: shown with the value under the pointer.
      legend: name of its entry in the legend, which lines may share.
      values: by step or learning rate.
      color: ("depth", 0 to 1), ("kind", number of the color) or ("plain", 0).
      dash: 0 solid, 1 dashed, 2 dotted.
      axis: 0 left, 1 right.
      dots: drawn as dots without a line.
      shade: place of its learning rate among those of the plot, from 0 for the lowest to 1; None where it has none.
      rate: this learning rate, as the legend has it.
    """

    name: str
    legend: str
    values: Values
    color: tuple[str, float] = ("plain", 0)
    dash: int = 0
    axis: int = 0
    dots: bool = False
    shade: float | None = None
    rate: str = ""


class Axis(NamedTuple):
    """A vertical axis.

    Attributes:
      label: quantity of the axis; all plots of a page that share it start alike, logarithmic or linear.
      log: a logarithmic axis shows more.
      zero: it begins at zero.
      signed: it has values that a logarithmic axis cannot hold.
    """

    label: str
    log: bool = False
    zero: bool = False
    signed: bool = False


class Panel(NamedTuple):
    """A plot.

    Attributes:
      title: in a few words.
      caption: says how to read it.
      lines: its lines; rows of a heat map from the top.
      axes: the left axis, and the right one if there is one.
      marks: vertical lines: step, words, and "fell", "rose", "diverged" or "changed".
      levels: horizontal lines: value, axis and words.
      kind: "lines", or "heat" for a heat map.
      group: plots of one group share cursor and zoom.
      topic: joins it to the sentences that it shows (`findings.Sentence`).
      rates: the horizontal axis is a learning rate, logarithmic; infinite values are diverged runs.
    """

    title: str
    caption: str
    lines: list[Line]
    axes: list[Axis]
    marks: Sequence[tuple[int, str, str]] = ()
    levels: Sequence[tuple[float, int, str]] = ()
    kind: str = "lines"
    group: str = ""
    topic: str = ""
    rates: bool = False

    def words(self) -> str:
        """The alternative to the plot for those who cannot see it: its extent, extremes and marks."""
        texts = []
        for place, axis in enumerate(self.axes):
            members = [line for line in self.lines if line.axis == place]
            ends = [_ends(line) for line in members if any(map(lines.drawn, line.values.values()))]
            if not ends:
                texts.append(f"{axis.label}: no finite value.")
                continue
            (low, low_name, low_at), (high, high_name, high_at) = min(ends)[0], max(ends, key=lambda each: each[1])[1]
            first, last = min(min(line.values) for line in members), max(max(line.values) for line in members)
            texts.append(
                f"{axis.label}: {len(members)} {'line' if len(members) == 1 else 'lines'} over "
                f"{'learning rates' if self.rates else 'steps'} {first:g} to {last:g}; lowest {_in_words(low)} "
                f"({low_name}, at {low_at:g}), highest {high:.4g} ({high_name}, at {high_at:g})."
            )
        texts += [f"{text} at step {step}." for step, text, _ in self.marks]
        return " ".join(texts)

    def figure(self) -> "Figure":
        """The plot as the page carries it."""
        steps = Steps()
        content = {
            "title": self.title,
            "kind": self.kind,
            "group": self.group,
            "rates": self.rates,
            "axes": [axis._asdict() for axis in self.axes],
            "marks": [{"at": at, "text": lines.shortened(text), "kind": kind} for at, text, kind in self.marks],
            "levels": [{"value": value, "axis": axis, "text": text} for value, axis, text in self.levels],
            "collapsed": COLLAPSED,
            "lines": [
                {
                    "name": lines.shortened(line.name),
                    "legend": lines.shortened(line.legend),
                    "color": line.color,
                    "dash": line.dash,
                    "axis": line.axis,
                    "dots": line.dots,
                    "steps": steps.place(list(line.values)),
                    "values": lines.packed(list(line.values.values())),
                }
                | ({} if line.shade is None else {"shade": line.shade, "rate": line.rate})
                for line in self.lines
            ],
            "steps": steps.lists,
        }
        wide = self.kind == "heat" or len(self.axes) > 1
        return Figure(self.title, self.caption, self.words(), wide, self.topic, self.group, lines.inert(content))


class Figure(NamedTuple):
    """A plot as the page carries it.

    Attributes:
      title, caption: text above it.
      words: the alternative in words.
      wide: it takes the whole width.
      topic, group: see `Panel`.
      data: what the script draws, as JSON.
    """

    title: str
    caption: str
    words: str
    wide: bool
    topic: str
    group: str
    data: str

    @property
    def key(self) -> str:
        """A name that the plot has however often the page is made."""
        return hashlib.sha256(f"{self.group}\0{self.title}".encode(errors="replace")).hexdigest()[:16]


def _in_words(value: float) -> str:
    """The number in four digits; what is far below any use of it as such."""
    return "practically 0" if 0 < abs(value) < NOTHING else f"{value:.4g}"


def _ends(line: Line) -> tuple[tuple[float, str, float], tuple[float, str, float]]:
    """Lowest and highest finite value of a line, each with its name and the first step of it."""
    finite = list(filter(lines.drawn, line.values.values()))
    low, high = min(finite), max(finite)
    low_at, high_at = (next(at for at, value in line.values.items() if value == end) for end in (low, high))
    return (low, line.name, low_at), (high, line.name, high_at)
