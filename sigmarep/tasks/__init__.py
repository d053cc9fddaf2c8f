"""One module a task; `get` finds it by the word in `config.task`."""

import importlib
from types import ModuleType

from sigmarep.errors import BadInput

TASKS = ("image_classification", "contrastive", "language_modeling", "translation", "speech_recognition")


def get(name: str) -> ModuleType:
    """The module of a task, with `default_config()` and `create(config, abstract=…)`.

    Raises:
      BadInput: there is no such task.
    """
    if name not in TASKS:
        raise BadInput(f"config.task = {name!r}: expected one of {', '.join(TASKS)}")
    return importlib.import_module(f"sigmarep.tasks.{name}")
