"""Sweeps: the runs of one configuration file, their execution, and the record of their outcomes.

A file's `sweep()` returns points. A point maps names to values: a name such as `arm` is an argument of the file, given
after its colon; a name such as `config.optimizer.learning_rate` is a field. `values`, `product`, `zipped` and `seeds` make
lists of points:

    def sweep():
        return product(values("arm", "pre_ln", "sigma"), values("learning_rate", 1e-3, 1e-2), seeds(3))
"""

import collections
import concurrent.futures
import itertools
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from sigmarep.errors import BadInput, Diverged, SigmarepError, Stopped, one_line
from sigmarep.files import locked, read_json, write_atomically
from sigmarep.training.diagnosis import ENTROPY
from sigmarep.training.metrics import read_metrics
from sigmarep.training.stopped import stopped_early
from sigmarep.training.workdir_lock import holder
from sigmarep.worker import Worker

Point = dict[str, Any]
# State of a run by its exit status.
STATES = {
    0: "done",
    Diverged.exit_status: "diverged",
    BadInput.exit_status: "bad input",
    Stopped.exit_status: "stopped",
    # SIGTERM before the first step or after the last, when there is nothing to save.
    -signal.SIGTERM: "stopped",
}
# State of a run that was ended by a callback; its exit status is 0.
STOPPED_EARLY = "stopped early"
# Runs in these states are not repeated.
FINAL = ("done", STOPPED_EARLY, "diverged")
RECORD = "sweep.json"
HOLDER_SECONDS = 0.5


def values(name: str, *each: Any) -> list[Point]:
    """Makes one point per value."""
    return [{name: value} for value in each]


def seeds(count: int) -> list[Point]:
    """Makes one point per seed 0, 1, …"""
    return values("config.seed", *range(count))


def product(*lists: Iterable[Point]) -> list[Point]:
    """Combines every point of each list with every point of the others; the last list varies fastest."""
    return [{k: v for point in points for k, v in point.items()} for points in itertools.product(*lists)]


def zipped(*lists: Sequence[Point]) -> list[Point]:
    """Combines the first points of all lists, then the second points, and so on.

    Raises:
      ValueError: the lists have different lengths.
    """
    return [{k: v for point in points for k, v in point.items()} for points in zip(*lists, strict=True)]


class PlannedRun(NamedTuple):
    """A run of a sweep: the name of its folder, its point, and the command that trains it.

    Attributes:
      arguments: of scripts/train.py.
      start: the beginning of the command: Python, the script, and flags of all runs.
    """

    name: str
    point: Point
    arguments: list[str]
    start: list[str]

    @property
    def command(self) -> list[str]:
        """The command that makes this run alone."""
        return [*self.start[:2], *self.arguments, *self.start[2:]]


class Outcome(NamedTuple):
    """A finished run.

    Attributes:
      point: its point of the sweep.
      state: one of `FINAL`.
      rows: its rows of metrics, in the order of steps.
    """

    point: Point
    state: str
    rows: list[dict[str, Any]]

    @property
    def logged(self) -> list[dict[str, Any]]:
        """Rows of training steps."""
        return [row for row in self.rows if "train/loss" in row]

    @property
    def evaluation(self) -> dict[str, float]:
        """Metrics of the last evaluation; {} if the run diverged."""
        if self.state == "diverged":
            return {}
        return {name: value for row in self.rows for name, value in row.items() if name.startswith("eval/")}

    def entropies(self) -> dict[str, float]:
        """Attention entropy of every layer at the last logged step, in nats."""
        last = self.logged[-1]
        return {name.removeprefix(ENTROPY): value for name, value in last.items() if name.startswith(ENTROPY)}


