"""The folder of a run: whose it is, and what it ran on.

`config.json`, the resolved configuration; `environment.json`, versions, devices and git revision of the last start and
of earlier ones; `metrics.jsonl`; `checkpoints/`; `diagnosis.json` after a divergence.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
import time
from typing import Any

import jax
import ml_collections

from sigmarep.errors import BadInput
from sigmarep.training.config import flatten

# What may differ when a run goes on in its workdir: where it runs and what it reports, not what it computes.
FREE = ("parallel", "mesh.", "writers.", "keep_checkpoints", "log_every_", "eval_every_", "checkpoint_every_")
FREE_LEAVES = ("data_dir", "num_threads", "num_workers")
PACKAGES = ("sigmarep", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "ml_collections", "grain", "numpy")


def claim(workdir: str, config: ml_collections.FrozenConfigDict) -> None:
    """Makes `workdir` this configuration's, or checks that it is.

    Raises:
      BadInput: it cannot be written, or holds a run of another configuration.
    """
    path = os.path.join(workdir, "config.json")
    try:
        os.makedirs(workdir, exist_ok=True)
        if os.path.exists(path):
            _check_same(path, config)
        _write(path, json.dumps(json.loads(config.to_json()), indent=2))
        _write(os.path.join(workdir, "environment.json"), json.dumps(_environment(workdir), indent=2))
    except OSError as error:
        raise BadInput(f"--workdir {workdir}: cannot be written ({error.strerror}); choose another folder") from error


def stored_config(workdir: str) -> dict[str, Any]:
    """The contents of `config.json`.

    Raises:
      BadInput: there is none, or it cannot be read.
    """
    path = os.path.join(workdir, "config.json")
    try:
        with open(path) as file:
            return json.load(file)
    except FileNotFoundError:
        raise BadInput(f"--workdir {workdir}: holds no run (there is no config.json)") from None
    except (OSError, ValueError) as error:
        raise BadInput(f"--workdir {workdir}: config.json cannot be read ({error})") from None


def _check_same(path: str, config: ml_collections.FrozenConfigDict) -> None:
    workdir = os.path.dirname(path)
    there = flatten(ml_collections.ConfigDict(stored_config(workdir)))
    here = flatten(ml_collections.ConfigDict(json.loads(config.to_json())))
    for name in sorted(there.keys() | here.keys()):
        if name.startswith(FREE) or name.rsplit(".", 1)[-1] in FREE_LEAVES:
            continue
        old, new = (_plain(side.get(name)) for side in (there, here))
        if old != new:
            raise BadInput(
                f"--workdir {workdir}: holds a run of another configuration (config.{name} is {old!r} there and {new!r} "
                "here); choose another folder, or remove this one"
            )


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(list(value) if isinstance(value, tuple) else value))


def _write(path: str, text: str) -> None:
    temporary = f"{path}.{os.getpid()}"
    with open(temporary, "w") as file:
        file.write(text + "\n")
    os.replace(temporary, path)


def _environment(workdir: str) -> dict[str, Any]:
    try:
        with open(os.path.join(workdir, "environment.json")) as file:
            last = json.load(file)
        earlier = [*last.pop("earlier_starts", []), last]
    except (OSError, ValueError):
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
