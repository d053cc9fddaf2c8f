"""Checkpoints on Orbax: saved in the background, restored onto any devices, checked before they are trusted.

Orbax finds a missing file; a damaged one it may read as other numbers. So every checkpoint holds a manifest of its files'
CRC-32 sums, written before the rename that makes it one, and restoring compares them first. A folder that is deleted or
set aside leaves its place by one rename too: a reader beside a running trainer meets whole checkpoints or none.
"""

import asyncio
import concurrent.futures
import contextlib
import fcntl
import functools
import json
import logging
import os
import re
import shutil
import stat
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from sigmarep.errors import BadInput, SigmarepError, one_line
from sigmarep.files import read_json, write_atomically
from sigmarep.training.mesh import path_name

# What Orbax logs about a checkpoint is said here, in one line, where it matters.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)

MANIFEST = "manifest.json"
DAMAGED, DIVERGED = "damaged", "diverged"
# Orbax removes folders with this in their name when the next trainer starts.
TEMPORARY = ocp.path.atomicity.TMP_DIR_SUFFIX
CHECKSUM_THREADS = 8
# The array store takes these in a path for its own.
UNUSABLE = "[]\\"


class Restored(NamedTuple):
    """`step` updates were made; `state` in the layout that was asked for; `extra` as it was saved."""

    step: int
    state: Any
    extra: dict[str, Any]


def check_path(workdir: str) -> None:
    """Raises BadInput where the array store cannot read checkpoints back from below this folder."""
    path = os.path.abspath(workdir)
    if unusable := [character for character in UNUSABLE if character in path]:
        raise BadInput(
            f"--workdir {workdir}: checkpoints cannot be read from a path with {' or '.join(unusable)}; "
            "use a folder whose path has none of [ ] \\"
        )


