"""Many runs of one configuration file: which there are, and what became of each.

A file's `sweep()` returns points. A point maps a name to a value: `arm` is an argument of the file, behind its colon;
`config.optimizer.learning_rate` is a field. `values`, `product`, `zipped` and `seeds` make lists of points:

    def sweep():
        return product(values("arm", "pre_ln", "sigma"), values("learning_rate", 1e-3, 1e-2), seeds(3))
"""

import concurrent.futures
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from sigmarep.errors import BadInput, Diverged, SigmarepError, Stopped
from sigmarep.files import locked, write_atomically
from sigmarep.training.diagnosis import ENTROPY
from sigmarep.training.metrics import read_metrics
from sigmarep.training.stopped import stopped_early

Point = dict[str, Any]
# What a run's exit status says of it.
STATES = {
    0: "done",
    Diverged.exit_status: "diverged",
    BadInput.exit_status: "bad input",
    Stopped.exit_status: "stopped",
    # Before its first step and after its last one a run has nothing to save, and SIGTERM simply ends it.
    -signal.SIGTERM: "stopped",
}
# That of a run which a callback ended; its exit status is 0.
STOPPED_EARLY = "stopped early"
# Such runs are not made again.
FINAL = ("done", STOPPED_EARLY, "diverged")
RECORD = "sweep.json"


def values(name: str, *each: Any) -> list[Point]:
    """One point for each value."""
    return [{name: value} for value in each]


def seeds(count: int) -> list[Point]:
    """One point for each of the seeds 0, 1, …"""
    return values("config.seed", *range(count))


def product(*lists: Iterable[Point]) -> list[Point]:
    """Every combination of one point of each list; the last list changes fastest."""
    return [{k: v for point in points for k, v in point.items()} for points in itertools.product(*lists)]


def zipped(*lists: Sequence[Point]) -> list[Point]:
    """The first points of all lists together, the second ones, and so on.

    Raises:
      ValueError: the lists have different lengths.
    """
    return [{k: v for point in points for k, v in point.items()} for points in zip(*lists, strict=True)]


class Run(NamedTuple):
    """`name` of its folder, the `point`, and the `command` that trains it."""

    name: str
    point: Point
    command: list[str]


class Outcome(NamedTuple):
    """A final run: its `point`, its `state` (one of `FINAL`), and `rows`, its metrics in the order of the steps."""

    point: Point
    state: str
    rows: list[dict[str, Any]]

    @property
    def logged(self) -> list[dict[str, Any]]:
        """The rows of training steps."""
        return [row for row in self.rows if "train/loss" in row]

    @property
    def evaluation(self) -> dict[str, float]:
        """The last evaluation, {} if the run diverged."""
        if self.state == "diverged":
            return {}
        return {name: value for row in self.rows for name, value in row.items() if name.startswith("eval/")}

    def entropies(self) -> dict[str, float]:
        """The attention entropy of every layer in nats after the last logged step."""
        last = self.logged[-1]
        return {name.removeprefix(ENTROPY): value for name, value in last.items() if name.startswith(ENTROPY)}


def runs(path: str, points: Sequence[Point], workdir: str, script: str, imports: Sequence[str] = ()) -> list[Run]:
    """The run of every point, in the order of the points.

    Args:
      path: of the configuration file.
      workdir: of the sweep; each run has a folder in it.
      script: scripts/train.py.
      imports: values of its flag --import.

    Raises:
      BadInput: there is no point, or two points are the same run.
    """
    if not points:
        raise BadInput(f"--config {path}: its sweep() has no points")
    found: dict[str, Run] = {}
    for point in points:
        name = run_name(point)
        if name in found:
            raise BadInput(f"--config {path}: its sweep() has two points {name!r}; make them differ")
        arguments = ",".join(f"{key}={value}" for key, value in point.items() if not key.startswith("config."))
        overrides = [f"--{key}={value}" for key, value in point.items() if key.startswith("config.")]
        file = f"{path}:{arguments}" if arguments else path
        command = [sys.executable, script, "--config", file, "--workdir", os.path.join(workdir, name), *overrides]
        imported = [f"--import={module}" for module in imports]
        found[name] = Run(name, point, [*command, "--config.writers.progress=plain", *imported])
    return list(found.values())


def run_name(point: Point) -> str:
    """A folder's name: last parts of the names and the values, for example `arm=sigma,learning_rate=0.01,seed=0`."""
    text = ",".join(f"{key.rsplit('.', 1)[-1]}={value}" for key, value in point.items())
    return re.sub(r"[^\w.,=+-]", "_", text)


def read_record(workdir: str) -> dict[str, dict[str, Any]]:
    """What became of the runs of a sweep so far: by name `point`, `state`, `status` and `seconds`; {} before any.

    Raises:
      BadInput: the record cannot be read.
    """
    path = os.path.join(workdir, RECORD)
    try:
        with open(path) as file:
            return json.load(file)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: cannot be read ({error}); remove it, and finished runs are looked at again") from None


