"""The trainer of every task: `train_and_evaluate(config, workdir, callbacks=())` and `evaluate(config, workdir)`."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sigmarep.training.callbacks import Callback, StopTraining
    from sigmarep.training.evaluation import evaluate
    from sigmarep.training.loop import train_and_evaluate

__all__ = ["Callback", "StopTraining", "evaluate", "train_and_evaluate"]
MODULES = {"Callback": "callbacks", "StopTraining": "callbacks", "evaluate": "evaluation", "train_and_evaluate": "loop"}


def __getattr__(name: str) -> Any:
    # Imported when it is asked for: what reads runs needs neither JAX nor the seconds that it takes to start.
    if name in MODULES:
        return getattr(importlib.import_module(f"sigmarep.training.{MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
