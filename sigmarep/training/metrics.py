"""`metrics.jsonl`, always; TensorBoard, Weights & Biases and writers of one's own on request.

One JSON object a line: `step`, then slash-separated names. Numbers that JSON has no word for are the strings "nan",
"inf" and "-inf"; `read_metrics` turns them back.
"""

import contextlib
import functools
import itertools
import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from sigmarep import doors
from sigmarep.errors import BadInput, SigmarepError
from sigmarep.fields import field
from sigmarep.files import read_file, write_atomically
from sigmarep.training.callbacks import Callback, Run, failing_by_name

# Numbers that JSON has no word for.
SPELLED = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
# Larger whole numbers are no steps: floats do not tell them apart.
MOST_STEPS = 2**53


def integer(text: str) -> float:
    """A whole number of JSON; those beyond 64 bits as floats, which every computation takes."""
    return int(text) if len(text) < 19 else float(text)


_loads: Callable[[bytes | str], Any] = functools.partial(json.loads, parse_int=integer)
# The same numbers in a fifth of the time: a report reads hundreds of megabytes. It comes with the extra "report".
with contextlib.suppress(ImportError):
    import orjson

    _loads = orjson.loads

FILE = "metrics.jsonl"
FIELDS: dict[str, Any] = {
    "tensorboard": field(False, "Also writes TensorBoard's files."),
    "wandb_project": field("", "Also writes to this project of Weights & Biases."),
    "extra": field((), "Writers of one's own (sigmarep.training.metrics.Writer).", dotted=True),
    "progress": field(
        "auto",
        "auto: a live line on a terminal, plain lines elsewhere.",
        choices=("auto", "plain", "off"),
    ),
}


def read_metrics(path: str) -> list[dict[str, Any]]:
    """The rows of a metrics file in order, without what is no row; a missing file is empty."""
    return [row for _, row in _rows(path) if row is not None]


def _rows(path: str) -> list[tuple[bytes, dict[str, Any] | None]]:
    """The finished lines of a metrics file and the row of each, None for one that holds none."""
    try:
        lines = read_file(path).split(b"\n")
    except FileNotFoundError:
        return []
    # A finished line ends in a newline: what follows the last one is unfinished or empty.
    parsed = [(line, *parse(line)) for line in lines[:-1] if line]
    return [(line, row if whole else None) for line, row, whole in parsed]


def decoded(text: bytes) -> Any:
    """The value of a text in JSON.

    Raises:
      ValueError: it is none.
    """
    return _loads(text)


def parse(line: bytes) -> tuple[dict[str, Any] | None, bool]:
    """The row of a line of a metrics file: a whole number `step` and numbers alone.

    Returns:
      What can be used of it, None without a step; and True if that is all of it.
    """
    try:
        row = _loads(line)
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


