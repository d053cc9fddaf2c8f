"""A trained model from the folder of its run alone: configuration, files and checkpoint."""

import collections
import math
import os
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import ml_collections
from jax.sharding import Mesh

from sigmarep import doors, fields, tasks
from sigmarep.configuration import flatten, nearest
from sigmarep.errors import BadInput, one_line
from sigmarep.tasks.protocol import Files, TaskModel
from sigmarep.training import mesh as meshes
from sigmarep.training import workdir
from sigmarep.training.checkpoints import read_variables
from sigmarep.training.config import FREE, default_config, sections, validate


class Restored(NamedTuple):
    """The newest checkpoint of a run.

    Attributes:
      step: updates made.
      config: validated; what the run was made with, or what was given in its place.
      task: the model side.
      files: of the run.
      variables: that evaluation uses, on the devices of `mesh`.
    """

    step: int
    config: ml_collections.FrozenConfigDict
    task: TaskModel
    files: Files
    variables: dict[str, Any]
    mesh: Mesh


def restore(
    config: ml_collections.ConfigDict | None, folder: str, *, data: Mapping[str, Any] | None = None, average: int = 1
) -> Restored:
    """The model of a workdir on the devices of this machine, which may be others than those of the run.

    No data set is read, unless `config` asks for a way to decode that needs a file which the run did not keep. Nothing is
    changed in the folder.

    Args:
      config: the stored one if None; else one of the same model.
      data: fields of `config.data` to change.
      average: see `sigmarep.training.checkpoints.read_variables`.

    Raises:
      BadInput: the folder holds no run, no checkpoint or fewer than `average`, or `config` is of another model.
    """
    chosen = ml_collections.ConfigDict(config) if config is not None else restored_config(folder)
    elsewhere = config is None and not meshes.fits(chosen.mesh)
    if elsewhere:
        chosen.mesh.update({"data": -1, "fsdp": 1, "tensor": 1})
    for name, value in (data or {}).items():
        _change(chosen, name, value)
    checked = validate(chosen)
    stored = workdir.RunFiles(folder)
    task, files = _create_model(checked, folder, stored)
    if config is not None:
        workdir.check_same_model(folder, checked, task.model_fields)
    devices = jax.devices()
    if elsewhere and jax.process_count() == 1:
        # As many as every batch divides over.
        devices = devices[: math.gcd(len(devices), *task.batch_rows())]
    mesh = meshes.create_mesh(checked.mesh, devices)
    abstract = _abstract_variables(task, mesh, checked)
    restored = read_variables(os.path.join(folder, "checkpoints"), abstract, average=average, say=_warn)
    if restored is None:
        raise BadInput(f"--workdir {folder}: holds no checkpoint yet")
    step, variables = restored
    return Restored(step, checked, task, files, variables, mesh)


def restored_config(folder: str) -> ml_collections.ConfigDict:
    """The configuration that a workdir was made with.

    Raises:
      BadInput: there is none, it does not fit this version, or it names code that the user did not (`sigmarep.doors`).
    """
    stored = workdir.stored_config(folder)
    task = stored.get("task", "")
    if not isinstance(task, str):
        raise BadInput(f"--workdir {folder}: config.json has task = {fields.shown(task)}; expected a name")
    doors.check_stored(stored, folder)
    own = [name for name, declared in fields.flatten(sections(task)) if declared.takes_dotted()]
    doors.check_stored(stored, folder, {name: () for name in own if name not in doors.FIELDS})
    config = default_config(task)
    try:
        config.update(_without_none(stored))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BadInput(f"--workdir {folder}: config.json does not fit this version ({one_line(error)})") from error
    return config


def _without_none(stored: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Without the fields that are None, as they are by default; those of the sections `FREE` have no default."""
    return {
        name: _without_none(value, f"{prefix}{name}.") if isinstance(value, dict) else value
        for name, value in stored.items()
        if value is not None or prefix.startswith(tuple(f"{section}." for section in FREE))
    }


def _change(config: ml_collections.ConfigDict, name: str, value: Any) -> None:
    if "data" not in config or name not in config.data:
        raise BadInput(f"config.data.{name}: there is no such field{nearest(f'data.{name}', flatten(config))}")
    config.data[name] = value


def _create_model(config: ml_collections.FrozenConfigDict, folder: str, stored: Files) -> tuple[TaskModel, Files]:
    task = tasks.get(config.task)
    try:
        return task.create_model(config, stored), stored
    except workdir.MissingFile as missing:
        # A run of an earlier version, or another way to decode: the file is made anew, if the data are at hand.
        try:
            made = task.open_data(config).files()
        except BadInput as error:
            raise BadInput(f"--workdir {folder}: has no {missing.name}, and it cannot be made anew: {error}") from error
        files = collections.ChainMap(stored, made)  # type: ignore[arg-type]
        model = task.create_model(config, files)
        # Before the files: a field that differs says more than a fingerprint that does.
        workdir.check_same_model(folder, config, model.model_fields)
        workdir.check_files(folder, made)
        return model, files
    except BadInput:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise BadInput(f"--workdir {folder}: a file of the run cannot be read ({one_line(error)})") from error


def _abstract_variables(task: TaskModel, mesh: Mesh, config: ml_collections.FrozenConfigDict) -> dict[str, Any]:
    layers = tasks.describe_layers(task)
    variables = dict(layers.variables)
    variables.pop("attention", None)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        variables,
        meshes.state_shardings(variables, mesh, layers, meshes.read_rules(config.mesh.rules)),
    )


def _warn(line: str) -> None:
    # Standard output is the command's own.
    print(line, file=sys.stderr)
