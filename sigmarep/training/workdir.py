"""The folder of a run: whose it is, and what it ran on.

`config.json`, the resolved configuration; the files of the task, such as `vocabulary.model`; `environment.json`, versions,
devices and git revision of the last start and of earlier ones, total steps and primary metric; `metrics.jsonl`;
`checkpoints/`; `outputs/<split>/`, the model's outputs at the last evaluation; `diagnosis.json` after a divergence;
`stopped.json` after a callback ended the run; `init_from.json`, the weights that it began from.
"""

import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import ml_collections

from sigmarep.configuration import flatten, with_current_names
from sigmarep.errors import BadInput, SigmarepError, one_line
from sigmarep.fields import shown
from sigmarep.files import read_file, read_json, write_atomically
from sigmarep.tasks.protocol import Outputs
from sigmarep.training.config import default_config
from sigmarep.training.metrics import MOST_STEPS

# What may differ when a run goes on in its workdir: where it runs, how long, and what it reports, not the past that it
# computed. Of its length, the loop sees to that.
FREE = (
    "total_",
    "divergence_factor",
    "data.eval_splits",
    "decoding.",
    "parallel",
    "mesh.",
    "writers.",
    "callbacks",
    "sharpness.",
    "keep_checkpoints",
    "log_every_",
    "eval_every_",
    "checkpoint_every_",
)
FREE_LEAVES = ("data_dir", "num_threads", "num_workers")
# Paths of files that a run's own files vouch for, where data.json has a fingerprint of the examples.
PATH_LEAVES = ("folder", "file")
FACTS = "data.json"
# Files of which only the fingerprint is compared.
FINGERPRINTED = (FACTS, "init_from.json")
# No configuration is nested as deeply.
MOST_LEVELS = 32
# What a run's numbers may depend on; null for what is not installed: crops are Pillow's without cykooz-resizer.
PACKAGES = (
    "sigmarep",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "ml_collections",
    "grain",
    "numpy",
    "pillow",
    "simplejpeg",
    "cykooz-resizer",
)


def claim(
    workdir: str,
    config: ml_collections.FrozenConfigDict,
    files: Mapping[str, bytes],
    *,
    total_steps: int,
    primary_metric: str,
) -> None:
    """Makes `workdir` the folder of a run of this configuration and the task's `files`, or checks that it is one.

    The same data may lie elsewhere when a run goes on: their fingerprint in `data.json` counts, not their path.

    Args:
      total_steps, primary_metric: of the run and its task, kept in environment.json for those who read it without its task.

    Raises:
      BadInput: it cannot be written, or see `check`.
    """
    path = os.path.join(workdir, "config.json")
    try:
        os.makedirs(workdir, exist_ok=True)
        check(workdir, config, files)
        if jax.process_index() != 0:
            return
        for name, content in files.items():
            write_atomically(os.path.join(workdir, name), content)
        write_atomically(path, _json(json.loads(config.to_json())))
        about = {"total_steps": total_steps, "primary_metric": primary_metric, **_environment(workdir)}
        write_atomically(os.path.join(workdir, "environment.json"), _json(about))
    except OSError as error:
        raise BadInput(f"--workdir {workdir}: cannot be written ({error.strerror}); choose another folder") from error


def check(workdir: str, config: ml_collections.FrozenConfigDict, files: Mapping[str, bytes]) -> None:
    """Checks that `workdir` holds no run, or one that this configuration and the task's `files` can go on with.

    Raises:
      BadInput: it holds a run of another configuration, vocabulary or data set, or parts of one.
    """
    for name, kind, is_kind in (("checkpoints", "folder", os.path.isdir), ("metrics.jsonl", "file", os.path.isfile)):
        path = os.path.join(workdir, name)
        if os.path.lexists(path) and not is_kind(path):
            raise BadInput(f"--workdir {workdir}: {name} is no {kind}; move it away, or choose another folder")
    if os.path.exists(os.path.join(workdir, "config.json")):
        same_data = FACTS in files and os.path.exists(os.path.join(workdir, FACTS))
        _check_same(workdir, config, free_leaves=FREE_LEAVES + (PATH_LEAVES if same_data else ()))
    elif remains := [name for name in ("checkpoints", "metrics.jsonl") if _size(os.path.join(workdir, name))]:
        raise BadInput(
            f"--workdir {workdir}: has {' and '.join(remains)} but no config.json to say of which run; put it back from a "
            "copy, or choose another folder"
        )
    check_files(workdir, files)


def _size(path: str) -> int:
    """Bytes of a file, entries of a folder; 0 where there is none."""
    try:
        return len(os.listdir(path)) if os.path.isdir(path) else os.stat(path).st_size
    except OSError:
        return 0


