"""Runs as they lie on the disk: one, a sweep of them, a folder of them; finished or not."""

import dataclasses
import functools
import json
import math
import os
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from sigmarep.errors import BadInput
from sigmarep.sweeps import RECORD, STOPPED_EARLY, read_record
from sigmarep.training.metrics import FILE, metric_names, read_metrics
from sigmarep.training.stopped import stopped_early

CONFIG = "config.json"

# Folders of runs: of each the sweep that it is part of, if any, and what that recorded of it.
Folders = dict[str, tuple[str | None, dict[str, Any]]]


class Series(NamedTuple):
    """Of one metric the `steps` at which it was logged, and its `values`."""

    steps: list[int]
    values: list[float]


@dataclasses.dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
      name: its folder, as short as tells it from the others.
      folder: of its files.
      state: "done"; "diverged"; "stopped early", by a callback; "unfinished", still going or stopped; "failed" or
        "bad input", as its sweep recorded.
      reason: why it diverged, failed or was stopped early, if that is known.
      rows: of its metrics, in order.
      config: by dotted name, {} if there is none.
      environment: what it ran on, {} if that is not known.
      total_steps: of the whole run, None if that is not known.
      age: seconds since something was logged, None if nothing was.
      sweep: folder of the sweep that it is part of, and `point`, its place there.
    """

    name: str
    folder: str
    state: str
    reason: str | None
    rows: list[dict[str, Any]]
    config: dict[str, Any]
    environment: dict[str, Any]
    total_steps: int | None
    age: float | None
    sweep: str | None
    point: dict[str, Any]

    def series(self, name: str) -> Series:
        """The values of one metric, empty if it was not logged."""
        found = [(row["step"], row[name]) for row in self.rows if name in row]
        return Series([step for step, _ in found], [value for _, value in found])

    def only(self, names: Sequence[str]) -> "Run":
        """The same run with these metrics alone."""
        rows = [{name: row[name] for name in ("step", *names) if name in row} for row in self.rows]
        return dataclasses.replace(self, rows=rows)

    @functools.cached_property
    def names(self) -> list[str]:
        """The metrics that were logged, in order of their first appearance."""
        return metric_names(self.rows)

    @property
    def last_step(self) -> int:
        """0 before anything was logged."""
        return self.rows[-1]["step"] if self.rows else 0


class Place(NamedTuple):
    """Where a run lies: its `folder`, the short `name` of that, its `sweep`'s folder, and what the sweep `recorded`."""

    folder: str
    name: str
    sweep: str | None
    recorded: dict[str, Any]


class Found(NamedTuple):
    """`places` of runs, in the order of the folders; `notes`, what a reader must know of folders that gave none."""

    places: list[Place]
    notes: list[str]


def find(folders: Sequence[str]) -> Found:
    """Where the runs of every folder lie, which is a run itself, a sweep's, or holds runs. Reads none of them.

    Raises:
      BadInput: a folder does not exist, or there is no run in any of them.
    """
    places: Folders = {}
    notes = []
    for folder in folders:
        if not os.path.isdir(folder):
            raise BadInput(f"{folder}: there is no such folder")
        found = _folders(folder)
        if not found:
            notes.append(f"{folder} holds no run.")
        # A run that is named twice keeps what its sweep knows of it.
        places |= {each: of for each, of in found.items() if each not in places or of[0]}
    if not places:
        raise BadInput(
            f"{', '.join(folders) or 'no folder was given'}: no run found; a run's folder has a {CONFIG} or a {FILE}, as "
            "scripts/train.py --workdir makes it"
        )
    names = _short(list(places))
    return Found([Place(folder, names[folder], *of) for folder, of in places.items()], notes)


def _folders(folder: str) -> Folders:
    """Folders of runs in `folder`: of each the sweep that it belongs to, if any, and what that recorded of it."""
    folder = os.path.normpath(folder)
    if _is_run(folder):
        return {folder: (None, {})}
    record = read_record(folder)
    if record or os.path.exists(os.path.join(folder, RECORD)):
        inside: Folders = {os.path.join(folder, name): (folder, of) for name, of in record.items()}
        # The record has a run when it has ended.
        return inside | {each: (folder, {}) for each in _inside(folder) if each not in inside}
    return {each: (None, {}) for each in _inside(folder)}


def _inside(folder: str) -> list[str]:
    found = [os.path.join(folder, name) for name in sorted(os.listdir(folder))]
    return [each for each in found if _is_run(each)]


def _is_run(folder: str) -> bool:
    return any(os.path.exists(os.path.join(folder, name)) for name in (CONFIG, FILE))


def _short(folders: list[str]) -> dict[str, str]:
    """Names of folders: their last parts where these differ, what follows their common parent where they do not."""
    last = {folder: os.path.basename(os.path.abspath(folder)) for folder in folders}
    if len(set(last.values())) == len(folders):
        return last
    common = os.path.commonpath([os.path.abspath(folder) for folder in folders])
    return {folder: os.path.relpath(os.path.abspath(folder), common) for folder in folders}


def size(place: Place) -> int:
    """Bytes of metrics that `read` would read."""
    try:
        return os.path.getsize(os.path.join(place.folder, FILE))
    except OSError:
        return 0


def read(place: Place) -> Run:
    """The run of a place, as far as it has come."""
    folder, name, sweep, record = place
    path = os.path.join(folder, FILE)
    unreadable = None
    try:
        rows = read_metrics(path)
    except (OSError, ValueError) as error:
        rows, unreadable = [], f"{FILE} cannot be read ({error})"
    try:
        age = time.time() - os.path.getmtime(path) if rows else None
    except OSError:
        age = None
    config = _flat(_json(folder, CONFIG))
    environment = _json(folder, "environment.json")
    total = environment.get("total_steps") or config.get("total_steps")
    total = int(total) if total else None
    last = rows[-1]["step"] if rows else 0
    finished = (total is not None and last >= total) or record.get("state") == "done"
    state, reason = "done" if finished else "unfinished", None
    diagnosis = _json(folder, "diagnosis.json")
    broken = next((row for row in rows if not math.isfinite(row.get("train/loss", 0.0))), None)
    if diagnosis or record.get("state") == "diverged" or broken:
        why = f"the loss became {broken['train/loss']}" if broken else None
        state, reason = "diverged", diagnosis.get("reason", why)
    elif stopped := stopped_early(folder):
        state, reason = STOPPED_EARLY, stopped.reason
    elif record.get("state") in ("failed", "bad input"):
        state, reason = record["state"], _last_line(os.path.join(folder, "log.txt"))
    return Run(
        name=name,
        folder=folder,
        state=state,
        reason=unreadable or reason,
        rows=rows,
        config=config,
        environment=environment,
        total_steps=total,
        age=age,
        sweep=sweep,
        point=record.get("point", {}),
    )


def _json(folder: str, name: str) -> dict[str, Any]:
    """The contents of a file of a run; {} if it is missing, or is being written."""
    try:
        with open(os.path.join(folder, name)) as file:
            found = json.load(file)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, value in config.items():
        leaves |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return leaves


def _last_line(path: str) -> str | None:
    try:
        with open(path, errors="replace") as file:
            lines = file.read().strip().splitlines()
    except OSError:
        return None
    return lines[-1] if lines else None