def runs(
    path: str, points: Sequence[Point], workdir: str, script: str, imports: Sequence[str] = ()
) -> list[PlannedRun]:
    """Plans the run of every point, in the order of the points.

    Args:
      path: the configuration file.
      points: the points of the sweep.
      workdir: folder of the sweep; each run gets a folder in it.
      script: path of scripts/train.py.
      imports: values of the script's flag --import.

    Raises:
      BadInput: there is no point, or two points have the same name.
    """
    if not points:
        raise BadInput(f"--config {path}: its sweep() has no points")
    planned: dict[str, PlannedRun] = {}
    for point in points:
        name = run_name(point)
        if name in planned:
            raise BadInput(f"--config {path}: its sweep() has two points {name!r}; make them differ")
        given = ",".join(f"{key}={value}" for key, value in point.items() if not key.startswith("config."))
        overrides = [f"--{key}={value}" for key, value in point.items() if key.startswith("config.")]
        file = f"{path}:{given}" if given else path
        arguments = ["--config", file, "--workdir", os.path.join(workdir, name), *overrides]
        imported = [f"--import={module}" for module in imports]
        planned[name] = PlannedRun(
            name, point, [*arguments, "--config.writers.progress=plain"], [sys.executable, script, *imported]
        )
    return list(planned.values())


def run_name(point: Point) -> str:
    """Name of a point's folder, such as `arm=sigma,learning_rate=0.01,seed=0`: last parts of names, and values."""
    text = ",".join(f"{key.rsplit('.', 1)[-1]}={value}" for key, value in point.items())
    return re.sub(r"[^\w.,=+-]", "_", text)


def read_record(workdir: str) -> dict[str, dict[str, Any]]:
    """Reads the record of the runs that have ended: `point`, `state`, `status` and `seconds` by name; {} without any.

    Raises:
      BadInput: the record cannot be read.
    """
    path = os.path.join(workdir, RECORD)
    try:
        record = read_json(path)
        if not isinstance(record, dict) or not all(isinstance(each, dict) for each in record.values()):
            raise ValueError("expected an object of objects")
        return record
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: cannot be read ({one_line(error)}); move it away to start a new record") from None


def finished_runs(workdir: str) -> dict[str, "Outcome"]:
    """The outcomes of a sweep's runs that are done or diverged, by name; those whose folders no longer exist are left out.

    Raises:
      BadInput: the folder has no sweep, or a file of metrics cannot be read.
    """
    record = read_record(workdir)
    if not record:
        raise BadInput(f"--workdir {workdir}: holds no sweep (there is no {RECORD}, or nothing in it)")
    outcomes = {}
    for name, run in record.items():
        if run["state"] not in ("done", "diverged"):
            continue
        path = os.path.join(workdir, name, "metrics.jsonl")
        try:
            rows = read_metrics(path)
        except (OSError, json.JSONDecodeError) as error:
            raise BadInput(f"{path}: cannot be read ({error})") from None
        if rows or run["state"] == "diverged":
            outcomes[name] = Outcome(run["point"], run["state"], rows)
    return outcomes


def execute(
    todo: Sequence[PlannedRun],
    workdir: str,
    *,
    jobs: int,
    say: Callable[[str], None],
    environment: dict[str, str] | None = None,
    vectorize: int = 1,
) -> dict[str, dict[str, Any]]:
    """Makes the runs that are not finished, and returns the record of all.

    Runs of one program (`sigmarep.training.experiment.program_key`) are made one after another in one process, which
    compiles it once, or several together by one vectorized program (`sigmarep.training.lanes`). A run's metrics are those
    that it has alone, and how it ends is its own affair: after a run that failed, or was killed, another process goes on.

    The output of a run goes to `log.txt` in its folder. The record is updated after every run, so that an interrupted
    sweep continues where it was; several machines may update it. If this process is interrupted, or killed, its runs
    receive SIGTERM and save their states. A run that another process of this host trains is waited for.

    Args:
      todo: the runs of the sweep.
      workdir: folder of the sweep.
      jobs: number of processes at a time.
      say: receives lines of progress.
      environment: environment variables of the runs; None for those of this process.
      vectorize: most runs that a process makes together.

    Raises:
      BadInput: the record cannot be read.
    """
    record = read_record(workdir)
    waiting = [run for run in todo if record.get(run.name, {}).get("state") not in FINAL]
    together = f" x {vectorize} of one program" if vectorize > 1 else ""
    say(f"{len(todo)} runs, {len(todo) - len(waiting)} finished before, {jobs}{together} at a time")
    if waiting:
        variables = dict(os.environ if environment is None else environment)
        execution = _Execution(waiting, workdir, record=record, say=say, environment=variables, vectorize=vectorize)
        execution.make(jobs)
    return record