def execute(
    todo: Sequence[Run],
    workdir: str,
    *,
    jobs: int,
    say: Callable[[str], None],
    environment: dict[str, str] | None = None,
) -> dict[str, dict[str, Any]]:
    """Makes the runs that are not final yet, `jobs` at a time, and returns the record of all.

    A run's output is kept in `log.txt` of its folder. The record is written after every run, so that a sweep that is
    stopped goes on where it was; several machines may write it. Where this process is interrupted its runs are sent
    SIGTERM, and save their states.
    """
    record = read_record(workdir)
    lock, stopping = threading.Lock(), threading.Event()
    processes: set[subprocess.Popen] = set()
    waiting = [run for run in todo if record.get(run.name, {}).get("state") not in FINAL]
    say(f"{len(todo)} runs, {len(todo) - len(waiting)} finished before, {jobs} at a time")

    def one(run: Run) -> None:
        if stopping.is_set():
            return
        folder = os.path.join(workdir, run.name)
        os.makedirs(folder, exist_ok=True)
        start = time.monotonic()
        with open(os.path.join(folder, "log.txt"), "a") as log:
            # In a group of their own: a terminal's Ctrl-C would reach the runs as well as this process.
            process = subprocess.Popen(
                run.command, stdout=log, stderr=subprocess.STDOUT, env=environment, process_group=0
            )
            processes.add(process)
            status = process.wait()
            processes.discard(process)
        state = STATES.get(status, "failed")
        if state == "done" and stopped_early(folder):
            state = STOPPED_EARLY
        with lock:
            seconds = round(time.monotonic() - start, 1)
            record[run.name] = {"point": run.point, "state": state, "status": status, "seconds": seconds}
            _note(workdir, run.name, record[run.name])
            say(f"{run.name}: {state} after {seconds:.0f} s{_reason(folder, state)}")

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(one, run) for run in waiting]
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()
        except BaseException:
            stopping.set()
            for process in list(processes):
                process.terminate()
            raise
    return record


def compare(path: str, points: Sequence[Point], workdir: str, script: str, *, jobs: int | None = None) -> list[Outcome]:
    """Makes every run of `points` that is not final yet, as scripts/sweep.py does, and reads the metrics of each.

    Progress goes to the standard error stream.

    Args:
      path, points, workdir, script: see `runs`.
      jobs: runs at a time, `default_jobs()` if None.

    Returns:
      One outcome a point, in their order.

    Raises:
      BadInput: see `runs`.
      SigmarepError: a run failed, was refused or was stopped.
    """
    todo = runs(path, points, workdir, script)
    os.makedirs(workdir, exist_ok=True)
    record = execute(
        todo,
        workdir,
        jobs=jobs or default_jobs(),
        say=lambda text: print(text, file=sys.stderr, flush=True),
        environment=shared_cache(workdir),
    )
    outcomes = []
    for run in todo:
        folder, state = os.path.join(workdir, run.name), record[run.name]["state"]
        if state not in FINAL:
            raise SigmarepError(f"{folder}: {state}{_reason(folder, state)}; the same command makes this run again")
        outcomes.append(Outcome(run.point, state, read_metrics(os.path.join(folder, "metrics.jsonl"))))
    return outcomes


def default_jobs() -> int:
    """Runs at a time where nothing is asked for: half of the cores."""
    return max((os.cpu_count() or 2) // 2, 1)


def shared_cache(workdir: str) -> dict[str, str]:
    """An environment in which the runs of a sweep compile the programs that they share once."""
    return {"JAX_COMPILATION_CACHE_DIR": os.path.join(os.path.abspath(workdir), ".compiled"), **os.environ}


def _reason(folder: str, state: str) -> str:
    """Why a callback ended the run; the last line that it printed, if it did not end well; else nothing."""
    if state == "done":
        return ""
    if state == STOPPED_EARLY and (stopped := stopped_early(folder)):
        return f" ({stopped.reason})"
    with open(os.path.join(folder, "log.txt"), errors="replace") as file:
        lines = file.read().strip().splitlines()
    return f" ({lines[-1]})" if lines else ""


def _note(workdir: str, name: str, outcome: dict[str, Any]) -> None:
    """Adds what became of a run to the record."""
    path = os.path.join(workdir, RECORD)
    with locked(path):
        write_atomically(path, json.dumps(read_record(workdir) | {name: outcome}, indent=2))


def table(todo: Sequence[Run], workdir: str) -> list[tuple[str, str, str, str]]:
    """Of every run: name, state ("waiting" before its first end), the last logged step and its training loss."""
    record = read_record(workdir)
    rows = []
    for run in todo:
        path = os.path.join(workdir, run.name, "metrics.jsonl")
        logged = [row for row in read_metrics(path) if "train/loss" in row]
        step, loss = (str(logged[-1]["step"]), f"{logged[-1]['train/loss']:.4g}") if logged else ("", "")
        rows.append((run.name, record.get(run.name, {}).get("state", "waiting"), step, loss))
    return rows
