"""The files of checkpoints: which of them are whole, their manifests, and reading beside a running trainer.

Orbax finds a missing file; a damaged one it may read as other numbers. So every checkpoint holds a manifest of its files'
CRC-32 sums, and reading compares them first.
"""

import concurrent.futures
import contextlib
import fcntl
import functools
import json
import math
import os
import re
import shutil
import stat
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from sigmarep.errors import BadInput, one_line
from sigmarep.files import read_json, write_atomically
from sigmarep.training.mesh import path_name

MANIFEST = "manifest.json"
# Orbax removes folders with this in their name when the next trainer starts.
TEMPORARY = ocp.path.atomicity.TMP_DIR_SUFFIX
CHECKSUM_THREADS = 8
# The array store takes these in a path for its own.
UNUSABLE = "[]\\"


def check_path(workdir: str) -> None:
    """Raises BadInput where the array store cannot read checkpoints back from below this folder."""
    path = os.path.abspath(workdir)
    if unusable := [character for character in UNUSABLE if character in path]:
        raise BadInput(
            f"--workdir {workdir}: checkpoints cannot be read from a path with {' or '.join(unusable)}; "
            "use a folder whose path has none of [ ] \\"
        )


def steps_of(directory: str) -> list[int]:
    """Steps of the folders of checkpoints, whole or not, oldest first."""
    # By name: a damaged step may be no step to Orbax, and would be passed over in silence.
    return sorted(int(name) for name in os.listdir(directory) if re.fullmatch(r"0|[1-9][0-9]*", name))


def _open_manifest(path: str) -> IO[bytes]:
    # Opening a pipe would wait for its other end.
    return open(os.open(os.path.join(path, MANIFEST), os.O_RDONLY | os.O_NONBLOCK), "rb")


@contextlib.contextmanager
def _shielded(path: str) -> Iterator[None]:
    """Keeps trainers from deleting the checkpoint at `path`: by a shared lock on its manifest, which changes nothing."""
    with contextlib.ExitStack() as stack:
        # Without a manifest, or on a file system without locks, it may vanish.
        with contextlib.suppress(OSError):
            file = stack.enter_context(_open_manifest(path))
            fcntl.flock(file, fcntl.LOCK_SH)
        yield


def delete(path: str) -> None:
    """Deletes the checkpoint at `path`, unless it is being read: then after a later save."""
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(_open_manifest(path))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        except OSError:
            # As in `_shielded`.
            pass
        deleted = f"{path}{TEMPORARY}-deleted"
        # What cannot be deleted is no reason to lose the one that was just saved.
        with contextlib.suppress(OSError):
            os.rename(path, deleted)
    shutil.rmtree(deleted, ignore_errors=True)


def read_items(path: str, **items: Any) -> Any:
    """Items of the checkpoint at `path`. Unlike a manager, it looks at nothing else in the folder and changes nothing."""
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        return checkpointer.restore(path, args=ocp.args.Composite(**items))


class Newest(NamedTuple):
    """The `content` read of the newest whole checkpoint, of `step`; `damaged`, newer ones and what is wrong with them;
    `unverified` if it has no manifest."""

    step: int
    content: Any
    damaged: list[tuple[int, str]]
    unverified: bool