class _Execution:
    """The runs of a sweep that are to be made, and the processes that make them."""

    def __init__(
        self,
        waiting: Sequence[PlannedRun],
        workdir: str,
        *,
        record: dict[str, dict[str, Any]],
        say: Callable[[str], None],
        environment: dict[str, str],
        vectorize: int,
    ):
        self._workdir, self._record, self._say, self._environment = workdir, record, say, environment
        self._vectorize = vectorize
        self._lock, self._stopping = threading.Lock(), threading.Event()
        self._workers: set[Worker] = set()
        # Runs of one program, by its key.
        self._groups: dict[str, collections.deque[PlannedRun]] = {"": collections.deque(waiting)}
        # Runs of a group that are made together.
        self._widths: dict[str, int] = {}
        # Keys of the groups that a worker has begun.
        self._begun: set[str] = set()

    def make(self, jobs: int) -> None:
        """Makes all runs, `jobs` at a time."""
        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            try:
                first = self._grouped() if len(self._groups[""]) > 1 else None
                futures = [pool.submit(self._slot, first if i == 0 else None) for i in range(jobs)]
                for future in concurrent.futures.as_completed(futures):
                    future.result()
            except BaseException:
                with self._lock:
                    self._stopping.set()
                    for worker in self._workers:
                        worker.stop()
                raise

    def _grouped(self) -> Worker | None:
        """Groups the runs by program, and returns the worker that has named these."""
        runs = list(self._groups[""])
        worker = self._started(runs[0])
        keys = worker.keys([run.arguments for run in runs]) if worker else None
        if worker is None or keys is None:
            return worker
        self._groups = {}
        for run, key in zip(runs, keys, strict=True):
            self._groups.setdefault(run.name if key is None else key, collections.deque()).append(run)
        for key, group in self._groups.items():
            # As even as can be: the program computes places that are not used too.
            self._widths[key] = -(-len(group) // -(-len(group) // self._vectorize))
        return worker

    def _started(self, run: PlannedRun) -> Worker | None:
        with self._lock:
            if self._stopping.is_set():
                return None
            worker = Worker(run.start, self._log(run), self._environment)
            self._workers.add(worker)
            return worker

    def _closed(self, worker: Worker) -> None:
        worker.close()
        with self._lock:
            self._workers.discard(worker)

    def _next(self, group: str | None) -> tuple[str, list[PlannedRun]] | None:
        """The next runs for a worker that has made those of `group`: more of these, else of a program that nobody has
        begun, else of the one with the most runs left."""
        with self._lock:
            left = {key: runs for key, runs in self._groups.items() if runs}
            if not left or self._stopping.is_set():
                return None
            unbegun = [key for key in left if key not in self._begun]
            chosen = group if group in left else unbegun[0] if unbegun else max(left, key=lambda each: len(left[each]))
            assert chosen is not None
            self._begun.add(chosen)
            runs = left[chosen]
            return chosen, [runs.popleft() for _ in range(min(self._widths.get(chosen, 1), len(runs)))]

    def _slot(self, worker: Worker | None) -> None:
        """Makes runs until none is left."""
        group = None
        try:
            while chosen := self._next(group):
                group, runs = chosen
                if not all(map(self._free, runs)):
                    return
                worker = worker or self._started(runs[0])
                if worker is None:
                    return
                if not self._made(worker, runs, self._widths.get(group, 1)):
                    self._closed(worker)
                    worker = None
        finally:
            if worker is not None:
                self._closed(worker)

    def _made(self, worker: Worker, runs: Sequence[PlannedRun], width: int) -> bool:
        """Makes runs, together if `width` is above 1, and notes how they end. True if the worker goes on."""
        start = time.monotonic()
        each = [(run.arguments, os.path.join(self._workdir, run.name), self._log(run)) for run in runs]
        if width == 1:
            status, goes_on = worker.make(*each[0])
            self._ended(runs[0], status, time.monotonic() - start)
            return goes_on
        answers = worker.make_together(each, width)
        while True:
            try:
                number, status = next(answers)
            except StopIteration as end:
                return end.value
            self._ended(runs[number], status, time.monotonic() - start)

    def _log(self, run: PlannedRun) -> str:
        folder = os.path.join(self._workdir, run.name)
        os.makedirs(folder, exist_ok=True)
        return os.path.join(folder, "log.txt")

    def _free(self, run: PlannedRun) -> bool:
        """Waits until no other process trains in the folder of a run; False if the sweep is stopped before."""
        folder = os.path.join(self._workdir, run.name)
        if other := holder(folder):
            self._say(f"{run.name}: waits for {other} which trains in it")
        while holder(folder) and not self._stopping.wait(HOLDER_SECONDS):
            pass
        return not self._stopping.is_set()

    def _ended(self, run: PlannedRun, status: int, seconds: float) -> None:
        folder = os.path.join(self._workdir, run.name)
        state = STATES.get(status, "failed")
        if state == "done" and stopped_early(folder):
            state = STOPPED_EARLY
        with self._lock:
            result = {"point": run.point, "state": state, "status": status, "seconds": round(seconds, 1)}
            self._record[run.name] = result
            _note(self._workdir, run.name, result)
            self._say(f"{run.name}: {state} after {seconds:.0f} s{_reason(folder, state)}")


def compare(path: str, points: Sequence[Point], workdir: str, script: str, *, jobs: int | None = None) -> list[Outcome]:
    """Makes the runs of `points` that are not finished, as scripts/sweep.py does, and reads the metrics of all runs.

    Progress is printed to the standard error stream.

    Args:
      path, points, workdir, script: see `runs`.
      jobs: number of runs at a time; None for `default_jobs()`.

    Returns:
      The outcome of every point, in order.

    Raises:
      BadInput: see `runs`.
      SigmarepError: a run failed, had bad input or was stopped.
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


def environment_of(workdir: str, jobs: int) -> dict[str, str]:
    """Environment variables of a sweep's processes: `shared_cache`; several leave each other room on a GPU, whose memory
    JAX would else give to the first."""
    room = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if jobs > 1 else {}
    return room | shared_cache(workdir)


def default_jobs() -> int:
    """Default number of runs at a time: half the cores."""
    return max((os.cpu_count() or 2) // 2, 1)


def shared_cache(workdir: str) -> dict[str, str]:
    """Environment variables with a compilation cache for a sweep, so that its runs compile shared programs once."""
    return {"JAX_COMPILATION_CACHE_DIR": os.path.join(os.path.abspath(workdir), ".compiled"), **os.environ}


def _reason(folder: str, state: str) -> str:
    """Explains a state: the callback's reason for an early stop, the last line of output for a failure; "" if done."""
    if state == "done":
        return ""
    if state == STOPPED_EARLY and (stopped := stopped_early(folder)):
        return f" ({stopped.reason})"
    with open(os.path.join(folder, "log.txt"), errors="replace") as file:
        lines = file.read().strip().splitlines()
    return f" ({lines[-1]})" if lines else ""


def _note(workdir: str, name: str, outcome: dict[str, Any]) -> None:
    """Adds the outcome of a run to the record."""
    path = os.path.join(workdir, RECORD)
    with locked(path):
        write_atomically(path, json.dumps(read_record(workdir) | {name: outcome}, indent=2))


def table(todo: Sequence[PlannedRun], workdir: str) -> list[tuple[str, str, str, str]]:
    """Name, state ("waiting" until it first ends), last logged step and its training loss of every run."""
    record = read_record(workdir)
    rows = []
    for run in todo:
        path = os.path.join(workdir, run.name, "metrics.jsonl")
        logged = [row for row in read_metrics(path) if "train/loss" in row]
        step, loss = (str(logged[-1]["step"]), f"{logged[-1]['train/loss']:.4g}") if logged else ("", "")
        rows.append((run.name, record.get(run.name, {}).get("state", "waiting"), step, loss))
    return rows
