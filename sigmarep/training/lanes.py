"""Several runs at a time in one program: requests of the loop, and who answers them.

The loop (`sigmarep.training.loop`) is a generator: it yields a `StepRequest` for every step and is sent the new state and
the output. `alone` answers one run by its own runner. A `Group` waits until all of its runs, the lanes, have asked, and
answers them by one program, `jax.vmap` of the step over states, rates and batches. All else, such as folders, locks,
metrics, checkpoints and callbacks, is each lane's own, in the same code.

Lanes may differ in all that is an input of the program (`sigmarep.training.experiment.program_key`). One that ends early,
diverged or stopped, leaves its place in the program unused. Lanes with equal seeds read one stream, whose batches are given
to the devices once.
"""

import collections
import contextlib
import functools
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from sigmarep import tasks
from sigmarep.errors import BadInput, SigmarepError, Stopped, one_line
from sigmarep.tasks.protocol import Batch, TaskData
from sigmarep.training import mesh as meshes
from sigmarep.training.experiment import program_key
from sigmarep.training.parallel import JitRunner, Runner
from sigmarep.training.preemption import Preemption
from sigmarep.training.step import StepOutput, TrainState


class StepRequest(NamedTuple):
    """A step that a run wants made: arguments of `Runner.step`. It is answered by the new state and the output."""

    runner: Any
    state: Any
    batch: Batch
    panel: bool

    def answer(self) -> Any:
        """Makes the step of a run that is alone."""
        return self.runner.step(self.state, self.batch, panel=self.panel)


# Returns what the run returns.
Steps = Generator[StepRequest, Any, Any]


def alone(steps: Steps) -> Any:
    """Answers the requests of one run as they come, and returns its result."""
    resume: Callable[[], StepRequest] = functools.partial(steps.send, None)
    while True:
        try:
            request = resume()
        except StopIteration as end:
            return end.value
        try:
            resume = functools.partial(steps.send, request.answer())
        except BaseException as error:
            resume = functools.partial(steps.throw, error)


class Alone:
    """The place of a run that has its devices to itself."""

    def open_data(self, config: ml_collections.FrozenConfigDict) -> TaskData:
        """The data side of a validated configuration."""
        return tasks.get(config.task).open_data(config)

    def preemption(self) -> contextlib.AbstractContextManager[Any]:
        """Context that gives an object such as `Preemption`."""
        return Preemption(Stopped.exit_status)

    def runner(self, runner: Runner) -> Any:
        """The runner of the state, for an experiment's runner."""
        return runner


class Lane(Alone):
    """The place of a run in a group, and its `Preemption`.

    Attributes:
      nothing_to_save: see `Preemption`; the group's is that of all lanes.
    """

    def __init__(self, group: "Group", number: int):
        self.group, self.number, self.nothing_to_save = group, number, True

    def open_data(self, config):
        return self.group.open_data(config)

    def preemption(self):
        return contextlib.nullcontext(self)

    def stops_after(self, step: int) -> bool:
        """See `Preemption.stops_after`."""
        return self.group.preemption.requested

    def runner(self, runner):
        return LaneRunner(self.group, self.number, runner)


class LaneRunner:
    """A runner whose state is that of one lane of a group. The group makes the steps.

    Raises:
      BadInput: the state of one run would be on several devices.
    """

    def __init__(self, group: "Group", number: int, runner: Runner):
        if not isinstance(runner, JitRunner):
            raise BadInput("config.parallel = 'pmap': runs made together (--vectorize) need 'jit'")
        if runner.mesh.size > 1:
            raise BadInput(
                f"config.mesh = {dict(runner.mesh.shape)}: runs made together (--vectorize) need one device, not "
                f"{runner.mesh.size}; show the process one, as by CUDA_VISIBLE_DEVICES=0, or set --vectorize 1"
            )
        self._group, self._number, self.own = group, number, runner

    def put_state(self, state: TrainState) -> None:
        """Moves a state into the group's."""
        self._group.put(self._number, state, self.own)

    def get_state(self, _: None) -> TrainState:
        """A copy of the lane's state."""
        return self._group.get(self._number)


