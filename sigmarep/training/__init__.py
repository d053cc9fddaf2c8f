"""The trainer of every task: `train_and_evaluate(config, workdir)` and `evaluate(config, workdir)`."""

from sigmarep.training.loop import evaluate, train_and_evaluate

__all__ = ["evaluate", "train_and_evaluate"]
