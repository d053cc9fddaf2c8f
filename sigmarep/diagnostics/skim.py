"""Reading of a few metrics out of lines that hold hundreds, several times faster than all of a line is read.

The lines of a run repeat a few lists of names. A line whose characters other than those of numbers are those of a line that
was read as JSON has the same fields in the same places, and only the wanted ones are read.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from sigmarep.diagnostics.rows import STEP
from sigmarep.training.metrics import MOST_STEPS, decoded

# Characters of numbers.
NUMBER = b"0123456789.+-eE"
# Lists of names that are told apart in a file; lines of more are read as JSON.
MOST_FORMS = 16


class _Form(NamedTuple):
    """The wanted fields of lines that are alike but for their numbers.

    Attributes:
      names: of the wanted metrics, and of the step, in order.
      fields: takes these fields out of all fields of a line.
      length: number of fields up to the last of them.
      begin, end: what a JSON object of them lacks at its begin and its end.
    """

    names: tuple[str, ...]
    fields: Callable[[Sequence[bytes]], Sequence[bytes]]
    length: int
    begin: bytes
    end: bytes


class Skimmer:
    """Reads the wanted metrics out of lines like those that `learn` was given.

    Args:
      wanted: tells of a name whether its values are wanted.
    """

    def __init__(self, wanted: Callable[[str], bool]):
        self._wanted = wanted
        # By the line without the characters of numbers.
        self._forms: dict[bytes, _Form] = {}
        # That of the last line, which most lines share: comparing it costs less than hashing it.
        self._last: tuple[bytes, _Form] | None = None

    def row(self, line: bytes) -> dict[str, Any] | None:
        """`step` and the wanted metrics of a line; None for a line that must be read as JSON.

        Of the other metrics only their places are compared, not whether each is a number.
        """
        rest = line.translate(None, NUMBER)
        if self._last is None or self._last[0] != rest:
            form = self._forms.get(rest)
            if form is None:
                return None
            self._last = rest, form
        names, fields, count, begin, end = self._last[1]
        try:
            # Fields behind the last wanted one are left together; the wanted ones alone are read as JSON.
            row = decoded(begin + b", ".join(fields(line.split(b", ", count))) + end)
        except (ValueError, RecursionError):
            return None
        # Digits in names are no part of the form.
        if tuple(row) != names or type(step := row[STEP]) is not int or not 0 <= step < MOST_STEPS:
            return None
        return row

    def learn(self, line: bytes, row: dict[str, Any]) -> None:
        """Takes a line as an example for those to come, if it is written as `json.dumps` does.

        Args:
          row: the line as JSON, with numbers alone.
        """
        # A name may have a comma or a colon in it; such lines are read as JSON.
        if len(self._forms) >= MOST_FORMS or line.count(b'": ') != len(row) or line.count(b", ") != len(row) - 1:
            return
        places = {name: place for place, name in enumerate(row) if name == STEP or self._wanted(name)}
        *_, last = places.values()
        take = operator.itemgetter(*places.values())
        rest = line.translate(None, NUMBER)
        self._forms[rest] = _Form(
            names=tuple(places),
            # Of a single field it would return the bare one.
            fields=take if len(places) > 1 else lambda each: (take(each),),
            length=last + 1,
            begin=b"" if 0 in places.values() else b"{",
            end=b"" if last == len(row) - 1 else b"}",
        )
        if self.row(line) != {name: row[name] for name in places}:
            del self._forms[rest]
            self._last = None
