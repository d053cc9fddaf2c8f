"""Several runs at a time in one program.

A run yields its requests to the devices (`sigmarep.training.requests`). A `Group` waits until all of its runs, the lanes,
have asked, and answers them by one program, `jax.vmap` of the step over states, rates and batches. All else, such as
folders, locks, metrics, checkpoints and callbacks, is each lane's own, in the same code that makes a run alone.

Lanes may differ in all that is an input of the program (`sigmarep.training.experiment.program_key`). One that ends early,
diverged or stopped, leaves its place in the program unused. Lanes with equal seeds read one stream, whose batches are given
to the devices once.
"""

import collections
import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from sigmarep import tasks
from sigmarep.errors import BadInput, SigmarepError, Stopped, one_line
from sigmarep.tasks.protocol import Batch, Evaluation, TaskData
from sigmarep.training import mesh as meshes
from sigmarep.training.experiment import program_key
from sigmarep.training.parallel import JitRunner, Runner
from sigmarep.training.preemption import Preemption
from sigmarep.training.requests import EvaluationRequest, Pause, StepRequest, Steps
from sigmarep.training.step import StepOutput, TrainState, evaluation_variables


class TooManyRuns(SigmarepError):
    """The device has not enough memory for so many runs at a time."""


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

    def evaluation_variables(self, _: None) -> None:
        """Those of the group's state are used."""


class _Results:
    """Outputs of a program of all lanes, fetched once for all that ask."""

    def __init__(self, output: Any):
        self.output = output

    @functools.cached_property
    def on_host(self) -> Any:
        return jax.device_get(self.output)

    def of(self, number: int) -> Any:
        """Those of a lane, on the host."""
        return jax.tree.map(lambda x: x[number], self.on_host)


class LaneResults:
    """Results of an evaluation's step of one lane."""

    def __init__(self, results: _Results, number: int):
        self._results, self._number = results, number

    def on_host(self) -> Any:
        """The same in the memory of the host."""
        return self._results.of(self._number)


class LaneOutput:
    """A `StepOutput` of one lane."""

    def __init__(self, scalars: _Results, panel: _Results, number: int):
        self._scalars, self._panel, self._number = scalars, panel, number

    @property
    def scalars(self) -> dict[str, Any]:
        """Those of the lane, on the host."""
        return self._scalars.of(self._number)

    def on_host(self) -> StepOutput:
        """See `StepOutput.on_host`."""
        return StepOutput(self.scalars, self._panel.of(self._number))

    def block_until_ready(self) -> None:
        """Waits for the step."""
        jax.block_until_ready(self._scalars.output)


class SharedData:
    """The data side of lanes with one seed: those at the same place get the same batch object."""

    def __init__(self, data: TaskData):
        self._data = data
        self._streams: dict[Any, _SharedStream] = {}
        self._evaluations: dict[int, tuple[Any, list[Evaluation]]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._data, name)

    def train_stream(self, *, start: int, process_index: int, process_count: int) -> Iterator[Batch]:
        """See `TaskData.train_stream`."""
        share = {"process_index": process_index, "process_count": process_count}
        stream = self._streams.setdefault(
            (process_index, process_count), _SharedStream(lambda number: self._data.train_stream(start=number, **share))
        )
        return stream.read(start)

    def evaluations(self, model: Any) -> list[Evaluation]:
        """See `TaskData.evaluations`; opened once for a model."""
        if id(model) not in self._evaluations:
            shared = [each._replace(batches=_shared(each.batches)) for each in self._data.evaluations(model)]
            # The model is kept, lest another one have its number.
            self._evaluations[id(model)] = (model, shared)
        return self._evaluations[id(model)][1]


