"""Reading of a few metrics out of lines that hold hundreds, several times faster than JSON is read.

The lines of a run repeat a few lists of names. A line whose characters other than those of numbers are those of a line that
was read as JSON has the same names in the same places, and only the wanted numbers are turned into numbers.
"""

import json
from collections.abc import Callable
from typing import Any

from sigmarep.diagnostics.rows import STEP
from sigmarep.training.metrics import MOST_STEPS

# Characters of numbers.
NUMBER = b"0123456789.+-eE"
# Lists of names that are told apart in a file; lines of more are read as JSON.
MOST_FORMS = 16


class Skimmer:
    """Reads the wanted metrics out of lines like those that `learn` was given.

    Args:
      wanted: tells of a name whether its values are wanted.
    """

    def __init__(self, wanted: Callable[[str], bool]):
        self._wanted = wanted
        # By the line without the characters of numbers: the wanted names, what stands before the value of each, and its
        # length.
        self._forms: dict[bytes, list[tuple[str, bytes, int]]] = {}

    def row(self, line: bytes) -> dict[str, Any] | None:
        """`step` and the wanted metrics of a line; None for a line that must be read as JSON.

        Of the other metrics only their places are compared, not whether each is a number.
        """
        form = self._forms.get(line.translate(None, NUMBER))
        if form is None:
            return None
        row: dict[str, Any] = {}
        start = 0
        try:
            for name, prefix, length in form:
                start = line.index(prefix, start) + length
                end = line.find(b",", start)
                value = line[start : end if end >= 0 else -2]
                row[name] = int(value) if name == STEP else float(value)
        except ValueError:
            return None
        return row if 0 <= row[STEP] < MOST_STEPS else None

    def learn(self, line: bytes, row: dict[str, Any]) -> None:
        """Takes a line as an example for those to come, if it is written as `json.dumps` does.

        Args:
          row: the line as JSON, with numbers alone.
        """
        if len(self._forms) >= MOST_FORMS or line.count(b'": ') != len(row):
            return
        fields = []
        for place, name in enumerate(row):
            if name == STEP or self._wanted(name):
                # No name has this in it: a quotation mark within one is escaped.
                prefix = f"{', ' if place else '{'}{json.dumps(name)}: ".encode()
                fields.append((name, prefix, len(prefix)))
        form = line.translate(None, NUMBER)
        self._forms[form] = fields
        if self.row(line) != {name: row[name] for name, *_ in fields}:
            del self._forms[form]
