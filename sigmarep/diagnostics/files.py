"""Files of runs that anybody may have written: what can be used of them, and words for what cannot."""

import functools
import json
import math
import os
from collections.abc import Callable
from typing import Any

from sigmarep.errors import one_line
from sigmarep.training.metrics import FILE

# Numbers that JSON has no word for, as `sigmarep.training.metrics` spells them.
SPELLED = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
# Larger whole numbers are no steps: floats do not tell them apart.
MOST_STEPS = 2**53


def read_rows(path: str) -> tuple[list[dict[str, Any]], str | None]:
    """The rows of a metrics file in order, and words for its damage; a missing file is empty.

    Rows have a whole number `step` and numbers alone: other values are left out, and lines without a step are too. An
    unfinished last line is no damage.
    """
    try:
        lines = _content(path).split(b"\n")
    except FileNotFoundError:
        return [], None
    except OSError as error:
        return [], f"{FILE} cannot be read ({error.strerror or error})"
    rows: list[dict[str, Any]] = []
    damaged: list[int] = []
    for number, line in enumerate(lines[:-1], 1):
        if not line:
            continue
        row, whole = _row(line)
        if row is not None:
            rows.append(row)
        if not whole:
            damaged.append(number)
    if not damaged:
        return rows, None
    return rows, f"{FILE}: {len(damaged)} of {len(lines) - 1} lines are damaged, line {damaged[0]} first"


def _row(line: bytes) -> tuple[dict[str, Any] | None, bool]:
    """The usable values of a line, None without a step; and True if all of them are usable."""
    try:
        row = _loads()(line)
    except (ValueError, RecursionError):
        return None, False
    if not isinstance(row, dict) or type(step := row.get("step")) is not int or not 0 <= step < MOST_STEPS:
        return None, False
    # Most rows have numbers alone, and are taken as they are.
    if set(map(type, row.values())) <= {int, float}:
        return row, True
    numbers = {name: SPELLED.get(value, value) if isinstance(value, str) else value for name, value in row.items()}
    usable = {name: value for name, value in numbers.items() if type(value) in (int, float)}
    return usable, len(usable) == len(row)


def read_object(folder: str, name: str) -> tuple[dict[str, Any], str | None]:
    """The JSON object in a file of a run, and words for its damage; a missing file is {}."""
    try:
        content = json.loads(_content(os.path.join(folder, name)), parse_int=_integer)
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
        lines = _content(path).decode(errors="replace").strip().splitlines()
    except OSError:
        return None
    return lines[-1][:most] if lines else None


def number(value: Any) -> float | None:
    """The value if it is a finite number, else None."""
    return value if type(value) in (int, float) and math.isfinite(value) else None


def _content(path: str) -> bytes:
    """The contents of a regular file; a pipe or a device would be read for ever."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(f"{os.path.basename(path)} is no file")
    with open(path, "rb") as file:
        return file.read()


def _integer(text: str) -> float:
    """A whole number; those beyond 64 bits as floats, which every computation takes."""
    return int(text) if len(text) < 19 else float(text)


@functools.cache
def _loads() -> Callable[[bytes], Any]:
    # The same numbers in a fifth of the time: a report reads hundreds of megabytes. It comes with the extra "report".
    try:
        import orjson
    except ImportError:
        return functools.partial(json.loads, parse_int=_integer)
    return orjson.loads
