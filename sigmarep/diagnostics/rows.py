"""Rows of metrics as columns of numbers: 8 bytes a number, and a whole metric at once."""

import itertools
import operator
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

STEP = "step"


class Series(NamedTuple):
    """Values of one metric, and the steps at which they were logged."""

    steps: list[int]
    values: list[float]


class _Layout:
    """All rows that have the same names in the same order.

    Attributes:
      names: those that are held.
      values: of the first row, of the second, and so on.
      rows: places of these rows among all.
    """

    def __init__(self, names: Sequence[str]):
        self.names, self.width = names, len(names)
        self.values, self.rows = array("d"), array("L")
        # Of several names at once, in C; of one name it would return the bare value.
        self._take = operator.itemgetter(*names) if len(names) > 1 else None

    def append(self, row: Mapping[str, float], place: int) -> None:
        self.values.extend(self._take(row) if self._take else [row[name] for name in self.names])
        self.rows.append(place)

    def row(self, place: int) -> dict[str, float]:
        return dict(zip(self.names, self.values[place * self.width : (place + 1) * self.width], strict=True))


class Rows(Sequence[dict[str, Any]]):
    """Rows of metrics in order; each is a dictionary of `step`, a whole number, and of numbers by name.

    Args:
      rows: the first of them.
      wanted: tells of a name whether its values are held; None holds all.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]] = (), wanted: Callable[[str], bool] | None = None):
        self._wanted = wanted
        self._steps = array("q")
        # Of each row: its layout, and its place in it.
        self._layout_of, self._place_in = array("L"), array("L")
        self._layouts: list[_Layout] = []
        # By all names of a row, and by those that are held: the number of the layout.
        self._numbers: dict[tuple[str, ...], int] = {}
        self._held: dict[tuple[str, ...], int] = {}
        # Of each name: the layouts that hold it, and its column.
        self._columns: dict[str, list[tuple[_Layout, int]]] = {}
        for row in rows:
            self.append(row)

    def append(self, row: Mapping[str, Any]) -> None:
        """Adds a row at the end."""
        key = tuple(row)
        number = self._numbers.get(key)
        if number is None:
            names = tuple(name for name in key if name != STEP and (self._wanted is None or self._wanted(name)))
            # Rows that differ in names that are not held have one layout.
            number = self._held.setdefault(names, len(self._layouts))
            self._numbers[key] = number
            if number == len(self._layouts):
                self._add_layout(names)
        layout = self._layouts[number]
        self._layout_of.append(number)
        self._place_in.append(len(layout.rows))
        layout.append(row, len(self._steps))
        self._steps.append(row[STEP])

    def _add_layout(self, names: Sequence[str]) -> _Layout:
        layout = _Layout(names)
        self._layouts.append(layout)
        for column, name in enumerate(names):
            self._columns.setdefault(name, []).append((layout, column))
        return layout

    def __len__(self) -> int:
        return len(self._steps)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[each] for each in range(*place.indices(len(self)))]
        row = self._layouts[self._layout_of[place]].row(self._place_in[place])
        return {STEP: self._steps[place], **row}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for step, number, place in zip(self._steps, self._layout_of, self._place_in, strict=True):
            yield {STEP: step, **self._layouts[number].row(place)}

    @property
    def last_step(self) -> int:
        """Step of the last row; 0 without any."""
        return self._steps[-1] if self._steps else 0

    @property
    def names(self) -> list[str]:
        """Names of the metrics, in order of their first appearance; not `step`."""
        return list(self._columns)

    def series(self, name: str) -> Series:
        """Steps and values of one metric, in the order of the rows; empty if no row has it."""
        parts = [(layout.rows, layout.values[column :: layout.width]) for layout, column in self._columns.get(name, ())]
        if len(parts) == 1:
            places, values = parts[0]
            return Series([self._steps[place] for place in places], values.tolist())
        points = sorted(
            itertools.chain.from_iterable(zip(*part, strict=True) for part in parts), key=lambda each: each[0]
        )
        return Series([self._steps[place] for place, _ in points], [value for _, value in points])

    def only(self, wanted: Callable[[str], bool]) -> "Rows":
        """The same rows with only the metrics whose names are wanted."""
        chosen = Rows(wanted=wanted)
        chosen._steps, chosen._layout_of, chosen._place_in = (
            each[:] for each in (self._steps, self._layout_of, self._place_in)
        )
        for layout in self._layouts:
            columns = [column for column, name in enumerate(layout.names) if wanted(name)]
            copy = chosen._add_layout([layout.names[column] for column in columns])
            copy.rows = layout.rows[:]
            copy.values = array("d", bytes(8 * len(columns) * len(layout.rows)))
            for place, column in enumerate(columns):
                copy.values[place :: copy.width] = layout.values[column :: layout.width]
        return chosen
