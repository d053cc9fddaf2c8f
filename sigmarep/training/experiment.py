"""A configuration made into things that run: task, optimizer, step, state."""

import collections
import dataclasses
import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import jax
import ml_collections
import numpy as np
import optax
from jax.sharding import Mesh

from sigmarep import doors, tasks
from sigmarep.data.pipeline import check_batch_size
from sigmarep.errors import BadInput
from sigmarep.nn.layers import Layers
from sigmarep.nn.qk_clip import clipped_layers
from sigmarep.tasks.protocol import TaskData, TaskModel, Variables
from sigmarep.training import durations, parallel
from sigmarep.training.config import validate
from sigmarep.training.evaluation import Evaluator
from sigmarep.training.optimizers import Rates, create_optimizer, read_rates, without_rates
from sigmarep.training.schedules import create_schedule
from sigmarep.training.sharpness import Sharpness, make_tridiagonals
from sigmarep.training.step import TrainState, create_state, make_train_step
from sigmarep.weights.load import begin

# Size that the training split is taken to have where no data are read. Of the program only the constants of a schedule
# given in epochs depend on it.
UNKNOWN_EXAMPLES = 1_000_000


LEVEL_FLAG = "xla_backend_optimization_level"


@dataclasses.dataclass(frozen=True)
class Program:
    """All that a validated configuration makes but its data: enough to compile the training step, not to run it.

    The seed and `Rates` are inputs of what is compiled: `bound` gives the program to another run.

    Attributes:
      task: the model side.
      total_steps: updates of the whole run.
      intervals: steps between logs, evaluations and checkpoints, and of sharpness, 0 for never.
      intervention_step: the last step before `config.intervention`, None for none.
      warmup_steps: of the learning rate.
      schedule: the learning rate.
      rates: numbers that the step takes as inputs; the runner hands them over.
      layers: of the model.
      abstract_state: shapes, types and shardings of the state, in the mesh's layout.
      initialize: compiled; makes the state before the first step from the seed and the rates, in that layout; given loaded
        parameters too, it begins from these.
      tridiagonals: compiled, of `Sharpness`.
      evaluation_steps: compiled, by the function.
    """

    config: ml_collections.FrozenConfigDict
    task: TaskModel
    total_steps: int
    intervals: dict[str, int]
    intervention_step: int | None
    warmup_steps: int
    schedule: optax.Schedule
    rates: Rates
    layers: Layers
    runner: parallel.Runner
    abstract_state: TrainState
    initialize: Callable[..., TrainState]
    tridiagonals: Callable[..., Any]
    evaluation_steps: dict[Any, Callable[..., Any]]

    def create_state(self, loaded: Mapping[str, jax.Array] | None = None) -> TrainState:
        """The state before the first step, in the mesh's layout; with loaded parameters by path, `init_from.Start.params`,
        in place."""
        return self.initialize(np.uint32(self.config.seed), jax.tree.map(np.float32, self.rates), loaded)

    def bound(self, config: ml_collections.FrozenConfigDict) -> Self:
        """The same program for a configuration of the same `program_key`."""
        rates = read_rates(config.optimizer)
        return dataclasses.replace(
            self,
            config=config,
            rates=rates,
            schedule=create_schedule(config.optimizer, total_steps=self.total_steps, warmup_steps=self.warmup_steps),
            runner=self.runner.with_inputs(rates),
        )

    def due(self, event: str, step: int) -> bool:
        """True if `event` ("log", "eval", "checkpoint" or "sharpness") happens after `step`; all that have an interval do
        after the last."""
        interval = self.intervals[event]
        return bool(interval) and (step % interval == 0 or step == self.total_steps)


def program_key(config: Mapping[str, Any]) -> str:
    """A text that is the same for configurations whose programs are the same, given the same data."""
    values = json.loads(json.dumps(dict(config), default=repr))
    for name in ("seed", "init_from"):
        values.pop(name, None)
    values["optimizer"] = without_rates(values["optimizer"])
    values["intervention"].pop("learning_rate_factor")
    return json.dumps(values, sort_keys=True)