def newest_whole(directory: str, read: Callable[[int], Any], *, before: float = math.inf) -> Newest | None:
    """Reads the newest checkpoint, of a step before `before`, that is whole; None if there is none at all.

    A trainer may delete a checkpoint while it is read: then the newest of those that are left is read. One without a
    manifest, as earlier versions left when they were killed, is read only where no other is whole.

    Raises:
      BadInput: all are damaged, or `read` raises it.
    """
    while True:
        steps = [step for step in steps_of(directory) if step < before]
        damaged: dict[int, str] = {}
        without_manifest = [step for step in steps if not os.path.exists(os.path.join(directory, str(step), MANIFEST))]
        with_manifest = [step for step in steps if step not in without_manifest]
        for step in [*reversed(with_manifest), *reversed(without_manifest)]:
            path = os.path.join(directory, str(step))
            content, problem = _read_whole(path, functools.partial(read, step), sealed=step in with_manifest)
            if problem is None:
                newer = [(each, damaged.get(each, f"{MANIFEST} is missing")) for each in steps if each > step]
                return Newest(step, content, newer, step in without_manifest)
            if not os.path.lexists(path):
                break
            damaged[step] = problem
        else:
            if not damaged:
                return None
            step = max(damaged)
            raise BadInput(
                f"{directory}: every checkpoint is damaged (step {step}: {damaged[step]}); put back whole ones from "
                "a copy, or choose another workdir"
            )


def _read_whole(path: str, read: Callable[[], Any], *, sealed: bool) -> tuple[Any, str | None]:
    """The content of a checkpoint, and None or the reason for which it cannot be used."""
    try:
        with _shielded(path):
            problem = _irregular(path) or (problem_of(path) if sealed else None)
            return (read(), None) if problem is None else (None, problem)
    except BadInput:
        raise
    except Exception as error:
        return None, one_line(error)


def check_shapes(path: str, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises BadInput at the first array whose shape is another in the checkpoint at `path` than the one wanted."""
    for name in sorted(saved.keys() | wanted.keys()):
        saved_shape, wanted_shape = saved.get(name, "no such array"), wanted.get(name, "no such array")
        if saved_shape != wanted_shape:
            raise BadInput(
                f"{path}: is of another configuration: {name} is {saved_shape} there and {wanted_shape} "
                "here; choose another workdir"
            )


def shapes_of(state: Any) -> dict[str, list[int]]:
    """Shapes of the arrays of a tree by path, as JSON keeps them."""
    return {path_name(path): list(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def _irregular(path: str) -> str | None:
    """Words for what is neither file nor folder below `path`, such as a pipe, which would be read for ever."""
    for folder, folders, names in os.walk(path):
        for name in [*folders, *names]:
            if not stat.S_ISREG(mode := os.lstat(os.path.join(folder, name)).st_mode) and not stat.S_ISDIR(mode):
                return f"{name} is no file"
    return None if os.path.isdir(path) else f"{os.path.basename(path)} is no folder"


def _files(path: str) -> dict[str, int]:
    """CRC-32 of every file below `path`, the manifest aside."""
    names = [os.path.relpath(os.path.join(folder, name), path) for folder, _, names in os.walk(path) for name in names]
    names = [name for name in names if name != MANIFEST]
    with concurrent.futures.ThreadPoolExecutor(CHECKSUM_THREADS) as threads:
        return dict(zip(names, threads.map(lambda name: _checksum(os.path.join(path, name)), names), strict=True))


def _checksum(path: str) -> int:
    crc = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            crc = zlib.crc32(chunk, crc)
    return crc


def write_manifest(path: str) -> None:
    """Writes the checksums of the checkpoint at `path` into it."""
    write_atomically(os.path.join(path, MANIFEST), json.dumps(_files(path), indent=1), sync=True)


def problem_of(path: str) -> str | None:
    """The first difference from the manifest, None if there is none."""
    try:
        expected = read_json(os.path.join(path, MANIFEST))
        if not isinstance(expected, dict):
            raise ValueError
    except (OSError, ValueError):
        return f"{MANIFEST} cannot be read"
    checksums = _files(path)
    for name, crc in expected.items():
        if name not in checksums:
            return f"{name} is missing"
        if checksums[name] != crc:
            return f"{name} was changed"
    # Systems put files of their own into folders, whose names begin with a dot.
    unlisted = sorted(name for name in checksums.keys() - expected.keys() if not os.path.basename(name).startswith("."))
    return f"{unlisted[0]} is not in {MANIFEST}" if unlisted else None