def stored_total_steps(workdir: str) -> int | None:
    """The length of the workdir's run, None where that is not known."""
    try:
        total = read_json(os.path.join(workdir, "environment.json"))["total_steps"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return total if type(total) is int and 0 < total < MOST_STEPS else None


def stored_config(workdir: str) -> dict[str, Any]:
    """The contents of `config.json`.

    Raises:
      BadInput: there is none, or it cannot be read.
    """
    path = os.path.join(workdir, "config.json")
    try:
        stored = read_json(path)
        if not isinstance(stored, dict):
            raise ValueError("expected a JSON object")
        _check_nesting(stored, MOST_LEVELS)
        return with_current_names(stored)
    except FileNotFoundError:
        raise BadInput(f"--workdir {workdir}: holds no run (there is no config.json)") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise BadInput(f"--workdir {workdir}: config.json cannot be read ({reason or one_line(error)})") from None


def _check_nesting(value: Any, levels: int) -> None:
    if not levels:
        raise ValueError("nested too deeply")
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_nesting(each, levels - 1)


class MissingFile(KeyError):
    """The folder of a run has no file `name`."""

    def __init__(self, name: str):
        super().__init__(name)
        self.name = name


class RunFiles(Mapping[str, bytes]):
    """The files in the folder of a run by name, read as they are asked for. Raises MissingFile where there is none."""

    def __init__(self, folder: str):
        self._folder = folder

    def __getitem__(self, name: str) -> bytes:
        try:
            return read_file(os.path.join(self._folder, name))
        except FileNotFoundError:
            raise MissingFile(name) from None
        except OSError as error:
            raise BadInput(f"--workdir {self._folder}: {name} cannot be read ({error.strerror})") from None

    def __iter__(self) -> Iterator[str]:
        return (entry.name for entry in os.scandir(self._folder) if entry.is_file())

    def __len__(self) -> int:
        return sum(1 for _ in self)


def check_same_model(workdir: str, config: ml_collections.FrozenConfigDict, fields: tuple[str, ...]) -> None:
    """Checks that checkpoints of the workdir hold the model of this configuration.

    Args:
      fields: `TaskModel.model_fields`.

    Raises:
      BadInput: they do not, or there is no run.
    """
    _check_same(workdir, config, only=("task", *fields), free_leaves=FREE_LEAVES + PATH_LEAVES)


def _check_same(
    workdir: str,
    config: ml_collections.FrozenConfigDict,
    *,
    only: tuple[str, ...] = ("",),
    free_leaves: tuple[str, ...],
) -> None:
    # Fields added after the run was made had their defaults.
    stored = flatten(default_config(config.task)) | flatten(stored_config(workdir))
    given = flatten(ml_collections.ConfigDict(json.loads(config.to_json())))
    for name in sorted(stored.keys() | given.keys()):
        if not name.startswith(only) or name.startswith(FREE) or name.rsplit(".", 1)[-1] in free_leaves:
            continue
        old, new = (_plain(side.get(name)) for side in (stored, given))
        if old != new:
            raise BadInput(
                f"--workdir {workdir}: holds a run of another configuration (config.{name} is {shown(old)} there and "
                f"{shown(new)} here, which would change what it has computed); keep {shown(old)}, or choose another folder"
            )


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(list(value) if isinstance(value, tuple) else value))


def check_files(workdir: str, files: Mapping[str, bytes]) -> None:
    """Checks that files which the workdir has are these; of data.json only the fingerprint.

    Raises:
      BadInput: they are not.
    """
    for name, content in files.items():
        _check_file(workdir, name, content)


def _check_file(workdir: str, name: str, content: bytes) -> None:
    try:
        stored = read_file(os.path.join(workdir, name))
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise BadInput(f"--workdir {workdir}: {name} of its run cannot be read ({error.strerror})") from None
    if _identity(name, stored) != _identity(name, content):
        old, new = (hashlib.sha256(each).hexdigest()[:12] for each in (stored, content))
        raise BadInput(
            f"--workdir {workdir}: {name} of its run (sha256 {old}) is not what config.data and config.init_from give now "
            f"(sha256 {new}): the vocabulary, the data or the weights changed; restore them, or choose another folder"
        )


def _identity(name: str, content: bytes) -> Any:
    """The part of a file that must not change between starts; of some only their fingerprint."""
    if name not in FINGERPRINTED:
        return content
    try:
        return json.loads(content)["fingerprint"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return content


def write_outputs(workdir: str, outputs: Mapping[str, Outputs]) -> None:
    """Keeps the files that the model made of each split, below `outputs/`."""
    for split, output in outputs.items():
        folder = os.path.join(workdir, "outputs", split)
        try:
            os.makedirs(folder, exist_ok=True)
            for name, text in output.files.items():
                write_atomically(os.path.join(folder, name), text.encode())
        except OSError as error:
            raise SigmarepError(f"{folder}: cannot be written ({error.strerror})") from error


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=2).encode() + b"\n"


def _environment(workdir: str) -> dict[str, Any]:
    try:
        last = read_json(os.path.join(workdir, "environment.json"))
        earlier = [*last.pop("earlier_starts", []), last]
    except (OSError, ValueError, AttributeError, TypeError):
        earlier = []
    devices = jax.devices()
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": sys.version.split()[0],
        "packages": {name: _version(name) for name in PACKAGES},
        "devices": {"platform": devices[0].platform, "kind": devices[0].device_kind, "count": len(devices)},
        "processes": jax.process_count(),
        "git_revision": _git_revision(),
        "earlier_starts": earlier,
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """The revision of the checkout that this package is imported from, with + if it was changed; None elsewhere."""
    folder = os.path.dirname(os.path.abspath(__file__))
    try:
        done = subprocess.run(
            ["git", "-C", folder, "describe", "--always", "--dirty=+", "--abbrev=40"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