class Programs:
    """The last programs that were made in this process, for runs that can use them again.

    Args:
      most: number of programs kept. A run with an intervention has two.
    """

    def __init__(self, most: int = 2):
        self._most = most
        self._made: collections.OrderedDict[Any, Program] = collections.OrderedDict()

    def get(self, key: Any, make: Callable[[], Program]) -> Program:
        """The program of `key`, made if it is not kept."""
        program = self._made.pop(key, None) or make()
        self._made[key] = program
        while len(self._made) > self._most:
            self._made.popitem(last=False)
        return program


# Of all runs of this process that are not given others: a second run of a notebook compiles nothing.
SHARED = Programs()


def shared_programs(config: Mapping[str, Any]) -> Programs:
    """`SHARED`; new ones for a configuration that names objects of the user's, which may be others at the next run."""
    words = jax.tree.leaves({name: value for name, value in config.items() if name not in ("callbacks", "writers")})
    return Programs() if any(isinstance(word, str) and doors.is_dotted(word) for word in words) else SHARED


@dataclasses.dataclass(frozen=True)
class Experiment(Program):
    """A program with its data.

    Attributes:
      programs: those that it shares with other experiments.
    """

    data: TaskData
    programs: Programs

    def evaluator(self) -> Evaluator:
        """The evaluator of its splits.

        Raises:
          BadInput: one cannot be evaluated.
        """
        return Evaluator(self.runner.mesh, self.data.evaluations(self.task), self.evaluation_steps)

    def sharpness(self) -> Sharpness:
        """Measures the sharpness of its training loss."""
        return Sharpness(
            self.tridiagonals, self.config, self.data, schedule=self.schedule, rates=self.rates, mesh=self.runner.mesh
        )

    def intervened(self) -> "Experiment":
        """The experiment as it goes on after `config.intervention`; the state and the data stay what they are."""
        config = ml_collections.ConfigDict(self.config.to_dict())
        config.model.attention_temperature *= config.intervention.attention_temperature
        config.optimizer.learning_rate *= config.intervention.learning_rate_factor
        return _experiment(validate(config), self.data, self.programs)


def build(
    config: ml_collections.FrozenConfigDict,
    *,
    devices: Sequence[Any] | None = None,
    programs: Programs | None = None,
    data: TaskData | None = None,
) -> Experiment:
    """The experiment of a validated configuration. Opens its data; compiles and writes nothing.

    Args:
      data: its data side, if that is open already.
      devices: those of all processes if None.
      programs: to take the program from, if one of the same `program_key` and data is among them; by default
        `shared_programs`.

    Raises:
      BadInput: a field is impossible, alone or with the data or the devices.
    """
    programs = programs or shared_programs(config.to_dict())
    data = tasks.get(config.task).open_data(config) if data is None else data
    return _experiment(config, data, programs, devices)


def build_program(config: ml_collections.FrozenConfigDict, *, devices: Sequence[Any] | None = None) -> Program:
    """The program of a validated configuration, without reading any data: sizes are those that the configuration asks for.

    Args:
      devices: those of all processes if None.

    Raises:
      BadInput: a field is impossible, alone or with the devices.
    """
    model = tasks.get(config.task).create_model(config, tasks.planned_files(config))
    return _program(config, model, UNKNOWN_EXAMPLES, devices)


def _experiment(config, data: TaskData, programs: Programs, devices=None) -> Experiment:
    # Before the model: what is wrong with the training split shows first.
    num_examples = data.num_train_examples
    check_batch_size(config.batch_size, num_examples)
    files = data.files()

    def make() -> Program:
        return _program(config, tasks.get(config.task).create_model(config, files), num_examples, devices)

    key = (program_key(config.to_dict()), num_examples, tuple(sorted(files.items())), tuple(devices or jax.devices()))
    program = programs.get(key, make).bound(config)
    own = {field.name: getattr(program, field.name) for field in dataclasses.fields(program)}
    return Experiment(**own, data=data, programs=programs)


