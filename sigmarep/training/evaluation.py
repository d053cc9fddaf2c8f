"""Evaluating a state on every split of its task."""

import collections
from collections.abc import Callable
from typing import Any

import jax

from sigmarep.errors import BadInput
from sigmarep.tasks.protocol import Evaluation, Outputs
from sigmarep.training import mesh as meshes
from sigmarep.training.experiment import Experiment
from sigmarep.training.parallel import global_batch
from sigmarep.training.processes import steps_in_flight
from sigmarep.training.step import TrainState, evaluation_variables

# As STEPS_IN_FLIGHT of the loop; and the devices never hold the results of a whole split.
BATCHES_IN_FLIGHT = 2


class Evaluator:
    """Compiles the evaluation steps of an experiment once and runs them on any state in the mesh's layout.

    Attributes:
      outputs: what the last call's models made, by split.
    """

    def __init__(self, experiment: Experiment):
        """Raises BadInput where a split cannot be evaluated."""
        self._mesh = experiment.runner.mesh
        self._evaluations: list[Evaluation] = experiment.task.evaluations()
        names = [evaluation.name for evaluation in self._evaluations]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise BadInput(f"config.data.eval_splits: has two parts of the split {twice[0]!r}; keep one")
        self.outputs: dict[str, Outputs] = {}
        self._compiled: dict[Callable[..., Any], Callable[..., Any]] = {}

    def __call__(self, state: TrainState) -> dict[str, float]:
        """Returns {"eval/<split>/<metric>": value}; the state is not changed."""
        variables = evaluation_variables(state)
        metrics = {}
        for evaluation in self._evaluations:
            results = self.results(evaluation, variables)
            for name, value in evaluation.finish(results).items():
                metrics[f"eval/{evaluation.name}/{name}"] = value
            if evaluation.outputs is not None:
                self.outputs[evaluation.name] = evaluation.outputs(results)
        return metrics

    def results(self, evaluation: Evaluation, variables: dict[str, Any]) -> list[Any]:
        """What the evaluation's step makes of each of its batches, on the host."""
        results: list[Any] = []
        in_flight: collections.deque[Any] = collections.deque()
        share, most = meshes.input_share(self._mesh), steps_in_flight(BATCHES_IN_FLIGHT)
        for batch in evaluation.batches(process_index=share.part, process_count=share.parts):
            with meshes.activations_placed(self._mesh):
                in_flight.append(self._step(evaluation)(variables, global_batch(batch, self._mesh)))
            if len(in_flight) > most:
                results.append(jax.device_get(in_flight.popleft()))
        return results + jax.device_get(list(in_flight))

    def _step(self, evaluation: Evaluation) -> Callable[..., Any]:
        if evaluation.step not in self._compiled:
            self._compiled[evaluation.step] = jax.jit(evaluation.step, out_shardings=meshes.replicated(self._mesh))
        return self._compiled[evaluation.step]