class _Results:
    """Outputs of a step of all lanes, fetched once for all that ask."""

    def __init__(self, output: StepOutput):
        self._output = output

    @functools.cached_property
    def scalars(self) -> dict[str, np.ndarray]:
        return jax.device_get(self._output.scalars)

    @functools.cached_property
    def panel(self) -> dict[str, Any]:
        return jax.device_get(self._output.panel)

    def block_until_ready(self) -> None:
        jax.block_until_ready(self._output.scalars["loss"])


class LaneOutput:
    """A `StepOutput` of one lane."""

    def __init__(self, results: _Results, number: int):
        self._results, self._number = results, number

    @property
    def scalars(self) -> dict[str, np.ndarray]:
        """Those of the lane; waits for the step."""
        return {name: values[self._number] for name, values in self._results.scalars.items()}

    def on_host(self) -> StepOutput:
        """See `StepOutput.on_host`."""
        return StepOutput(self.scalars, jax.tree.map(lambda x: x[self._number], self._results.panel))

    def block_until_ready(self) -> None:
        """Waits for the step."""
        self._results.block_until_ready()


class SharedData:
    """The data side of lanes with one seed: those at the same step get the same batch object."""

    def __init__(self, data: TaskData):
        self._data = data
        self._cursors: list[_Cursor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._data, name)

    def train_stream(self, *, start: int, process_index: int, process_count: int) -> Iterator[Batch]:
        """See `TaskData.train_stream`."""
        share = {"process_index": process_index, "process_count": process_count}
        number = start
        while True:
            yield self._batch(number, share)
            number += 1

    def _batch(self, number: int, share: Mapping[str, int]) -> Batch:
        for cursor in self._cursors:
            if cursor.number == number - 1:
                cursor.advance()
            if cursor.number == number:
                return cursor.batch
        cursor = _Cursor(number, self._data.train_stream(start=number, **share))
        self._cursors.append(cursor)
        return cursor.batch


class _Cursor:
    """A stream at the batch `number`."""

    def __init__(self, number: int, stream: Iterator[Batch]):
        self._stream, self.number, self.batch = stream, number, next(stream)

    def advance(self) -> None:
        self.number, self.batch = self.number + 1, next(self._stream)