def _program(
    config: ml_collections.FrozenConfigDict, task: TaskModel, num_examples: int, devices: Sequence[Any] | None
) -> Program:
    if config.accumulation > 1 and not task.microbatches:
        raise BadInput(
            f"config.accumulation = {config.accumulation}: the loss of {config.task} compares all examples of a batch, and "
            "microbatches would not see each other; set it to 1"
        )
    to_steps = functools.partial(durations.steps, batch_size=config.batch_size, num_examples=num_examples)
    total = to_steps(config, "total")
    if not total:
        raise BadInput(
            "config.total_steps, total_epochs, total_examples: none is set; set one, for example total_epochs"
        )
    intervals = {event: to_steps(config, f"{event}_every") or total for event in ("log", "eval", "checkpoint")}
    if not config.keep_checkpoints:
        intervals["checkpoint"] = 0
    intervals["sharpness"] = to_steps(config.sharpness, "every", prefix="config.sharpness.") or 0
    if intervals["sharpness"] and config.parallel != "jit":
        raise BadInput(f"config.sharpness.every_steps: needs config.parallel = 'jit', not {config.parallel!r}")
    intervention = to_steps(config.intervention, "at", prefix="config.intervention.")
    if config.optimizer.qk_clip and (config.model.reparam != "none" or config.model.qk_norm != "none"):
        raise BadInput(
            f"config.optimizer.qk_clip = {config.optimizer.qk_clip}: needs config.model.reparam = 'none' and "
            "config.model.qk_norm = 'none', whose logits do not follow the size of the kernels"
        )
    warmup = to_steps(config.optimizer, "warmup", prefix="config.optimizer.") or 0
    schedule = create_schedule(config.optimizer, total_steps=total, warmup_steps=warmup)

    layers = tasks.describe_layers(task)
    if config.optimizer.qk_clip and not clipped_layers(layers):
        raise BadInput(
            f"config.optimizer.qk_clip = {config.optimizer.qk_clip}: no layer of the model says that it makes queries or "
            "keys (`makes`, see sigmarep.nn.linear.ReparametrizedLayer)"
        )
    rates = read_rates(config.optimizer)

    def optimizer_of(rates: Rates) -> tuple[optax.GradientTransformation, optax.Schedule]:
        scheduled = create_schedule(config.optimizer, total_steps=total, warmup_steps=warmup, peak=rates.learning_rate)
        params = layers.variables["params"]
        made = create_optimizer(config.optimizer, schedule=scheduled, params=params, layers=layers, rates=rates)
        return made, scheduled

    def create(seed, rates, loaded=None):
        init = layers.initialize if loaded is None else functools.partial(_begun, task, layers, loaded)
        return create_state(init, optimizer_of(rates)[0], seed=seed, ema=config.ema_decay > 0)

    def make_step(*, axis_name, placed=None):
        def step(state, batch, panel, rates):
            own = make_train_step(
                task,
                *optimizer_of(rates),
                layers=layers,
                accumulation=config.accumulation,
                ema_decay=config.ema_decay,
                qk_clip=config.optimizer.qk_clip,
                total_steps=total,
                axis_name=axis_name,
                placed=placed,
            )
            return own(state, batch, panel)

        return step

    abstract_state = jax.eval_shape(create, np.uint32(config.seed), jax.tree.map(np.float32, rates))
    runner = parallel.create_runner(config, make_step, abstract_state, layers, task.batch_rows(), devices=devices)
    return Program(
        config=config,
        task=task,
        total_steps=total,
        intervals=intervals,
        intervention_step=intervention,
        warmup_steps=warmup,
        schedule=schedule,
        rates=rates,
        layers=layers,
        runner=runner.with_inputs(rates),
        abstract_state=jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            abstract_state,
            runner.shardings,
        ),
        initialize=jax.jit(create, out_shardings=runner.shardings, compiler_options=_compiled_fast(runner.mesh)),
        tridiagonals=make_tridiagonals(config, task, layers),
        evaluation_steps={},
    )


def _begun(task: TaskModel, layers: Layers, loaded: Mapping[str, jax.Array], rng: jax.Array) -> Variables:
    """Initial variables with loaded parameters in place."""
    variables = begin(layers.initialize(rng), loaded, layers)
    follow = getattr(task, "follow_parameters", None)
    return variables if follow is None else follow(variables)


def _compiled_fast(mesh: Mesh) -> dict[str, Any]:
    """Options for a program that runs once, whose compilation is otherwise mostly optimization.

    On CPUs the numbers stay the same. On TPUs kernels are drawn into the processor's own memory otherwise, by programs that
    take ten seconds to compile for each. Nothing on CPUs where the environment has a level of its own.
    """
    platform = mesh.devices.flat[0].platform
    if platform == "cpu":
        return {} if LEVEL_FLAG in os.environ.get("XLA_FLAGS", "") else {LEVEL_FLAG: 1}
    return {"exec_time_optimization_effort": -1.0} if platform == "tpu" else {}
