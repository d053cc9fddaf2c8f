"""One module a task; `get` finds it by the word in `config.task`."""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

import ml_collections

from sigmarep import doors
from sigmarep.errors import BadInput

if TYPE_CHECKING:
    from sigmarep.nn.layers import Layers
    from sigmarep.tasks.protocol import TaskModel

TASKS = ("image_classification", "contrastive", "language_modeling", "translation", "speech_recognition")
# A task is an object with these; see `sigmarep.tasks.protocol`.
FUNCTIONS = ("default_config", "create_model", "open_data")


def get(name: str) -> ModuleType:
    """The module of a task; see `sigmarep.tasks.protocol.Task`.

    Args:
      name: one of `TASKS`, or the dotted Python name of a module, or of an object that has its three functions.

    Raises:
      BadInput: there is no such task.
    """
    if doors.is_dotted(name):
        task = doors.load(name, field="config.task")
        lacks = [each for each in FUNCTIONS if not callable(getattr(task, each, None))]
        if lacks:
            raise BadInput(f"config.task = {name!r}: has no function {lacks[0]}(); see sigmarep.tasks.protocol")
        return task
    if name not in TASKS:
        raise BadInput(f"config.task = {name!r}: expected one of {', '.join(TASKS)}, or a dotted Python name")
    return importlib.import_module(f"sigmarep.tasks.{name}")


def describe_layers(model: "TaskModel") -> "Layers":
    """The layers of a task's model, from its one abstract `init`.

    Raises:
      BadInput: the fields of `config.model` make no model.
    """
    # Commands that only read files of runs import this module and start no JAX.
    import jax

    from sigmarep.core.draws import with_default_keys, written_out
    from sigmarep.nn.layers import describe

    try:
        return describe(lambda key: with_default_keys(model.init(written_out(key))), jax.random.key(0))
    except ValueError as error:
        raise BadInput(f"config.model.{error}") from error


def planned_files(config: ml_collections.ConfigDict) -> dict[str, bytes]:
    """The files that the model side needs, made up in the sizes that the configuration asks for, without reading data.

    Raises:
      BadInput: there is no such task, or a size is only in data that are not prepared.
    """
    planned = getattr(get(config.task), "planned_files", None)
    return {} if planned is None else planned(config)
