"""Requests of a run to its devices: the loop and the evaluator are generators that yield them and are sent the answers.

`alone` answers those of one run by its own programs; `sigmarep.training.lanes` those of several runs by one program.
"""

import functools
from collections.abc import Callable, Generator
from typing import Any, NamedTuple, Protocol

import jax

from sigmarep.tasks.protocol import Batch


class Request(Protocol):
    """Something that the devices are to do."""

    def answer(self) -> Any:
        """Does it for a run that is alone, and returns what the run is sent."""


class StepRequest(NamedTuple):
    """A training step: arguments of `Runner.step`. It is answered by the new state and the output."""

    runner: Any
    state: Any
    batch: Batch
    panel: bool

    def answer(self) -> Any:
        return self.runner.step(self.state, self.batch, panel=self.panel)


class EvaluationRequest(NamedTuple):
    """A step of an evaluation, answered by an object whose method `on_host` returns its results.

    Attributes:
      function: `Evaluation.step`.
      compiled: compiled programs of the run's evaluations.
      run: the step, compiled, for variables of this run alone.
      variables: in the runner's layout.
    """

    function: Callable[..., Any]
    compiled: dict[Any, Callable[..., Any]]
    run: Callable[..., Any]
    variables: Any
    batch: Batch

    def answer(self) -> Any:
        return _OnDevices(self.run(self.variables, self.batch))


class Pause(NamedTuple):
    """Lets other runs begin what they have to do, such as writing a checkpoint, before this one waits for its own."""

    def answer(self) -> None:
        return None


class _OnDevices(NamedTuple):
    results: Any

    def on_host(self) -> Any:
        return jax.device_get(self.results)


# Returns what the run returns.
Steps = Generator[Request, Any, Any]


def alone(steps: Steps) -> Any:
    """Answers the requests of one run as they come, and returns its result."""
    resume: Callable[[], Request] = functools.partial(steps.send, None)
    while True:
        try:
            request = resume()
        except StopIteration as end:
            return end.value
        try:
            resume = functools.partial(steps.send, request.answer())
        except BaseException as error:
            resume = functools.partial(steps.throw, error)