def metric_names(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The metrics of some rows, in order of their first appearance; not "step"."""
    # Thousands of rows have a few sets of names: those are told apart first.
    distinct = dict.fromkeys(map(tuple, rows))
    return [name for name in dict.fromkeys(itertools.chain.from_iterable(distinct)) if name != "step"]


def encoded(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as JSON has it: what is no finite number by its name in `SPELLED`.

    Raises:
      ValueError, TypeError: a metric is no number.
    """
    return {name: value if name == "step" else _encoded(value) for name, value in row.items()}


def _encoded(value: Any) -> float | str:
    value = float(value)
    return value if math.isfinite(value) else str(value)


class Writer(Protocol):
    """A destination of a run's metrics. A word of `config.writers.extra` names what makes one when it is called as

        my_writer(workdir, resume_step=…, config=…)

    with the run's folder, the step that it goes on from (rows after it are not valid any more; 0 at the beginning) and
    the resolved configuration as a dictionary. Only process 0 makes any.
    """

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds the metrics of a step; may be called several times for one step, with other names."""

    def flush(self) -> None:
        """Puts everything where it survives this process; called before every checkpoint."""

    def close(self) -> None:
        """Flushes, and frees what is open; the last call."""


class MetricWriter(Callback):
    """Writes to metrics.jsonl and to all other writers of a run. Only process 0 writes.

    Args:
      resume_step: rows of metrics.jsonl after this step are dropped.
      tensorboard, wandb_project, extra: see `config.writers`.
      run_config: the resolved configuration.
      say: is given one line if metrics.jsonl has lines that are no rows.

    Raises:
      BadInput: the folder cannot be written, an extra package is missing, or a word of `extra` names no writer.
    """

    def __init__(
        self,
        workdir: str,
        *,
        resume_step: int = 0,
        tensorboard: bool = False,
        wandb_project: str = "",
        extra: Sequence[str] = (),
        run_config: Mapping[str, Any] | None = None,
        say: Callable[[str], object] = print,
    ):
        # Here, not above: reading metrics needs no JAX.
        import jax

        makers = {word: doors.load(word, field="config.writers.extra") for word in extra}
        self._writers: dict[str, Writer] = {}
        if jax.process_index() != 0:
            return
        self._writers["metrics.jsonl"] = JsonLines(workdir, resume_step=resume_step, say=say)
        if tensorboard:
            self._writers["TensorBoard"] = TensorBoard(workdir, resume_step=resume_step)
        if wandb_project:
            self._writers["Weights & Biases"] = WandB(workdir, project=wandb_project, config=run_config)
        for word, maker in makers.items():
            with failing_by_name(word, "its call"):
                self._writers[word] = maker(workdir, resume_step=resume_step, config=dict(run_config or {}))
            lacks = [
                name for name in ("write", "flush", "close") if not callable(getattr(self._writers[word], name, None))
            ]
            if lacks:
                raise BadInput(f"config.writers.extra = {word!r}: its writer has no method {lacks[0]}")

    def on_log(self, run: Run, step: int, metrics: Mapping[str, float]) -> None:
        self.write(step, metrics)

    def on_evaluation(self, run: Run, step: int, metrics: Mapping[str, float]) -> None:
        self.write(step, metrics)

    def on_end(self, run: Run) -> None:
        self.close()

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Appends one row of scalars to each writer."""
        row = {name: float(value) for name, value in metrics.items()}
        for name, writer in self._writers.items():
            with failing_by_name(name, "write"):
                writer.write(int(step), row)

    def flush(self) -> None:
        """Flushes each writer."""
        for name, writer in self._writers.items():
            with failing_by_name(name, "flush"):
                writer.flush()

    def close(self) -> None:
        """Closes each writer, whichever of them fail."""
        with contextlib.ExitStack() as stack:
            for name, writer in self._writers.items():
                stack.callback(self._close, name, writer)

    def _close(self, name: str, writer: Writer) -> None:
        with failing_by_name(name, "close"):
            writer.close()


class JsonLines:
    """metrics.jsonl."""

    def __init__(self, workdir: str, *, resume_step: int = 0, say: Callable[[str], object] = print):
        path = os.path.join(workdir, FILE)
        try:
            os.makedirs(workdir, exist_ok=True)
            _drop_after(path, resume_step, say)
            self._file = open(path, "a")  # noqa: SIM115
        except OSError as error:
            raise BadInput(f"--workdir {workdir}: cannot be written ({error.strerror}); choose another") from error
        self._path = path

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        line = json.dumps(encoded({"step": step, **metrics}), allow_nan=False)
        with _written(self._path):
            # In one call, so that a kill leaves at most one unfinished line.
            self._file.write(f"{line}\n")
            self._file.flush()

    def flush(self) -> None:
        with _written(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with _written(self._path):
            self._file.close()


class TensorBoard:
    """Event files in the workdir's folder `tensorboard`."""

    def __init__(self, workdir: str, *, resume_step: int = 0):
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise BadInput(
                'config.writers.tensorboard = True: needs the extra "tensorboard"; pip install "sigmarep[tensorboard]"'
            ) from None
        folder = os.path.join(workdir, "tensorboard")
        # An earlier start may have been killed before its first checkpoint: its steps are made again.
        self._writer = SummaryWriter(folder, purge_step=resume_step + 1 if os.path.isdir(folder) else None)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases, which a restart continues: its id is WANDB_RUN_ID, or else that of the workdir's file
    `wandb_id`, made at the first start."""

    def __init__(self, workdir: str, *, project: str, config: Mapping[str, Any] | None = None):
        try:
            import wandb
        except ImportError:
            raise BadInput(
                f'config.writers.wandb_project = {project!r}: needs the extra "wandb"; pip install "sigmarep[wandb]"'
            ) from None
        name = os.path.basename(os.path.abspath(workdir))
        self._run = wandb.init(
            project=project, dir=workdir, id=wandb_id(workdir), name=name, resume="allow", config=dict(config or {})
        )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def flush(self) -> None:
        """Its own process sends what it has."""

    def close(self) -> None:
        self._run.finish()


def wandb_id(workdir: str) -> str:
    """The id of the workdir's run of Weights & Biases, kept in its file `wandb_id`."""
    path = os.path.join(workdir, "wandb_id")
    identity = os.environ.get("WANDB_RUN_ID", "")
    if not identity and os.path.exists(path):
        return read_file(path).decode(errors="replace").strip()
    if not identity and os.path.isdir(os.path.join(workdir, "wandb")):
        # Earlier versions took the folder's name.
        identity = os.path.basename(os.path.abspath(workdir))
    identity = identity or uuid.uuid4().hex[:12]
    write_atomically(path, identity)
    return identity


@contextlib.contextmanager
def _written(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SigmarepError(f"{path}: cannot be written ({error.strerror})") from error


def _drop_after(path: str, step: int, say: Callable[[str], object]) -> None:
    """Rewrites the file without the rows after `step` and without what is no row, all or nothing."""
    if not os.path.exists(path):
        return
    rows = _rows(path)
    unreadable = sum(row is None for _, row in rows)
    if unreadable:
        copy = f"{path}.damaged"
        shutil.copyfile(path, copy)
        say(f"{path}: {unreadable} of {len(rows)} lines cannot be read and are left out; {copy} is the file as it was")
    valid = [line for line, row in rows if row is not None and row["step"] <= step]
    write_atomically(path, b"".join(line + b"\n" for line in valid), sync=True)
