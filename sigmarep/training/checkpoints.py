"""Checkpoints on Orbax: saved in the background, restored onto any devices, checked before they are trusted.

A checkpoint gets its manifest (`sigmarep.training.checkpoint_files`) before the rename that makes it one. A folder that is
deleted or set aside leaves its place by one rename too: a reader beside a running trainer meets whole checkpoints or none.
"""

import asyncio
import contextlib
import functools
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from sigmarep.errors import BadInput, SigmarepError, one_line
from sigmarep.training.checkpoint_files import (
    TEMPORARY,
    Newest,
    check_path,
    check_shapes,
    delete,
    newest_whole,
    read_items,
    shapes_of,
    steps_of,
    write_manifest,
)

# What Orbax logs about a checkpoint is said here, in one line, where it matters.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)

DAMAGED, DIVERGED = "damaged", "diverged"


class Restored(NamedTuple):
    """`step` updates were made; `state` in the layout that was asked for; `extra` as it was saved."""

    step: int
    state: Any
    extra: dict[str, Any]


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
        await asyncio.to_thread(write_manifest, os.fspath(sealing))
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
        about = {"extra": extra, "shapes": shapes_of(state)}
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
        return steps_of(self._directory)

    def _delete_old(self) -> None:
        """Deletes all but the newest checkpoints and the last good one."""
        steps = self.all_steps()
        for step in steps[: -self._keep]:
            if step != self.last_good:
                delete(self._path(step))

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
            about = read_items(self._path(step), about=ocp.args.JsonRestore())["about"]
            check_shapes(self._path(step), about["shapes"], shapes_of(abstract_state))
            if not isinstance(about["extra"], dict):
                raise TypeError("expected an object of what is kept beside the state")
            return read_items(self._path(step), state=ocp.args.StandardRestore(abstract_state))["state"], about["extra"]

        newest = newest_whole(self._directory, read)
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
    return os.path.isdir(directory) and bool(steps_of(directory))


def read_variables(
    directory: str, abstract_variables: dict[str, Any], *, average: int = 1, say: Callable[[str], object] = print
) -> tuple[int, dict[str, Any]] | None:
    """The variables of the newest whole checkpoint and its step, None if there never was one; changes nothing on the disk.

    `params` are those that evaluation uses: averaged ones where the run kept an average. The optimizer's state is not read.

    Args:
      directory: of a `Checkpointer`.
      abstract_variables: a `jax.ShapeDtypeStruct` with a sharding for every array of `params` and the other collections.
      average: the number of newest checkpoints whose `params` are averaged; the other collections are the newest one's, so
        that σ of an average is that of one power step on it.
      say: is given one line when a damaged checkpoint is passed over.

    Raises:
      BadInput: all are damaged, one is of another configuration, or there are fewer than `average`.
    """
    if not os.path.isdir(directory):
        return None
    check_path(os.path.dirname(os.path.abspath(directory)))
    directory = os.path.abspath(directory)

    def read(step):
        path = os.path.join(directory, str(step))
        about = read_items(path, about=ocp.args.JsonRestore())["about"]
        averaged = any(name.startswith("ema/") for name in about["shapes"])
        parameters = "ema" if averaged else "params"
        collections = {name: value for name, value in abstract_variables.items() if name != "params"}
        wanted = {parameters: abstract_variables["params"], "model_state": collections}
        saved = {name: shape for name, shape in about["shapes"].items() if name.split("/")[0] in wanted}
        check_shapes(path, saved, shapes_of(wanted))
        restore = ocp.args.PyTreeRestore(
            item=wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True
        )
        state = read_items(path, state=restore)["state"]
        return {"params": state[parameters], **state["model_state"]}

    newest = newest_whole(directory, read)
    if newest is None:
        return None
    _tell(newest, say)
    variables, oldest = newest.content, newest.step
    for number in range(2, average + 1):
        older = newest_whole(directory, read, before=oldest)
        if older is None:
            raise BadInput(
                f"{directory}: holds {number - 1} of the {average} checkpoints to average; average fewer, or train with a "
                f"larger config.keep_checkpoints"
            )
        _tell(older, say)
        variables["params"] = _moved(variables["params"], older.content["params"], 1 / number)
        oldest = older.step
    return newest.step, variables


@functools.partial(jax.jit, donate_argnums=0)
def _moved(mean: Any, new: Any, share: float) -> Any:
    """A running mean with one more tree in it."""
    return jax.tree.map(lambda old, x: old + (x - old) * jnp.asarray(share, old.dtype), mean, new)


def _tell(newest: Newest, say: Callable[[str], object]) -> None:
    if newest.unverified:
        say(f"the checkpoint of step {newest.step} has no checksums: it is used, but cannot be verified")
    for step, problem in newest.damaged:
        say(f"the checkpoint of step {step} is damaged ({problem}): using that of step {newest.step}")
