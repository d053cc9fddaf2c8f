"""Files of runs that anybody may have written: what can be used of them, and words for what cannot."""

import json
import math
import os
from typing import Any

from sigmarep.errors import one_line
from sigmarep.files import read_file
from sigmarep.training.metrics import FILE, integer, parse


def read_rows(path: str) -> tuple[list[dict[str, Any]], str | None]:
    """The rows of a metrics file in order, and words for its damage; a missing file is empty.

    Rows have a whole number `step` and numbers alone: other values are left out, and lines without a step are too. An
    unfinished last line is no damage.
    """
    try:
        lines = read_file(path).split(b"\n")
    except FileNotFoundError:
        return [], None
    except OSError as error:
        return [], f"{FILE} cannot be read ({error.strerror or error})"
    rows: list[dict[str, Any]] = []
    damaged: list[int] = []
    for number, line in enumerate(lines[:-1], 1):
        if not line:
            continue
        row, whole = parse(line)
        if row is not None:
            rows.append(row)
        if not whole:
            damaged.append(number)
    if not damaged:
        return rows, None
    return rows, f"{FILE}: {len(damaged)} of {len(lines) - 1} lines are damaged, line {damaged[0]} first"


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
