"""Curves as a page carries them: thinned so that no extreme is lost, and packed as text."""

import array
import base64
import json
import math
import sys
from collections.abc import Sequence
from typing import Any

from sigmarep.diagnostics import names
from sigmarep.diagnostics.runs import Run

# Larger values are left out: the distance of two of them, or the end of an axis beyond them, would be no number.
LARGEST = 1e100
# Characters of a name that a page carries.
MOST_CHARACTERS = 200

# Values by step, or by learning rate.
Values = dict[float, float]


def by_step(run: Run, name: str) -> Values:
    """Values of a metric by step, steps rising; of a step that was logged twice the last value."""
    return dict(sorted(zip(*run.series(name), strict=True)))


def thinned(curves: Sequence[Values], most: int, always: Sequence[int] = ()) -> list[Values]:
    """Thins curves together to at most `most` common steps, and those of `always`, the first and the last.

    Neighboring steps share a bucket, of which the steps of the lowest and the highest value of any curve stay: a spike of
    a single step is never lost.
    """
    steps = sorted(set().union(*curves)) if curves else []
    if len(steps) <= most:
        return list(curves)
    buckets = max(most // 2, 1)
    chosen = {steps[0], steps[-1], *always}
    for i in range(buckets):
        bucket = steps[i * len(steps) // buckets : (i + 1) * len(steps) // buckets]
        points = [(curve[step], step) for curve in curves for step in bucket if drawn(curve.get(step))]
        # A bucket without a finite value keeps a step, so that the gap is seen.
        chosen |= {min(points)[1], max(points)[1]} if points else {bucket[0]}
    return [{step: value for step, value in curve.items() if step in chosen} for curve in curves]


def drawn(value: float | None) -> bool:
    """True for a number that an axis can hold."""
    return value is not None and abs(value) <= LARGEST


def packed(values: Sequence[float]) -> str:
    """The values as base64 of little-endian 32-bit floats: shorter than digits, and exact for values of training."""
    numbers = array.array("f", [value if abs(value) <= 3.4e38 else _beyond(value) for value in values])
    if sys.byteorder == "big":
        numbers.byteswap()
    return base64.b64encode(numbers.tobytes()).decode()


def _beyond(value: float) -> float:
    return value if math.isnan(value) else math.copysign(math.inf, value)


def inert(content: Any) -> str:
    """The content as JSON in which no character can end the element of a page that holds it."""
    text = json.dumps(content, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def shortened(name: str) -> str:
    """The name as a page carries it."""
    return names.shortened(name, MOST_CHARACTERS)


class Steps:
    """Lists of steps, each of which a plot carries once however many of its lines have it."""

    def __init__(self) -> None:
        self.lists: list[Any] = []
        self._places: dict[tuple[float, ...], int] = {}

    def place(self, steps: Sequence[float]) -> int:
        """The place of these steps in `lists`."""
        place = self._places.setdefault(tuple(steps), len(self.lists))
        if place == len(self.lists):
            self.lists.append(list(steps))
        return place
