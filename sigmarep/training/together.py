"""Several runs of one program made together: `train_together`."""

from collections.abc import Sequence
from typing import Any

import ml_collections

from sigmarep.training.experiment import Programs
from sigmarep.training.lanes import Group
from sigmarep.training.loop import training
from sigmarep.training.requests import Steps


def train_together(
    runs: Sequence[tuple[ml_collections.ConfigDict, str]], *, programs: Programs | None = None
) -> list[dict[str, Any] | Exception]:
    """Makes runs of one program at a time, on one device: see `sigmarep.training.lanes`.

    Args:
      runs: configurations, which differ in what is an input of the program alone (the seed and rates of the optimizer),
        and folders.
      programs: see `train_and_evaluate`.

    Returns:
      For each run the result of `train_and_evaluate`, or what it would have raised.
    """
    group = Group(len(runs))
    results: dict[int, Any] = {}

    def caught(steps: Steps) -> Steps:
        try:
            return (yield from steps)
        except Exception as error:
            return error

    group.run(
        [caught(training(config, folder, programs=programs, place=group.lane())) for config, folder in runs],
        results.__setitem__,
    )
    return [results[i] for i in range(len(runs))]
