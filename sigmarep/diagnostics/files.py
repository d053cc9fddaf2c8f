"""Files of runs that anybody may have written: what can be used of them, and words for what cannot."""

import errno
import json
import math
import os
from collections.abc import Callable
from typing import Any, BinaryIO

from sigmarep.diagnostics.rows import Rows
from sigmarep.diagnostics.skim import Skimmer
from sigmarep.errors import one_line
from sigmarep.files import open_file, read_file
from sigmarep.training.metrics import FILE, integer, parse

# Bytes of a metrics file at its begin and before what is new that tell whether it goes on where it was.
CHECKED = 256
# Bytes of a line.
LONGEST = 64 * 2**20


class MetricsFile:
    """The metrics file of a run that may still be written: `update` reads what has been added since the last time.

    Rows have a whole number `step` and numbers alone: other values are left out, and lines without a step are too. An
    unfinished last line is left for the next time. A file that is not a continuation of what was read is read anew.

    Args:
      path: of the file, which need not exist.
      wanted: tells of a name whether its values are held (`rows.Rows`).

    Attributes:
      rows: the rows read so far.
      damage: words for what cannot be used; None where all can be.
      written: time of the last change in seconds since 1970; None without a file.
    """

    def __init__(self, path: str, wanted: Callable[[str], bool] | None = None):
        self.path, self._wanted = path, wanted
        self._signature: tuple[int, ...] | None = None
        self._reset()

    def _reset(self) -> None:
        self.rows = Rows(wanted=self._wanted)
        self._skimmer = Skimmer(self._wanted) if self._wanted else None
        self.written: float | None = None
        self._problem: str | None = None
        self._lines = self._offset = self._damaged = self._first_damaged = 0
        # What the file begins with, and what it has before the offset.
        self._head = self._tail = b""

    @property
    def damage(self) -> str | None:
        if self._problem or not self._damaged:
            return self._problem
        return f"{FILE}: {self._damaged} of {self._lines} lines are damaged, line {self._first_damaged} first"

    def update(self) -> bool:
        """Reads what is new; False if the file is as it was."""
        try:
            status = os.stat(self.path)
        except OSError as error:
            gone = error.errno == errno.ENOENT
            problem = None if gone else f"{FILE} cannot be read ({error.strerror or error})"
            changed = self._signature is not None or problem != self._problem
            self._reset()
            self._signature, self._problem = None, problem
            return changed
        signature = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        if signature == self._signature:
            return False
        try:
            self._read(status)
        except OSError as error:
            self._reset()
            self._problem = f"{FILE} cannot be read ({error.strerror or error})"
        self._signature, self.written = signature, status.st_mtime
        return True

    def narrow(self, wanted: Callable[[str], bool]) -> None:
        """Lets go of the metrics whose names are not wanted."""
        self._wanted, self.rows, self._skimmer = wanted, self.rows.only(wanted), Skimmer(wanted)

    def _read(self, status: os.stat_result) -> None:
        with open_file(self.path) as file:
            same_file = self._signature is None or self._signature[:2] == (status.st_dev, status.st_ino)
            if not same_file or status.st_size < self._offset or not self._continues(file):
                self._reset()
            file.seek(self._offset)
            while (line := file.readline(LONGEST)).endswith(b"\n"):
                self._offset += len(line)
                self._tail = line[-CHECKED:]
                self._add(line)
            if len(line) == LONGEST:
                raise OSError(errno.EFBIG, f"a line is longer than {LONGEST} bytes")
            if not self._head and self._offset >= CHECKED:
                file.seek(0)
                self._head = file.read(CHECKED)

    def _continues(self, file: BinaryIO) -> bool:
        """True if the file still has what was read of it, by its first and last bytes."""
        file.seek(0)
        if not file.read(CHECKED).startswith(self._head):
            return False
        file.seek(self._offset - len(self._tail))
        return file.read(len(self._tail)) == self._tail

    def _add(self, line: bytes) -> None:
        self._lines += 1
        if line == b"\n":
            return
        if self._skimmer and (row := self._skimmer.row(line)):
            self.rows.append(row)
            return
        row, whole = parse(line)
        if row is not None:
            self.rows.append(row)
            if whole and self._skimmer:
                self._skimmer.learn(line, row)
        if not whole:
            self._damaged += 1
            self._first_damaged = self._first_damaged or self._lines


def read_object(folder: str, name: str) -> tuple[dict[str, Any], str | None]:
    """The JSON object in a file of a run, and words for its damage; a missing file is {}."""
    try:
        content = json.loads(read_file(os.path.join(folder, name)), parse_int=integer)
    except FileNotFoundError:
        return {}, None
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        return {}, f"{name} cannot be read ({reason or one_line(error, most=80)})"
    if not isinstance(content, dict):
        return {}, f"{name} holds a {type(content).__name__}; expected an object"
    return content, None


def last_line(path: str, *, most: int = 500) -> str | None:
    """The last line of a text file, at most `most` characters of it; None if it has none or cannot be read."""
    try:
        lines = read_file(path).decode(errors="replace").strip().splitlines()
    except OSError:
        return None
    return lines[-1][:most] if lines else None


def number(value: Any) -> float | None:
    """The value if it is a finite number, else None."""
    return value if type(value) in (int, float) and math.isfinite(value) else None
