"""`metrics.jsonl`, always; TensorBoard and Weights & Biases beside it on request.

One JSON object a line: `step`, then slash-separated names. Numbers that JSON has no word for are the strings "nan",
"inf" and "-inf"; `read_metrics` turns them back.
"""

import contextlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from sigmarep.errors import BadInput
from sigmarep.files import write_atomically

_loads: Callable[[bytes | str], Any] = json.loads
# The same numbers in a fifth of the time: a report reads hundreds of megabytes. It comes with the extra "report".
with contextlib.suppress(ImportError):
    import orjson

    _loads = orjson.loads

FILE = "metrics.jsonl"


def read_metrics(path: str) -> list[dict[str, Any]]:
    """The rows of a metrics file in order; an unfinished last line is left out, a missing file is empty."""
    try:
        with open(path, "rb") as file:
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return []
    # A finished line ends in a newline: what follows the last one is unfinished or empty.
    # Most lines have no number that is spelt out: those are taken as they are.
    return [_decoded(_loads(line)) if b'": "' in line else _loads(line) for line in lines[:-1] if line]


def metric_names(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The metrics of some rows, in order of their first appearance; not "step"."""
    # Thousands of rows have a few sets of names: those are told apart first.
    distinct = dict.fromkeys(map(tuple, rows))
    return [name for name in dict.fromkeys(itertools.chain.from_iterable(distinct)) if name != "step"]


def _decoded(row: dict[str, Any]) -> dict[str, Any]:
    return {name: float(value) if isinstance(value, str) else value for name, value in row.items()}


def _encoded(value: Any) -> float | str:
    value = float(value)
    return value if math.isfinite(value) else str(value)


class MetricWriter:
    """Appends rows; on resume it first drops those after the step that is resumed from.

    Only process 0 writes.

    Raises:
      BadInput: the folder cannot be written, or an extra package is missing.
    """

    def __init__(
        self,
        workdir: str,
        *,
        resume_step: int = 0,
        tensorboard: bool = False,
        wandb_project: str = "",
        run_config: Mapping[str, Any] | None = None,
    ):
        # Here, not above: reading metrics needs no JAX.
        import jax

        self._file = self._tensorboard = self._wandb = None
        if jax.process_index() != 0:
            return
        path = os.path.join(workdir, FILE)
        try:
            os.makedirs(workdir, exist_ok=True)
            _drop_after(path, resume_step)
            self._file = open(path, "a")  # noqa: SIM115
        except OSError as error:
            raise BadInput(f"--workdir {workdir}: cannot be written ({error.strerror}); choose another") from error
        if tensorboard:
            self._tensorboard = _tensorboard(workdir, resume_step)
        if wandb_project:
            self._wandb = _wandb(wandb_project, workdir, run_config)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Appends one row."""
        if self._file is None:
            return
        row = {name: _encoded(value) for name, value in metrics.items()}
        # In one call, so that a kill leaves at most one unfinished line.
        self._file.write(json.dumps({"step": int(step), **row}, allow_nan=False) + "\n")
        self._file.flush()
        if self._tensorboard is not None:
            for name, value in metrics.items():
                self._tensorboard.add_scalar(name, float(value), int(step))
        if self._wandb is not None:
            self._wandb.log({name: float(value) for name, value in metrics.items()}, step=int(step))

    def flush(self, *, sync: bool = False) -> None:
        """Hands everything to the operating system; with `sync`, to the disk."""
        if self._file is not None:
            self._file.flush()
            if sync:
                os.fsync(self._file.fileno())
        if self._tensorboard is not None:
            self._tensorboard.flush()

    def close(self) -> None:
        if self._file is not None:
            self.flush()
            self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _drop_after(path: str, step: int) -> None:
    """Rewrites the file without the rows after `step` and without an unfinished last line, all or nothing."""
    rows = []
    try:
        with open(path) as file:
            lines = file.read().split("\n")
    except FileNotFoundError:
        return
    rows = [line for line in lines[:-1] if line and _loads(line)["step"] <= step]
    write_atomically(path, "".join(line + "\n" for line in rows), sync=True)


def _tensorboard(workdir: str, resume_step: int):
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise BadInput(
            'config.writers.tensorboard = True: needs the extra "tensorboard"; pip install "sigmarep[tensorboard]"'
        ) from None
    return SummaryWriter(os.path.join(workdir, "tensorboard"), purge_step=resume_step + 1 if resume_step else None)


def _wandb(project: str, workdir: str, run_config):
    try:
        import wandb
    except ImportError:
        raise BadInput(
            f'config.writers.wandb_project = {project!r}: needs the extra "wandb"; pip install "sigmarep[wandb]"'
        ) from None
    # The name of the folder identifies the run, so that a restart continues it.
    name = os.path.basename(os.path.abspath(workdir))
    return wandb.init(project=project, dir=workdir, id=name, name=name, resume="allow", config=dict(run_config or {}))
