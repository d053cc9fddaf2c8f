"""Callbacks: what watches a run while it goes on, adds to its metrics, and may end it early.

    class Prune(Callback):
        def on_evaluation(self, run, step, metrics):
            if metrics["eval/test/accuracy"] < 0.2:
                raise StopTraining("no better than chance")

    train_and_evaluate(config, workdir, callbacks=[Prune()])

or, from a configuration, `config.callbacks = ("my_package.Prune",)`: a class or function that is called without arguments
and returns a callback, or a callback.

After step s the loop calls, in this order, what is due: `on_step`, `on_log`, `on_evaluation`, `on_checkpoint`. A log
that nothing else waits for is fetched while the devices make step s + 1, so that they never wait for it: its `on_log`
comes just before `on_step` of s + 1, and an evaluation or a checkpoint after step s comes after it. The first step of
a start is logged at once: the second may have to be compiled. At each event the product's own callbacks go first
(metric writers, the test for divergence, the progress line), then those of the configuration, then those given in
Python. `on_end` goes the other way round.

Every process of a run on several hosts calls its callbacks, with the same metrics. They must decide alike: one that
stops alone leaves the others waiting for it. Only `run.write` keeps to process 0 by itself.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from sigmarep import doors
from sigmarep.errors import BadInput, SigmarepError

if TYPE_CHECKING:
    import ml_collections

    from sigmarep.training.step import TrainState


class StopTraining(Exception):
    """Raised by a callback to end the run after the current step: its events are finished, the state is saved, the
    workdir keeps the reason, and the command ends with exit status 0.

    Args:
      reason: one line, shown by the command, sweeps and reports.
      evaluate: evaluate the last state, unless that was just done.
    """

    def __init__(self, reason: str, *, evaluate: bool = False):
        super().__init__(reason)
        self.reason = " ".join(reason.split())
        self.evaluate = evaluate


class Run(Protocol):
    """The run as a callback sees it.

    Attributes:
      step: updates made so far.
      total_steps: of the whole run.
      workdir: the run's folder.
    """

    step: int
    total_steps: int
    workdir: str

    @property
    def config(self) -> "ml_collections.FrozenConfigDict":
        """The validated configuration, as `config.intervention` has changed it by now."""

    @property
    def state(self) -> "TrainState":
        """The state after `step`, in the mesh's layout. The next step reuses its memory: `jax.device_get` what is to be
        kept."""

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Adds scalars to the run's metrics, at `step`. Name them as in "my_package/norm"."""


class Callback:
    """Does nothing; subclasses override the events that they need. The module's docstring has their order."""

    def on_start(self, run: Run) -> None:
        """Before the first step of this start; `run.step` is that of the checkpoint, 0 at the very beginning."""

    def on_step(self, run: Run) -> None:
        """After the devices were given a step. Reading `run.state` here waits for them, at every step."""

    def on_log(self, run: Run, step: int, metrics: Mapping[str, float]) -> None:
        """`metrics` of `step` are written, which may be the step before `run.step`."""

    def on_evaluation(self, run: Run, step: int, metrics: Mapping[str, float]) -> None:
        """The state after `step` was evaluated: `metrics` are named eval/<split>/<metric>."""

    def on_checkpoint(self, run: Run, step: int) -> None:
        """The state after `step` is saved, on the disk or on its way there."""

    def on_end(self, run: Run) -> None:
        """The last event, however the run ends: done, early, stopped by a signal or by an error."""

    def state_dict(self) -> dict[str, Any]:
        """State that a checkpoint keeps of this callback, as JSON; what counts evaluations has to go on counting."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state_dict`'s value in the checkpoint that the run resumes from; called before `on_start`."""


class Stop(NamedTuple):
    """Why a run ends early, and whether its last state is to be evaluated."""

    reason: str
    evaluate: bool


class Callbacks:
    """All callbacks of a run.

    Args:
      own: the product's. Their errors are passed on as they are; those of others name the callback.
      others: by name, which checkpoints keep their states under.

    Attributes:
      stop: set once a callback has raised StopTraining.
    """

    def __init__(self, own: Sequence[Callback], others: Mapping[str, Callback]):
        self._own, self._others = own, others
        self._started = False
        self.stop: Stop | None = None

    def emit(self, event: str, *args: Any) -> None:
        """Calls the method `event` of all; one that stops the run leaves the others their event.

        Raises:
          CallbackError: a callback fails.
        """
        self._started = True
        for callback in self._own:
            getattr(callback, event)(*args)
        for name, callback in self._others.items():
            try:
                with failing_by_name(name, event):
                    getattr(callback, event)(*args)
            except StopTraining as stop:
                self.stop = self.stop or Stop(stop.reason, stop.evaluate)

    def end(self, run: Run) -> None:
        """Calls `on_end` of all, the last one first, whichever of them fail; of the product's alone, which hold open files
        from the beginning, if there was no event."""
        with contextlib.ExitStack() as stack:
            for own in self._own:
                stack.callback(own.on_end, run)
            for name, callback in self._others.items() if self._started else ():
                stack.callback(self._end, name, callback, run)

    def _end(self, name: str, callback: Callback, run: Run) -> None:
        # The run has ended: there is nothing left to stop.
        with contextlib.suppress(StopTraining), failing_by_name(name, "on_end"):
            callback.on_end(run)

    def state_dict(self) -> dict[str, Any]:
        """The states of all that have one, by name."""
        states = {}
        for name, callback in self._others.items():
            with failing_by_name(name, "state_dict"):
                states[name] = callback.state_dict()
        return {name: state for name, state in states.items() if state}

    def load_state_dict(self, states: Mapping[str, Any]) -> None:
        """Gives every callback its state back; one that is new to the run has none."""
        for name, callback in self._others.items():
            if name in states:
                with failing_by_name(name, "load_state_dict"):
                    callback.load_state_dict(states[name])


class CallbackError(RuntimeError):
    """A callback or a metric writer that is not the product's failed; the cause is what it raised."""


@contextlib.contextmanager
def failing_by_name(name: str, method: str) -> Iterator[None]:
    """Puts the name before the message of an exception raised within."""
    try:
        yield
    except (StopTraining, SigmarepError, CallbackError):
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        raise CallbackError(f"{name} failed in {method}: {type(error).__name__}: {text}") from error


def named_callbacks(words: Sequence[str], given: Sequence[Callback]) -> dict[str, Callback]:
    """The callbacks of `config.callbacks`, then those given in Python, by names that differ.

    Raises:
      BadInput: a word names nothing, or no callback.
    """
    named: dict[str, Callback] = {}
    for word in words:
        callback = doors.load(word, field="config.callbacks")
        if not isinstance(callback, Callback):
            if not callable(callback):
                raise BadInput(
                    f"config.callbacks = {word!r}: expected a callback, or what returns one when it is called"
                )
            with failing_by_name(word, "its call"):
                callback = callback()
        if not isinstance(callback, Callback):
            raise BadInput(
                f"config.callbacks = {word!r}: gives a {type(callback).__name__}; expected a subclass of "
                "sigmarep.training.Callback"
            )
        named[_unused(word, named)] = callback
    for callback in given:
        if not isinstance(callback, Callback):
            raise BadInput(f"callbacks: got {callback!r}; expected instances of sigmarep.training.Callback")
        named[_unused(f"{type(callback).__module__}.{type(callback).__qualname__}", named)] = callback
    return named


def _unused(name: str, taken: Mapping[str, Any]) -> str:
    number = 1
    while name in taken:
        number += 1
        name = f"{name.partition('#')[0]}#{number}"
    return name
