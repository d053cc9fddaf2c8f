"""Evaluating variables on every split of their task."""

import collections
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import ml_collections
from jax.sharding import Mesh

from sigmarep import tasks
from sigmarep.errors import BadInput, Diverged
from sigmarep.tasks.protocol import Batch, Evaluation, Outputs
from sigmarep.training import mesh as meshes
from sigmarep.training.divergence import nan_loss
from sigmarep.training.parallel import check_rows, global_batch
from sigmarep.training.processes import steps_in_flight
from sigmarep.training.requests import EvaluationRequest, Steps, alone
from sigmarep.training.restore import restore

# As STEPS_IN_FLIGHT of the loop; and the devices never hold the results of a whole split.
BATCHES_IN_FLIGHT = 2


def evaluate(
    config: ml_collections.ConfigDict | None, folder: str, *, data: Mapping[str, Any] | None = None, average: int = 1
) -> dict[str, float]:
    """Evaluates the newest checkpoint of a workdir on the splits of its task; changes nothing there.

    The training data are read only where a measure asks for them, such as the nearest neighbours of a contrastive run.

    Args:
      config: the stored one if None; else one of the same model, with other splits or ways to decode.
      data: fields of `config.data` to change, such as `{"name": "text_folder", "folder": DIR, "eval_splits": ("test",)}`.
      average: the number of newest checkpoints whose parameters are averaged.

    Raises:
      BadInput: the folder holds no run, no checkpoint or fewer than `average`, `config` is of another model, or a split
        cannot be read.
      Diverged: a loss is NaN.
    """
    run = restore(config, folder, data=data, average=average)
    check_rows(run.config, run.task.batch_rows(), run.mesh)
    opened = tasks.get(run.config.task).open_data(run.config, run.files)
    metrics = Evaluator(run.mesh, opened.evaluations(run.task))(run.variables)
    if name := nan_loss(metrics):
        raise Diverged(f"--workdir {folder}: {name} of the checkpoint of step {run.step} is nan: its model diverged")
    return {"step": run.step, **metrics}


class Evaluator:
    """Compiles the steps of evaluations once and runs them on any variables.

    Attributes:
      outputs: what the model made in the last call, by split.
    """

    def __init__(
        self,
        mesh: Mesh,
        evaluations: Sequence[Evaluation],
        compiled: dict[Any, Callable[..., Any]] | None = None,
    ):
        """Makes an evaluator.

        Args:
          compiled: the steps that others of the same mesh have compiled; those of this one are added.

        Raises:
          BadInput: two evaluations have one name.
        """
        self._mesh, self._evaluations = mesh, list(evaluations)
        names = [evaluation.name for evaluation in self._evaluations]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise BadInput(f"config.data.eval_splits: has two parts of the split {twice[0]!r}; keep one")
        self.outputs: dict[str, Outputs] = {}
        self._compiled = {} if compiled is None else compiled

    def __call__(self, variables: dict[str, Any]) -> dict[str, float]:
        """{"eval/<split>/<metric>": value} of variables in the mesh's layout."""
        return alone(self.steps(variables))

    def steps(self, variables: Any) -> Steps:
        """Does what a call does, of variables in the runner's layout, and yields the steps that are to be made."""
        metrics = {}
        for evaluation in self._evaluations:
            results = yield from self._results(evaluation, variables)
            for name, value in evaluation.finish(results).items():
                metrics[f"eval/{evaluation.name}/{name}"] = value
            if evaluation.outputs is not None:
                self.outputs[evaluation.name] = evaluation.outputs(results)
        return metrics

    def results(self, evaluation: Evaluation, variables: dict[str, Any]) -> list[Any]:
        """Results of an evaluation's step for each of its batches, on the host."""
        return alone(self._results(evaluation, variables))

    def _results(self, evaluation: Evaluation, variables: Any) -> Steps:
        results: list[Any] = []
        in_flight: collections.deque[Any] = collections.deque()
        share, most = meshes.input_share(self._mesh), steps_in_flight(BATCHES_IN_FLIGHT)
        run = functools.partial(self._run, evaluation.step)
        for batch in evaluation.batches(process_index=share.part, process_count=share.parts):
            in_flight.append((yield EvaluationRequest(evaluation.step, self._compiled, run, variables, batch)))
            if len(in_flight) > most:
                results.append(in_flight.popleft().on_host())
        return results + [each.on_host() for each in in_flight]

    def _run(self, step: Callable[..., Any], variables: Any, batch: Batch) -> Any:
        if step not in self._compiled:
            self._compiled[step] = jax.jit(step, out_shardings=meshes.replicated(self._mesh))
        with meshes.activations_placed(self._mesh):
            return self._compiled[step](variables, global_batch(batch, self._mesh))