class Group:
    """Runs of one program key that are made together, on one device of one process.

    Args:
      width: number of runs that the program is compiled for; groups of one width share it.
    """

    def __init__(self, width: int):
        self.width = width
        self.preemption = Preemption(Stopped.exit_status)
        self._lanes: list[Lane] = []
        self._states: Any = None
        self._mesh: Any = None
        self._data: dict[Any, SharedData] = {}
        # Largest number of streams so far: fewer would be another program.
        self._streams = 1
        self._on_device: dict[Any, Any] = {}

    def lane(self) -> Lane:
        """The place of one more run."""
        assert len(self._lanes) < self.width
        self._lanes.append(Lane(self, len(self._lanes)))
        return self._lanes[-1]

    def open_data(self, config: ml_collections.FrozenConfigDict) -> TaskData:
        """The data side of a lane: rates do not change it, so that lanes with one seed share it."""
        key = (program_key(config.to_dict()), config.seed)
        if key not in self._data:
            self._data[key] = SharedData(tasks.get(config.task).open_data(config))
        return self._data[key]  # type: ignore[return-value]

    def put(self, number: int, state: TrainState, runner: JitRunner) -> None:
        """Takes the state of a lane; all lanes have states of the same shapes."""
        if self._states is None:
            self._mesh, shapes = runner.mesh, jax.eval_shape(lambda: state)
            self._states = jax.jit(
                lambda: jax.tree.map(lambda x: jnp.zeros((self.width, *x.shape), x.dtype), shapes),
                out_shardings=meshes.replicated(runner.mesh),
            )()
        self._states = _put(self._states, state, number)

    def get(self, number: int) -> TrainState:
        """A copy of the state of a lane."""
        return _get(self._states, number)

    def run(self, lanes: Sequence[Steps], ended: Callable[[int, Any], object]) -> None:
        """Makes the runs.

        Args:
          lanes: a generator for each of the group's lanes, in their order; what one raises ends all.
          ended: is given the number of a lane and its result, as soon as it has one.
        """
        requests: dict[int, StepRequest] = {}

        def resume(number: int, method: str, value: Any) -> None:
            requests.pop(number, None)
            try:
                requests[number] = getattr(lanes[number], method)(value)
            except StopIteration as end:
                ended(number, end.value)

        with self.preemption:
            try:
                for number in range(len(lanes)):
                    resume(number, "send", None)
                while requests:
                    self.preemption.nothing_to_save = all(self._lanes[number].nothing_to_save for number in requests)
                    answers = self._answers(requests)
                    self.preemption.nothing_to_save = False
                    for number, (method, value) in answers.items():
                        resume(number, method, value)
            finally:
                for lane in lanes:
                    lane.close()

    def _answers(self, requests: Mapping[int, StepRequest]) -> dict[int, tuple[str, Any]]:
        """The method of each lane's generator to be called, with its argument."""
        kinds = collections.defaultdict(list)
        for number, request in requests.items():
            shapes = tuple((name, np.shape(x)) for name, x in sorted(request.batch.items()))
            kinds[request.runner.own.step_of_many, shapes].append(number)
        # Of lanes at different steps one may have to log: what the others do not ask for costs less than a second pass.
        panel = any(request.panel for request in requests.values())
        answers: dict[int, tuple[str, Any]] = {}
        for numbers in kinds.values():
            try:
                results = _Results(self._step(requests, numbers, panel, masked=len(kinds) > 1))
            except Exception as error:
                failure = self._explained(error)
                return {number: ("throw", failure) for number in requests}
            answers |= {number: ("send", (None, LaneOutput(results, number))) for number in numbers}
        return answers

    def _step(
        self, requests: Mapping[int, StepRequest], numbers: Sequence[int], panel: bool, *, masked: bool
    ) -> StepOutput:
        """Makes a step of the lanes `numbers`, whose program and shapes of batches are the same."""
        first = requests[numbers[0]]
        batches = list({id(requests[number].batch): requests[number].batch for number in numbers}.values())
        self._streams = max(self._streams, len(batches))
        batch, index = batches[0], None
        if self._streams > 1:
            place = {id(each): i for i, each in enumerate(batches)}
            chosen = [0] * self.width
            for number in numbers:
                chosen[number] = place[id(requests[number].batch)]
            padded = batches + batches[:1] * (self._streams - len(batches))
            batch = {name: np.stack([each[name] for each in padded]) for name in batch}
            index = self._placed(("index", *chosen), lambda: np.asarray(chosen, np.int32))
        active = np.isin(np.arange(self.width), numbers) if masked else None
        inputs = self._placed((first.runner.own.step_of_many, *numbers), lambda: self._inputs(requests, numbers))
        with meshes.activations_placed(self._mesh):
            self._states, output = first.runner.own.step_of_many(
                self._states, dict(batch), index, active, panel, inputs
            )
        return output

    def _inputs(self, requests: Mapping[int, StepRequest], numbers: Sequence[int]) -> Any:
        """The runners' inputs, stacked; unused places have those of the first lane."""
        every = [
            requests[number if number in numbers else numbers[0]].runner.own.inputs for number in range(self.width)
        ]
        return jax.tree.map(lambda *each: np.asarray(each, np.float32), *every)

    def _placed(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._on_device:
            self._on_device[key] = jax.device_put(make(), meshes.replicated(self._mesh))
        return self._on_device[key]

    def _explained(self, error: Exception) -> Exception:
        if "RESOURCE_EXHAUSTED" not in str(error):
            return error
        failure = SigmarepError(
            f"--vectorize: the device has not enough memory for {self.width} runs at a time ({one_line(error)[:200]}); "
            "make fewer"
        )
        failure.__cause__ = error
        return failure


@functools.partial(jax.jit, donate_argnums=0)
def _put(states: Any, state: Any, number: int) -> Any:
    return jax.tree.map(lambda all_of_them, x: all_of_them.at[number].set(x), states, state)


@jax.jit
def _get(states: Any, number: int) -> Any:
    return jax.tree.map(lambda x: x[number], states)
