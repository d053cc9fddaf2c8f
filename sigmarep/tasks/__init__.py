"""One module a task; `get` finds it by the word in `config.task`."""

import importlib
from types import ModuleType

import ml_collections

from sigmarep.errors import BadInput

TASKS = ("image_classification", "contrastive", "language_modeling", "translation", "speech_recognition")


def get(name: str) -> ModuleType:
    """The module of a task; see `sigmarep.tasks.protocol.Task`.

    Raises:
      BadInput: there is no such task.
    """
    if name not in TASKS:
        raise BadInput(f"config.task = {name!r}: expected one of {', '.join(TASKS)}")
    return importlib.import_module(f"sigmarep.tasks.{name}")


def planned_files(config: ml_collections.ConfigDict) -> dict[str, bytes]:
    """The files that the model side needs, made up in the sizes that the configuration asks for, without reading data.

    Raises:
      BadInput: there is no such task, or a size is only in data that are not prepared.
    """
    planned = getattr(get(config.task), "planned_files", None)
    return {} if planned is None else planned(config)
