"""The runs of a sweep while they are made: the processes that make them, and the record of how each ended."""

import collections
import concurrent.futures
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from sigmarep.errors import BadInput, Diverged, SigmarepError, Stopped, one_line
from sigmarep.files import locked, read_json, write_atomically
from sigmarep.training.metrics import read_metrics
from sigmarep.training.stopped import stopped_early
from sigmarep.training.workdir_lock import holder
from sigmarep.vectorization import Given, Measured, speed
from sigmarep.worker import TOO_MANY, Worker

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


class Source(Protocol):
    """Runs that are chosen while others are made, as by `sigmarep.searches.Trials`; only one thread at a time calls it."""

    def next(self) -> PlannedRun | None:
        """The next run; None if there is none."""

    def ended(self, run: PlannedRun, state: str) -> None:
        """A run has ended."""


def default_jobs() -> int:
    """Default number of runs at a time on CPUs: half the cores."""
    return max((os.cpu_count() or 2) // 2, 1)


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


class Execution:
    """The runs of a sweep that are to be made, and the processes that make them."""

    def __init__(
        self,
        waiting: Sequence[PlannedRun],
        workdir: str,
        *,
        record: dict[str, dict[str, Any]],
        say: Callable[[str], None],
        environment: dict[str, str],
        vectorize: int | None,
        source: Source | None = None,
    ):
        self._workdir, self._record, self._say, self._environment = workdir, record, say, environment
        self._source = source
        self._lock, self._stopping = threading.Lock(), threading.Event()
        self._workers: set[Worker] = set()
        # Runs of one program, by its key.
        self._groups: dict[str, collections.deque[PlannedRun]] = {"": collections.deque(waiting)}
        # The runs of a group that are made together; none before it is known on what.
        self._widths: Given | Measured = Given(vectorize or 1)
        self._measures = vectorize is None
        # Keys of the groups that a worker has begun.
        self._begun: set[str] = set()

    def make(self, jobs: int | None) -> None:
        """Makes all runs, `jobs` at a time; None for `default_jobs` on CPUs, for one where an accelerator is shared."""
        most = jobs or default_jobs()
        with concurrent.futures.ThreadPoolExecutor(most) as pool:
            try:
                first = self._grouped() if len(self._groups[""]) > 1 else None
                if jobs is None and isinstance(self._widths, Measured):
                    most = 1
                futures = [pool.submit(self._slot, first if i == 0 else None) for i in range(most)]
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
        answer = worker.programs([run.arguments for run in runs]) if worker else None
        if worker is None or answer is None:
            return worker
        programs, devices = answer
        self._groups = {}
        for run, (key, _) in zip(runs, programs, strict=True):
            self._groups.setdefault(run.name if key is None else key, collections.deque()).append(run)
        # Together, runs are slower on CPUs (docs/cost.md).
        if self._measures and devices != "cpu":
            self._widths = Measured({key for key, together in programs if together and key is not None})
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

    def _next(self, group: str | None) -> tuple[str, int, list[PlannedRun]] | None:
        """The next runs for a worker that has made those of `group`: more of these, else of a program that nobody has
        begun, else of the one with the most runs left; before them their group and how many are made together."""
        with self._lock:
            left = {key: runs for key, runs in self._groups.items() if runs}
            if self._stopping.is_set():
                return None
            if not left:
                run = self._source.next() if self._source else None
                return ("", 1, [run]) if run else None
            unbegun = [key for key in left if key not in self._begun]
            chosen = group if group in left else unbegun[0] if unbegun else max(left, key=lambda each: len(left[each]))
            assert chosen is not None
            self._begun.add(chosen)
            runs = left[chosen]
            width = self._widths.width(chosen, len(runs))
            return chosen, width, [runs.popleft() for _ in range(min(width, len(runs)))]

    def _slot(self, worker: Worker | None) -> None:
        """Makes runs until none is left."""
        group = None
        try:
            while chosen := self._next(group):
                group, width, runs = chosen
                if not all(map(self._free, runs)):
                    return
                worker = worker or self._started(runs[0])
                if worker is None:
                    return
                if not self._made(worker, group, runs, width):
                    self._closed(worker)
                    worker = None
        finally:
            if worker is not None:
                self._closed(worker)

    def _made(self, worker: Worker, group: str, runs: Sequence[PlannedRun], width: int) -> bool:
        """Makes runs of a group, together if `width` is above 1, and notes how they end. True if the worker goes on."""
        start = time.monotonic()
        each = [(run.arguments, os.path.join(self._workdir, run.name), self._log(run)) for run in runs]
        if width == 1:
            status, goes_on = worker.make(*each[0])
            self._ended(runs[0], status, time.monotonic() - start)
            self._note_speed(width, runs)
            return goes_on
        answers = worker.make_together(each, width)
        while True:
            try:
                number, status = next(answers)
            except StopIteration as end:
                self._note_speed(width, runs)
                return end.value
            if status != TOO_MANY:
                self._ended(runs[number], status, time.monotonic() - start)
            elif isinstance(self._widths, Measured):
                self._again(group, runs[number], width)
            else:
                self._ended(runs[number], SigmarepError.exit_status, time.monotonic() - start)

    def _note_speed(self, width: int, runs: Sequence[PlannedRun]) -> None:
        if isinstance(self._widths, Measured) and not self._widths.knows(width):
            rows = [read_metrics(os.path.join(self._workdir, run.name, "metrics.jsonl")) for run in runs]
            with self._lock:
                if together := self._widths.note(width, [each for each in map(speed, rows) if each]):
                    self._say(f"{width} at a time: trained on {together:.4g} examples a second")

    def _again(self, group: str, run: PlannedRun, width: int) -> None:
        """Puts back a run of which `width` were too many for the device's memory."""
        assert isinstance(self._widths, Measured)
        with self._lock:
            self._widths.refuse(width)
            self._groups[group].append(run)
        self._say(f"{run.name}: {width} at a time are too many for the device's memory; made with fewer")

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
            note(self._workdir, run.name, result)
            if self._source:
                self._source.ended(run, state)
            self._say(f"{run.name}: {state} after {seconds:.0f} s{reason(folder, state)}")


def reason(folder: str, state: str) -> str:
    """Explains a state: the callback's reason for an early stop, the last line of output for a failure; "" if done."""
    if state == "done":
        return ""
    if state == STOPPED_EARLY and (stopped := stopped_early(folder)):
        return f" ({stopped.reason})"
    with open(os.path.join(folder, "log.txt"), errors="replace") as file:
        lines = file.read().strip().splitlines()
    return f" ({lines[-1]})" if lines else ""


def note(workdir: str, name: str, outcome: dict[str, Any]) -> None:
    """Adds the outcome of a run to the record."""
    path = os.path.join(workdir, RECORD)
    with locked(path):
        write_atomically(path, json.dumps(read_record(workdir) | {name: outcome}, indent=2))
