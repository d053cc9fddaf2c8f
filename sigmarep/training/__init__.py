"""The trainer of every task: `train_and_evaluate(config, workdir)` and `evaluate(config, workdir)`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sigmarep.training.loop import evaluate, train_and_evaluate

__all__ = ["evaluate", "train_and_evaluate"]


def __getattr__(name: str) -> Any:
    # Imported when it is asked for: what reads runs needs neither JAX nor the seconds that it takes to start.
    if name in __all__:
        from sigmarep.training import loop

        return getattr(loop, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