def _shared(batches: Callable[..., Iterable[Batch]]) -> Callable[..., Iterable[Batch]]:
    """`Evaluation.batches` for lanes that read the same ones at about the same time."""
    streams: dict[Any, _SharedStream] = {}

    def read(**share: int) -> Iterator[Batch]:
        stream = streams.setdefault(
            tuple(sorted(share.items())), _SharedStream(lambda number: itertools.islice(batches(**share), number, None))
        )
        return stream.read(0)

    return read


class _SharedStream:
    """A stream of numbered batches with several readers, whose places in it are near each other.

    Args:
      opened: makes the stream of the batches from a number on.
    """

    def __init__(self, opened: Callable[[int], Iterator[Batch]]):
        self._opened = opened
        self._cursors: list[_Cursor] = []

    def read(self, start: int) -> Iterator[Batch]:
        """Yields the batches from the number `start` on."""
        for number in itertools.count(start):
            if (batch := self._at(number)) is None:
                return
            yield batch

    def _at(self, number: int) -> Batch | None:
        for cursor in self._cursors:
            if cursor.number == number - 1:
                cursor.advance()
            if cursor.number == number:
                return cursor.batch
        self._cursors = [cursor for cursor in self._cursors if cursor.batch is not None]
        self._cursors.append(_Cursor(number, self._opened(number)))
        return self._cursors[-1].batch


