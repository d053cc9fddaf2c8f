"""Checkpoints on Orbax: saved in the background, restored onto any devices, checked before they are trusted.

Orbax finds a missing file; a damaged one it may read as other numbers. So once a checkpoint is complete a manifest of
its files' CRC-32 sums is put beside it, and restoring compares them first.
"""

import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from sigmarep.errors import BadInput
from sigmarep.files import write_atomically
from sigmarep.training.mesh import path_name

# What Orbax logs about a checkpoint is said here, in one line, where it matters.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)

MANIFEST = "manifest.json"
DAMAGED = "damaged"


class Restored(NamedTuple):
    """`step` updates were made; `state` in the layout that was asked for; `extra` as it was saved."""

    step: int
    state: Any
    extra: dict[str, Any]


class Checkpointer:
    """The checkpoints of one run.

    Args:
      directory: made if missing.
      keep: how many of the newest to keep.
      say: is given one line when a damaged checkpoint is passed over.
      asynchronous: write in the background. Call `seal` now and then, and `wait` before the process ends.
    """

    def __init__(self, directory: str, *, keep: int, say: Callable[[str], object] = print, asynchronous: bool = True):
        self._directory = os.path.abspath(directory)
        self._keep = keep
        self._say = say
        self._asynchronous = asynchronous
        self._unsealed: int | None = None
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._keep,
            enable_async_checkpointing=self._asynchronous,
            cleanup_tmp_directories=True,
            create=True,
        )
        try:
            return ocp.CheckpointManager(self._directory, options=options)
        except OSError as error:
            raise BadInput(f"{self._directory}: cannot be written ({error.strerror}); choose another folder") from error

    def save(self, step: int, state: Any, *, extra: dict[str, Any]) -> None:
        """Saves `state` and the JSON-able `extra` after `step` updates; does nothing if that step is there already."""
        if step in self.all_steps():
            return
        self.wait()
        if jax.default_backend() == "cpu":
            # On the host a device array is the memory itself, and the next step reuses it while this one is written.
            state = jax.tree.map(lambda x: x.copy(), state)
        about = {"extra": extra, "shapes": _shapes(state)}
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), about=ocp.args.JsonSave(about))
        self._manager.save(step, args=items, force=True)
        self._unsealed = step
        self.seal()

    def seal(self) -> None:
        """Writes the manifest of the last checkpoint once it is complete; cheap, and never waits."""
        if self._unsealed is not None and not self._manager.is_saving_in_progress():
            self._manager.wait_until_finished()
            if jax.process_index() == 0:
                _write_manifest(self._path(self._unsealed))
            self._unsealed = None

    def wait(self) -> None:
        """Returns when everything is on disk."""
        self._manager.wait_until_finished()
        self.seal()

    def close(self) -> None:
        self.wait()
        self._manager.close()

    def all_steps(self) -> list[int]:
        """The steps that have a complete checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

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
            about = self._read(step, about=ocp.args.JsonRestore())["about"]
            _check_shapes(self._path(step), about["shapes"], _shapes(abstract_state))
            return self._read(step, state=ocp.args.StandardRestore(abstract_state))["state"], about["extra"]

        newest = _newest_whole(self._directory, read)
        if newest is None:
            return None
        self._move_aside(newest.damaged, newest.step)
        return Restored(newest.step, *newest.content)

    def _path(self, step: int) -> str:
        return os.path.join(self._directory, str(step))

    def _read(self, step: int, **items: Any) -> Any:
        return self._manager.restore(step, args=ocp.args.Composite(**items))

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
    directory = os.path.abspath(directory)
    manager = ocp.CheckpointManager(directory, options=ocp.CheckpointManagerOptions(read_only=True))

    def read(step):
        about = manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]
        averaged = any(name.startswith("ema/") for name in about["shapes"])
        parameters = "ema" if averaged else "params"
        collections = {name: value for name, value in abstract_variables.items() if name != "params"}
        wanted = {parameters: abstract_variables["params"], "model_state": collections}
        saved = {name: shape for name, shape in about["shapes"].items() if name.split("/")[0] in wanted}
        _check_shapes(os.path.join(directory, str(step)), saved, _shapes(wanted))
        restore = ocp.args.PyTreeRestore(
            item=wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True
        )
        state = manager.restore(step, args=ocp.args.Composite(state=restore))["state"]
        return {"params": state[parameters], **state["model_state"]}

    try:
        newest = _newest_whole(directory, read)
    finally:
        manager.close()
    if newest is None:
        return None
    for step, problem in newest.damaged:
        say(f"the checkpoint of step {step} is damaged ({problem}): using that of step {newest.step}")
    return newest.step, newest.content


class _Newest(NamedTuple):
    """The `content` read of the newest whole checkpoint, of `step`; `damaged`, newer ones and what is wrong with them."""

    step: int
    content: Any
    damaged: list[tuple[int, str]]


def _newest_whole(directory: str, read: Callable[[int], Any]) -> _Newest | None:
    """Reads the newest checkpoint that is whole; None if there is none at all.

    Raises:
      BadInput: all are damaged, or `read` raises it.
    """
    # Listed by name: an incomplete step is no step to Orbax, and would be passed over in silence.
    steps = sorted((int(name) for name in os.listdir(directory) if re.fullmatch(r"\d+", name)), reverse=True)
    damaged: list[tuple[int, str]] = []
    for step in steps:
        problem = _problem(os.path.join(directory, str(step)))
        if problem is None:
            try:
                return _Newest(step, read(step), damaged)
            except BadInput:
                raise
            except Exception as error:
                problem = " ".join(str(error).split())[:200] or type(error).__name__
        damaged.append((step, problem))
    if damaged:
        raise BadInput(
            f"{directory}: every checkpoint is damaged (step {damaged[0][0]}: {damaged[0][1]}); "
            "put whole ones back, or remove the folder to start anew"
        )
    return None


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


def _files(path: str) -> dict[str, int]:
    """CRC-32 of every file below `path`, the manifest aside."""
    sums = {}
    for folder, _, names in os.walk(path):
        for name in names:
            full = os.path.join(folder, name)
            relative = os.path.relpath(full, path)
            if relative == MANIFEST:
                continue
            crc = 0
            with open(full, "rb") as file:
                while chunk := file.read(1 << 20):
                    crc = zlib.crc32(chunk, crc)
            sums[relative] = crc
    return sums


def _write_manifest(path: str) -> None:
    if not os.path.isdir(path):
        return
    write_atomically(os.path.join(path, MANIFEST), json.dumps(_files(path), indent=1), sync=True)


def _problem(path: str) -> str | None:
    """The first difference from the manifest; None if nothing does, or if there is none to compare with."""
    try:
        with open(os.path.join(path, MANIFEST)) as file:
            expected = json.load(file)
    except FileNotFoundError:
        return None
    except ValueError:
        return f"{MANIFEST} cannot be read"
    checksums = _files(path)
    for name, crc in expected.items():
        if name not in checksums:
            return f"{name} is missing"
        if checksums[name] != crc:
            return f"{name} was changed"
    return None
