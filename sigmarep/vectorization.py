"""The number of runs of one program that a sweep makes together: given, or chosen by the speed of the runs made before."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

# Numbers of runs that are tried on an accelerator, each while the one before was the fastest.
TRIED = (1, 8, 32)


class Given:
    """Groups of at most `most` runs, as even as can be: the program computes places that are not used too."""

    def __init__(self, most: int):
        self._most = most
        self._widths: dict[str, int] = {}

    def width(self, key: str, waiting: int) -> int:
        """The number of runs that the program `key` makes together, of which `waiting` runs are left."""
        return self._widths.setdefault(key, even(waiting, self._most))


class Measured:
    """Chooses the fastest of `TRIED`, by the runs of a sweep themselves: no step is made for the measurement alone.

    The first run is made alone, the next eight together, and so on, until more at a time are no faster or the device has
    not enough memory for them. What the first programs have shown is believed of the others.

    Args:
      possible: keys of the programs that can make several runs together.
    """

    def __init__(self, possible: set[str]):
        self._possible = possible
        self._speeds: dict[int, float] = {}
        self._stage = 0
        self._tried = 0
        self._widths: dict[str, int] = {}

    def width(self, key: str, waiting: int) -> int:
        """The number of runs that the program `key` makes together, of which `waiting` runs are left."""
        if key not in self._possible:
            return 1
        if key in self._widths:
            return self._widths[key]
        if self._stage < len(TRIED) and 2 * waiting >= TRIED[self._stage]:
            self._tried = min(TRIED[self._stage], waiting)
            return self._tried
        return self._widths.setdefault(key, even(waiting, self.best))

    @property
    def best(self) -> int:
        """The number with which most steps were made in a second, 1 before anything was measured."""
        return max(self._speeds, key=self._speeds.__getitem__, default=1)

    def knows(self, width: int) -> bool:
        """True once the speed of `width` runs at a time was noted."""
        return width in self._speeds

    def note(self, width: int, speeds: Sequence[float]) -> float | None:
        """Takes the speeds, in examples a second, of runs that were made `width` at a time.

        Returns:
          That of all together; None if none has a speed, or if it is known.
        """
        if not speeds or self.knows(width):
            return None
        self._speeds[width] = width * statistics.median(speeds)
        if width == self._tried:
            self._stage = self._stage + 1 if self.best == width else len(TRIED)
        return self._speeds[width]

    def refuse(self, width: int) -> None:
        """The device has not enough memory for `width` runs at a time."""
        self._stage = len(TRIED)
        self._speeds = {each: speed for each, speed in self._speeds.items() if each < width}
        self._widths = {key: min(each, max(width // 2, 1)) for key, each in self._widths.items()}


def even(waiting: int, most: int) -> int:
    """Size of the groups of `waiting` runs, none above `most`, if they are as even as can be."""
    return -(-waiting // -(-waiting // most))


def speed(rows: Sequence[Mapping[str, Any]]) -> float:
    """Examples, tokens or seconds of sound that a run trained on in a second, by its last row of metrics that has it; 0 if
    none has."""
    for row in reversed(rows):
        for name, value in row.items():
            if name.startswith("train/") and name.endswith("_per_second") and value:
                return float(value)
    return 0.0