class _Cursor:
    """A stream at the batch `number`; `batch` is None behind the last one."""

    def __init__(self, number: int, stream: Iterator[Batch]):
        self._stream, self.number = iter(stream), number
        self.batch: Batch | None = next(self._stream, None)

    def advance(self) -> None:
        self.number, self.batch = self.number + 1, next(self._stream, None)


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
        return self._data[key]

    def put(self, number: int, state: TrainState, runner: JitRunner) -> None:
        """Takes the state of a lane; all lanes have states of the same shapes.

        Raises:
          TooManyRuns: the device has not enough memory for all lanes.
        """
        try:
            if self._states is None:
                self._mesh, shapes = runner.mesh, jax.eval_shape(lambda: state)
                self._states = jax.jit(
                    lambda: jax.tree.map(lambda x: jnp.zeros((self.width, *x.shape), x.dtype), shapes),
                    out_shardings=meshes.replicated(runner.mesh),
                )()
            self._states = _put(self._states, state, number)
        except jax.errors.JaxRuntimeError as error:
            raise self._explained(error) from error

    def get(self, number: int) -> TrainState:
        """A copy of the state of a lane."""
        return _get(self._states, number)

    def run(self, lanes: Sequence[Steps], ended: Callable[[int, Any], object]) -> None:
        """Makes the runs.

        Args:
          lanes: a generator for each of the group's lanes, in their order; what one raises ends all.
          ended: is given the number of a lane and its result, as soon as it has one.
        """
        requests: dict[int, Any] = {}

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

    def _answers(self, requests: Mapping[int, Any]) -> dict[int, tuple[str, Any]]:
        """The method of each lane's generator to be called, with its argument; of some lanes only where the others have to
        wait for them."""
        evaluating = {number: each for number, each in requests.items() if isinstance(each, EvaluationRequest)}
        pausing = {number: each for number, each in requests.items() if isinstance(each, Pause)}
        if pausing:
            return {number: ("send", each.answer()) for number, each in pausing.items()}
        kinds = collections.defaultdict(list)
        chosen: Mapping[int, Any] = evaluating or requests
        for number, request in chosen.items():
            shapes = tuple((name, np.shape(x)) for name, x in sorted(request.batch.items()))
            program = request.function if evaluating else request.runner.own.step_of_many
            kinds[program, shapes].append(number)
        # Of lanes at different steps one may have to log: what the others do not ask for costs less than a second pass.
        panel = not evaluating and any(request.panel for request in requests.values())
        answers: dict[int, tuple[str, Any]] = {}
        for numbers in kinds.values():
            asked = {number: requests[number] for number in numbers}
            try:
                made = self._evaluated(asked) if evaluating else self._step(asked, panel, masked=len(kinds) > 1)
            except Exception as error:
                failure = self._explained(error)
                return {number: ("throw", failure) for number in requests}
            answers |= {number: ("send", answer) for number, answer in made.items()}
        return answers

    def _step(self, asked: Mapping[int, StepRequest], panel: bool, *, masked: bool) -> dict[int, Any]:
        """Makes a step of lanes whose program and shapes of batches are the same."""
        program = next(iter(asked.values())).runner.own.step_of_many
        batch, index = self._batches(asked)
        active = np.isin(np.arange(self.width), list(asked)) if masked else None
        inputs = self._placed((program, *asked), lambda: self._inputs(asked))
        with meshes.activations_placed(self._mesh):
            self._states, output = program(self._states, batch, index, active, panel, inputs)
        results = _Results(output.scalars), _Results(output.panel)
        return {number: (None, LaneOutput(*results, number)) for number in asked}

    def _evaluated(self, asked: Mapping[int, EvaluationRequest]) -> dict[int, Any]:
        """Makes a step of an evaluation of lanes whose shapes of batches are the same."""
        first = next(iter(asked.values()))
        batch, index = self._batches(asked)
        if (key := ("of many", first.function)) not in first.compiled:
            first.compiled[key] = jax.jit(_of_many(first.function), out_shardings=meshes.replicated(self._mesh))
        with meshes.activations_placed(self._mesh):
            results = _Results(first.compiled[key](evaluation_variables(self._states), batch, index))
        return {number: LaneResults(results, number) for number in asked}

    def _batches(self, asked: Mapping[int, Any]) -> tuple[dict[str, Any], Any]:
        """The batches of the lanes, each once, and the number of that of every place; where all have the same one, this and
        None."""
        batches = list({id(request.batch): request.batch for request in asked.values()}.values())
        self._streams = max(self._streams, len(batches))
        if self._streams == 1:
            return dict(batches[0]), None
        place = {id(each): i for i, each in enumerate(batches)}
        chosen = [place[id(asked[number].batch)] if number in asked else 0 for number in range(self.width)]
        padded = batches + batches[:1] * (self._streams - len(batches))
        stacked = {name: np.stack([each[name] for each in padded]) for name in batches[0]}
        return stacked, self._placed(("index", *chosen), lambda: np.asarray(chosen, np.int32))

    def _inputs(self, asked: Mapping[int, StepRequest]) -> Any:
        """The runners' inputs, stacked; unused places have those of the first lane."""
        first = next(iter(asked.values()))
        every = [asked.get(number, first).runner.own.inputs for number in range(self.width)]
        return jax.tree.map(lambda *each: np.asarray(each, np.float32), *every)

    def _placed(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._on_device:
            self._on_device[key] = jax.device_put(make(), meshes.replicated(self._mesh))
        return self._on_device[key]

    def _explained(self, error: Exception) -> Exception:
        if "RESOURCE_EXHAUSTED" not in str(error):
            return error
        failure = TooManyRuns(
            f"--vectorize: the device has not enough memory for {self.width} runs at a time ({one_line(error)[:200]}); "
            "make fewer"
        )
        failure.__cause__ = error
        return failure


def _of_many(step: Callable[..., Any]) -> Callable[..., Any]:
    """An evaluation's step for variables of several runs; batches and index as in `JitRunner.step_of_many`."""

    def step_of_many(variables, batches, index):
        if index is not None:
            batches = jax.tree.map(lambda x: x[index], batches)
        return jax.vmap(step, in_axes=(0, None if index is None else 0))(variables, batches)

    return step_of_many


@functools.partial(jax.jit, donate_argnums=0)
def _put(states: Any, state: Any, number: int) -> Any:
    return jax.tree.map(lambda all_of_them, x: all_of_them.at[number].set(x), states, state)


@jax.jit
def _get(states: Any, number: int) -> Any:
    return jax.tree.map(lambda x: x[number], states)
