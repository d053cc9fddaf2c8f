"""Reading of runs from disk, finished or not: a single run, a sweep, or a folder of runs."""

import ast
import dataclasses
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from sigmarep.diagnostics import files
from sigmarep.diagnostics.rows import Rows, Series
from sigmarep.errors import BadInput, one_line
from sigmarep.files import is_plain_name
from sigmarep.sweep_execution import RECORD, STOPPED_EARLY
from sigmarep.training.diagnosis import divergence_reason
from sigmarep.training.metrics import FILE
from sigmarep.training.stopped import stopped_early
from sigmarep.training.workdir_lock import FILE as LOCK
from sigmarep.training.workdir_lock import PATIENCE_SECONDS

CONFIG = "config.json"

# For the folder of each run: the folder of its sweep, if any, and the sweep's record of the run.
Folders = dict[str, tuple[str | None, dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
      name: shortest path of its folder that distinguishes it from the other runs.
      folder: folder of its files.
      state: "done"; "diverged"; "stopped early", by a callback; "unfinished", running or interrupted; "failed" or
        "bad input", from the record of its sweep; "unreadable".
      reason: reason of divergence, failure or early stop; None if unknown.
      rows: rows of metrics, in order.
      config: values by dotted name; {} if there is no configuration.
      environment: contents of environment.json; {} if there is none.
      total_steps: steps of the complete run; None if unknown.
      written: time at which the last row was logged, in seconds since 1970; None if there is none.
      sweep: folder of its sweep; None for a single run.
      point: its point of the sweep; {} for a single run.
      damage: words for its files that cannot be read, or only in part.
      process: of an unfinished run, see `process`.
    """

    name: str
    folder: str
    state: str
    reason: str | None
    rows: Rows
    config: dict[str, Any]
    environment: dict[str, Any]
    total_steps: int | None
    written: float | None
    sweep: str | None
    point: dict[str, Any]
    damage: list[str]
    process: str | None = None

    @property
    def attends(self) -> bool:
        """False if the layers that mix tokens have no attention weights, so that their entropy is not defined."""
        return self.config.get("model.token_mixing", "attention") == "attention"

    def series(self, name: str) -> Series:
        """Steps and values of one metric; empty if it was not logged."""
        return self.rows.series(name)

    def only(self, names: Collection[str]) -> "Run":
        """The same run with only these metrics."""
        return dataclasses.replace(self, rows=self.rows.only(names.__contains__))

    @property
    def names(self) -> list[str]:
        """Names of the logged metrics, in order of their first appearance."""
        return self.rows.names

    @property
    def last_step(self) -> int:
        """The last logged step; 0 if nothing is logged."""
        return self.rows.last_step


class Place(NamedTuple):
    """Location of a run on disk.

    Attributes:
      folder: folder of the run.
      name: short name of the folder, see `Run.name`.
      sweep: folder of its sweep; None for a single run.
      recorded: the sweep's record of the run; {} if there is none.
    """

    folder: str
    name: str
    sweep: str | None
    recorded: dict[str, Any]


class SearchResult(NamedTuple):
    """Places of runs, in the order of the folders, and notes for the reader about folders without runs."""

    places: list[Place]
    notes: list[str]


def find(folders: Sequence[str]) -> SearchResult:
    """Finds the runs in folders, without reading them. A folder is a run, a sweep, or contains runs.

    Raises:
      BadInput: a folder does not exist, or none of them has a run.
    """
    places: Folders = {}
    notes: list[str] = []
    for folder in folders:
        if not os.path.isdir(folder):
            raise BadInput(f"{folder}: there is no such folder")
        inside = _folders(folder, notes)
        if not inside:
            notes.append(f"{folder} holds no run.")
        # A run that is given twice, alone and with its sweep, keeps the sweep's record.
        places |= {each: record for each, record in inside.items() if each not in places or record[0]}
    if not places:
        raise BadInput(
            f"{', '.join(folders) or 'no folder was given'}: no run found; a run's folder has a {CONFIG} or a {FILE}, "
            "written by scripts/train.py --workdir"
        )
    names = _short(list(places))
    recorded = _distinguishing(places)
    return SearchResult([Place(folder, names[folder], *record) for folder, record in recorded.items()], notes)


def _distinguishing(places: Folders) -> Folders:
    """The records with points that lack the values that all of several runs share: these tell none from another."""
    points = [record.get("point") for _, record in places.values()]
    known = [point for point in points if isinstance(point, dict)]
    if len(known) < 2:
        return places
    first = known[0]
    shared = {
        key
        for key, value in first.items()
        if not key.endswith(("learning_rate", "seed", "arm"))
        and all(key in each and each[key] == value for each in known)
    }
    return {
        folder: (sweep, record | {"point": {key: value for key, value in point.items() if key not in shared}})
        if isinstance(point := record.get("point"), dict)
        else (sweep, record)
        for folder, (sweep, record) in places.items()
    }


def _folders(folder: str, notes: list[str]) -> Folders:
    """Folders of the runs in `folder`, with sweep and record; adds to `notes` what cannot be read."""
    folder = os.path.normpath(folder)
    if _is_run(folder):
        return {folder: (None, {})}
    inside = _inside(folder, notes)
    if not os.path.lexists(os.path.join(folder, RECORD)):
        return {each: (None, {}) for each in inside}
    record, damage = files.read_object(folder, RECORD)
    # A record may be a stranger's: its names are folders in that of the sweep, and lead nowhere else.
    usable = {name: entry for name, entry in record.items() if isinstance(entry, dict) and is_plain_name(name)}
    if damage:
        notes.append(f"{folder}: {damage}.")
    if left_out := len(record) - len(usable):
        notes.append(f"{folder}: {left_out} entries of {RECORD} are no runs in that folder, and are left out.")
    recorded: Folders = {os.path.join(folder, name): (folder, entry) for name, entry in usable.items()}
    # Runs that have not ended are not in the record yet.
    new = {each: (folder, _unrecorded(os.path.basename(each), usable)) for each in inside if each not in recorded}
    return recorded | new


def _unrecorded(name: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a run that has not ended: its point, read from its folder's name like those of the others."""
    point = next((each for entry in record.values() if isinstance(each := entry.get("point"), dict)), {})
    pairs = [part.partition("=") for part in name.split(",")]
    if not point or [key for key, _, _ in pairs] != [key.rsplit(".", 1)[-1] for key in point]:
        return {}
    return {"point": {key: _value(text) for key, (_, _, text) in zip(point, pairs, strict=True)}}


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _inside(folder: str, notes: list[str]) -> list[str]:
    try:
        paths = [os.path.join(folder, name) for name in sorted(os.listdir(folder))]
    except OSError as error:
        notes.append(f"{folder} cannot be read ({error.strerror}).")
        return []
    return [path for path in paths if _is_run(path)]


def _is_run(folder: str) -> bool:
    return any(os.path.lexists(os.path.join(folder, name)) for name in (CONFIG, FILE))


def _short(folders: list[str]) -> dict[str, str]:
    """Short names of folders: their last parts if these differ, else their paths relative to the common parent.

    Of names that a sweep gave, only the arguments that differ.
    """
    last = {folder: os.path.basename(os.path.abspath(folder)) for folder in folders}
    if len(set(last.values())) == len(folders):
        return _arguments(last)
    common = os.path.commonpath([os.path.abspath(folder) for folder in folders])
    return {folder: os.path.relpath(os.path.abspath(folder), common) for folder in folders}


def _arguments(names: dict[str, str]) -> dict[str, str]:
    """Names like `arm=sigma,seed=0` without the arguments that all of them have."""
    split = {folder: name.split(",") for folder, name in names.items()}
    if len(split) < 2 or not all("=" in part for parts in split.values() for part in parts):
        return names
    shared = set.intersection(*(set(parts) for parts in split.values()))
    short = {folder: ",".join(part for part in parts if part not in shared) for folder, parts in split.items()}
    return short if all(short.values()) and len(set(short.values())) == len(short) else names


def size(place: Place) -> int:
    """Size of the metrics that `read` would read, in bytes."""
    try:
        return os.path.getsize(os.path.join(place.folder, FILE))
    except OSError:
        return 0


def metrics_file(place: Place, wanted: Callable[[str], bool] | None = None) -> files.MetricsFile:
    """The metrics file of the run at a place, not read yet; see `files.MetricsFile`."""
    return files.MetricsFile(os.path.join(place.folder, FILE), wanted)


def read(place: Place, metrics: files.MetricsFile | None = None) -> Run:
    """Reads the run at a place as far as it has been logged.

    Args:
      metrics: the run's metrics file, of which only what is new is read.
    """
    folder, name, sweep, record = place
    metrics = metrics or metrics_file(place)
    metrics.update()
    rows = metrics.rows
    stored, config_damage = files.read_object(folder, CONFIG)
    environment, environment_damage = files.read_object(folder, "environment.json")
    config = _flat(stored)
    total = _steps(environment.get("total_steps")) or _steps(config.get("total_steps"))
    state, reason = _state(folder, record, rows, total)
    point = record.get("point")
    return Run(
        name=name,
        folder=folder,
        state=state,
        reason=reason,
        rows=rows,
        config=config,
        environment=environment,
        total_steps=total,
        written=metrics.written if rows else None,
        sweep=sweep,
        point=point if isinstance(point, dict) else {},
        damage=[each for each in (metrics.damage, config_damage, environment_damage) if each],
        process=process(folder) if state == "unfinished" else None,
    )


def process(folder: str) -> str | None:
    """The state of the process that trains in a folder, by the lock that it keeps fresh (`training.workdir_lock`).

    Returns:
      "running"; "ended" by itself, as after SIGTERM; "killed" without a word; None for a folder without a lock.
    """
    try:
        lock = os.lstat(os.path.join(folder, LOCK))
    except (OSError, ValueError):
        return None
    if not lock.st_size:
        return "ended"
    return "running" if time.time() - lock.st_mtime < PATIENCE_SECONDS else "killed"


def unreadable(place: Place, error: Exception) -> Run:
    """A run of which nothing can be told but the error."""
    return Run(
        name=place.name,
        folder=place.folder,
        state="unreadable",
        reason=f"{type(error).__name__}: {one_line(error)}",
        rows=Rows(),
        config={},
        environment={},
        total_steps=None,
        written=None,
        sweep=None,
        point={},
        damage=[],
    )


def _steps(value: Any) -> int | None:
    total = files.number(value)
    return int(total) if total is not None and total > 0 else None


def _state(folder: str, record: Mapping[str, Any], rows: Rows, total: int | None) -> tuple[str, str | None]:
    """The state of a run and the reason for it, None where there is nothing to say.

    Args:
      record: of the run in its sweep.
      total: steps of the run, if known.
    """
    diagnosis, _ = files.read_object(folder, "diagnosis.json")
    losses = rows.series("train/loss").values
    broken = next((why for loss in losses if (why := divergence_reason(loss, None, 0.0))), None)
    if diagnosis or record.get("state") == "diverged" or broken:
        return "diverged", _words(diagnosis.get("reason", broken))
    if stopped := stopped_early(folder):
        return STOPPED_EARLY, _words(stopped.reason)
    if record.get("state") in ("failed", "bad input"):
        return record["state"], files.last_line(os.path.join(folder, "log.txt"))
    finished = (total is not None and rows.last_step >= total) or record.get("state") == "done"
    return "done" if finished else "unfinished", None


def _words(reason: Any) -> str | None:
    return None if reason is None else " ".join(str(reason).split())


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, value in config.items():
        leaves |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return leaves