class _SealedPath(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """The temporary folder of a save. A step's folder gets its manifest before the rename that makes it a checkpoint."""

    _final_path: Any

    @staticmethod
    def after_rename() -> None:
        """Called when a checkpoint is complete."""

    async def finalize(self) -> None:
        final = self._final_path
        if not final.name.isdecimal():
            # One item of a checkpoint.
            await super().finalize()
            return
        sealing = final.parent / f"{final.name}{TEMPORARY}-sealing"
        # Left by a save that failed.
        await asyncio.to_thread(shutil.rmtree, sealing, ignore_errors=True)
        self._final_path = sealing
        try:
            await super().finalize()
        finally:
            self._final_path = final
        await asyncio.to_thread(_write_manifest, os.fspath(sealing))
        os.rename(sealing, final)
        self.after_rename()


class Checkpointer:
    """The checkpoints of one run, for its trainer alone: others read them by `read_variables`.

    Args:
      directory: made if missing.
      keep: how many of the newest to keep; `last_good` is kept besides.
      say: is given one line when a damaged checkpoint is passed over.

    Attributes:
      last_good: the step of the newest checkpoint whose parameters a later step has shown to be good, None before one is.
    """

    def __init__(self, directory: str, *, keep: int, say: Callable[[str], object] = print):
        self._directory = os.path.abspath(directory)
        # One that is asked for is kept, whatever the configuration says.
        self._keep = max(keep, 1)
        self._say = say
        self.last_good: int | None = None
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None,
            temporary_path_class=type("SealedPath", (_SealedPath,), {"after_rename": staticmethod(self._delete_old)}),
            cleanup_tmp_directories=True,
            create=True,
        )
        try:
            os.makedirs(self._directory, exist_ok=True)
            self._manager = ocp.CheckpointManager(self._directory, options=options)
        except OSError as error:
            raise BadInput(f"{self._directory}: cannot be written ({error.strerror}); choose another folder") from error

    def save(self, step: int, state: Any, *, extra: dict[str, Any]) -> None:
        """Saves `state` and the JSON-able `extra` after `step` updates, in the background; call `wait` before the process
        ends. Does nothing if that step is there already.

        Raises:
          SigmarepError: this save or the one before failed, for example because the disk is full.
        """
        self.wait()
        if step in self.all_steps():
            return
        if jax.default_backend() == "cpu":
            # On the host a device array is the memory itself, and the next step reuses it while this one is written.
            state = jax.tree.map(lambda x: x.copy(), state)
        about = {"extra": extra, "shapes": _shapes(state)}
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), about=ocp.args.JsonSave(about))
        with self._failing_in_one_line():
            self._manager.save(step, args=items, force=True)

    def wait(self) -> None:
        """Returns when everything is on disk.

        Raises:
          SigmarepError: the last save failed.
        """
        with self._failing_in_one_line():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _failing_in_one_line(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            text = one_line(error)
            # Orbax and the array store wrap the system's error in their own.
            if not isinstance(error, OSError) and "No space left" not in text and "Disk quota" not in text:
                raise
            raise SigmarepError(f"{self._directory}: a checkpoint cannot be written ({text})") from error

    def close(self) -> None:
        try:
            self.wait()
        finally:
            self._manager.close()

    def all_steps(self) -> list[int]:
        """The steps that have a complete checkpoint, oldest first."""
        return _steps(self._directory)

    def _delete_old(self) -> None:
        """Deletes all but the newest checkpoints and the last good one."""
        steps = self.all_steps()
        for step in steps[: -self._keep]:
            if step != self.last_good:
                _delete(self._path(step))

    def set_aside_after(self, step: int) -> None:
        """Moves the checkpoints of later steps, left by a run that diverged, to the folder `diverged`."""
        self.wait()
        if jax.process_index() == 0:
            for later in [each for each in self.all_steps() if each > step]:
                target = os.path.join(self._directory, DIVERGED, str(later))
                os.makedirs(os.path.dirname(target), exist_ok=True)
                # That of an earlier attempt, which came to the same end.
                shutil.rmtree(target, ignore_errors=True)
                os.rename(self._path(later), target)
        self._manager.reload()

    def restore(self, abstract_state: Any) -> Restored | None:
        """The newest checkpoint that is whole, None if there never was one.

        A damaged one is moved to the folder `damaged` and said so; the one before it is used.

        Args:
          abstract_state: a `jax.ShapeDtypeStruct` with a sharding for every array: the devices may be others than those
            that saved.

        Raises:
          BadInput: all are damaged, or the checkpoint is one of another configuration; nothing is changed then.
        """

        def read(step):
            about = _read(self._path(step), about=ocp.args.JsonRestore())["about"]
            _check_shapes(self._path(step), about["shapes"], _shapes(abstract_state))
            if not isinstance(about["extra"], dict):
                raise TypeError("expected an object of what is kept beside the state")
            return _read(self._path(step), state=ocp.args.StandardRestore(abstract_state))["state"], about["extra"]

        newest = _newest_whole(self._directory, read)
        if newest is None:
            return None
        if newest.unverified:
            self._say(f"the checkpoint of step {newest.step} has no checksums: it is used, but cannot be verified")
        self._move_aside(newest.damaged, newest.step)
        return Restored(newest.step, *newest.content)

    def _path(self, step: int) -> str:
        return os.path.join(self._directory, str(step))

    def _move_aside(self, problems: list[tuple[int, str]], used: int) -> None:
        if not problems or jax.process_index() != 0:
            return
        for step, problem in problems:
            self._say(
                f"the checkpoint of step {step} is damaged ({problem}): going on from step {used}; "
                f"the damaged one is kept in {os.path.join(self._directory, DAMAGED)}"
            )
            target = os.path.join(self._directory, DAMAGED, str(step))
            number = 1
            while os.path.exists(target):
                number += 1
                target = os.path.join(self._directory, DAMAGED, f"{step}-{number}")
            os.makedirs(os.path.dirname(target), exist_ok=True)
            shutil.move(self._path(step), target)
        self._manager.reload()


def has_checkpoint(workdir: str) -> bool:
    """True if the folder of a run holds a checkpoint, whole or not."""
    directory = os.path.join(workdir, "checkpoints")
    return os.path.isdir(directory) and bool(_steps(directory))


def read_variables(
    directory: str, abstract_variables: dict[str, Any], *, say: Callable[[str], object] = print
) -> tuple[int, dict[str, Any]] | None:
    """The variables of the newest whole checkpoint and its step, None if there never was one; changes nothing on the disk.

    `params` are those that evaluation uses: averaged ones where the run kept an average. The optimizer's state is not read.

    Args:
      directory: of a `Checkpointer`.
      abstract_variables: a `jax.ShapeDtypeStruct` with a sharding for every array of `params` and the other collections.
      say: is given one line when a damaged checkpoint is passed over.

    Raises:
      BadInput: all are damaged, or the checkpoint is one of another configuration.
    """
    if not os.path.isdir(directory):
        return None
    check_path(os.path.dirname(os.path.abspath(directory)))
    directory = os.path.abspath(directory)

    def read(step):
        path = os.path.join(directory, str(step))
        about = _read(path, about=ocp.args.JsonRestore())["about"]
        averaged = any(name.startswith("ema/") for name in about["shapes"])
        parameters = "ema" if averaged else "params"
        collections = {name: value for name, value in abstract_variables.items() if name != "params"}
        wanted = {parameters: abstract_variables["params"], "model_state": collections}
        saved = {name: shape for name, shape in about["shapes"].items() if name.split("/")[0] in wanted}
        _check_shapes(path, saved, _shapes(wanted))
        restore = ocp.args.PyTreeRestore(
            item=wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True
        )
        state = _read(path, state=restore)["state"]
        return {"params": state[parameters], **state["model_state"]}

    newest = _newest_whole(directory, read)
    if newest is None:
        return None
    if newest.unverified:
        say(f"the checkpoint of step {newest.step} has no checksums: it is used, but cannot be verified")
    for step, problem in newest.damaged:
        say(f"the checkpoint of step {step} is damaged ({problem}): using that of step {newest.step}")
    return newest.step, newest.content


def _steps(directory: str) -> list[int]:
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


def _delete(path: str) -> None:
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


def _read(path: str, **items: Any) -> Any:
    """Items of the checkpoint at `path`. Unlike a manager, it looks at nothing else in the folder and changes nothing."""
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        return checkpointer.restore(path, args=ocp.args.Composite(**items))


class _Newest(NamedTuple):
    """The `content` read of the newest whole checkpoint, of `step`; `damaged`, newer ones and what is wrong with them;
    `unverified` if it has no manifest."""

    step: int
    content: Any
    damaged: list[tuple[int, str]]
    unverified: bool


def _newest_whole(directory: str, read: Callable[[int], Any]) -> _Newest | None:
    """Reads the newest checkpoint that is whole; None if there is none at all.

    A trainer may delete a checkpoint while it is read: then the newest of those that are left is read. One without a
    manifest, as earlier versions left when they were killed, is read only where no other is whole.

    Raises:
      BadInput: all are damaged, or `read` raises it.
    """
    while True:
        steps = _steps(directory)
        damaged: dict[int, str] = {}
        without_manifest = [step for step in steps if not os.path.exists(os.path.join(directory, str(step), MANIFEST))]
        with_manifest = [step for step in steps if step not in without_manifest]
        for step in [*reversed(with_manifest), *reversed(without_manifest)]:
            path = os.path.join(directory, str(step))
            content, problem = _read_whole(path, functools.partial(read, step), sealed=step in with_manifest)
            if problem is None:
                newer = [(each, damaged.get(each, f"{MANIFEST} is missing")) for each in steps if each > step]
                return _Newest(step, content, newer, step in without_manifest)
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
            problem = _irregular(path) or (_problem(path) if sealed else None)
            return (read(), None) if problem is None else (None, problem)
    except BadInput:
        raise
    except Exception as error:
        return None, one_line(error)


def _check_shapes(path: str, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name in sorted(saved.keys() | wanted.keys()):
        saved_shape, wanted_shape = saved.get(name, "no such array"), wanted.get(name, "no such array")
        if saved_shape != wanted_shape:
            raise BadInput(
                f"{path}: is of another configuration: {name} is {saved_shape} there and {wanted_shape} "
                "here; choose another workdir"
            )


def _shapes(state: Any) -> dict[str, list[int]]:
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


def _write_manifest(path: str) -> None:
    write_atomically(os.path.join(path, MANIFEST), json.dumps(_files(path), indent=1), sync=True)


def _problem(path: str) -> str | None:
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
