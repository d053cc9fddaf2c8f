"""Sweeps: the runs of one configuration file, their execution, and the record of their outcomes.

A file's `sweep()` returns points. A point maps names to values: a name such as `arm` is an argument of the file, given
after its colon; a name such as `config.optimizer.learning_rate` is a field. `values`, `product`, `zipped` and `seeds` make
lists of points:

    def sweep():
        return product(values("arm", "pre_ln", "sigma"), values("learning_rate", 1e-3, 1e-2), seeds(3))
"""

import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from sigmarep.errors import BadInput, SigmarepError
from sigmarep.sweep_execution import (
    FINAL,
    RECORD,
    Execution,
    PlannedRun,
    Point,
    Source,
    default_jobs,
    read_record,
    reason,
)
from sigmarep.training.diagnosis import ENTROPY
from sigmarep.training.metrics import read_metrics


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


def short(point: Mapping[str, Any]) -> dict[str, Any]:
    """A point with the last part of each name alone: `seed` for `config.seed`."""
    return {name.rsplit(".", 1)[-1]: value for name, value in point.items()}


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
        planned[name] = planned_run(name, path, point, workdir, script, imports)
    return list(planned.values())


def planned_run(
    name: str, path: str, point: Point, workdir: str, script: str, imports: Sequence[str] = (), more: Sequence[str] = ()
) -> PlannedRun:
    """Plans the run of a point in the folder `name`; `more` are further flags of its configuration. Else as `runs`."""
    arguments = ["--config", with_arguments(path, point), "--workdir", os.path.join(workdir, name)]
    arguments += [f"--{key}={value}" for key, value in point.items() if key.startswith("config.")]
    imported = [f"--import={module}" for module in imports]
    return PlannedRun(
        name, point, [*arguments, *more, "--config.writers.progress=plain"], [sys.executable, script, *imported]
    )


def with_arguments(path: str, point: Mapping[str, Any]) -> str:
    """A configuration file with the arguments that a point has for it, as --config takes it."""
    given = ",".join(f"{key}={value}" for key, value in point.items() if not key.startswith("config."))
    return f"{path}:{given}" if given else path


def run_name(point: Point) -> str:
    """Name of a point's folder, such as `arm=sigma,learning_rate=0.01,seed=0`: last parts of names, and values."""
    text = ",".join(f"{key.rsplit('.', 1)[-1]}={value}" for key, value in point.items())
    return re.sub(r"[^\w.,=+-]", "_", text)


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
    jobs: int | None,
    say: Callable[[str], None],
    environment: dict[str, str] | None = None,
    vectorize: int | None = 1,
    source: Source | None = None,
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
      jobs: number of processes at a time; None for one where an accelerator is shared, else `default_jobs()`.
      say: receives lines of progress.
      environment: environment variables of the runs; None for those of this process.
      vectorize: most runs that a process makes together; None to choose: 1 on CPUs, on an accelerator as many as make the
        most steps in a second (`sigmarep.vectorization`).
      source: chooses further runs when those of `todo` are made.

    Raises:
      BadInput: the record cannot be read.
    """
    record = read_record(workdir)
    waiting = [run for run in todo if record.get(run.name, {}).get("state") not in FINAL]
    together = f" x {vectorize} of one program" if vectorize and vectorize > 1 else ""
    if source is None:
        say(
            f"{len(todo)} runs, {len(todo) - len(waiting)} finished before, {jobs or default_jobs()}{together} at a time"
        )
    if waiting or source:
        variables = dict(os.environ if environment is None else environment)
        execution = Execution(
            waiting, workdir, record=record, say=say, environment=variables, vectorize=vectorize, source=source
        )
        execution.make(jobs)
    return record


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
            raise SigmarepError(f"{folder}: {state}{reason(folder, state)}; the same command makes this run again")
        outcomes.append(Outcome(run.point, state, read_metrics(os.path.join(folder, "metrics.jsonl"))))
    return outcomes


def environment_of(workdir: str, jobs: int) -> dict[str, str]:
    """Environment variables of a sweep's processes: `shared_cache`; several leave each other room on a GPU, whose memory
    JAX would else give to the first."""
    room = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if jobs > 1 else {}
    return room | shared_cache(workdir)


def shared_cache(workdir: str) -> dict[str, str]:
    """Environment variables with a compilation cache for a sweep, so that its runs compile shared programs once."""
    return {"JAX_COMPILATION_CACHE_DIR": os.path.join(os.path.abspath(workdir), ".compiled"), **os.environ}


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
