"""A configuration made into things that run: task, optimizer, step, state."""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
import optax
from jax.sharding import Mesh

from sigmarep import tasks
from sigmarep.data.pipeline import check_batch_size
from sigmarep.errors import BadInput
from sigmarep.nn.layers import Layers
from sigmarep.nn.qk_clip import clipped_layers
from sigmarep.tasks.protocol import TaskData, TaskModel
from sigmarep.training import durations, parallel
from sigmarep.training.config import validate
from sigmarep.training.evaluation import Evaluator
from sigmarep.training.optimizers import create_optimizer
from sigmarep.training.schedules import create_schedule
from sigmarep.training.sharpness import Sharpness
from sigmarep.training.step import TrainState, create_state, make_train_step

# Size that the training split is taken to have where no data are read. Of the program only the constants of a schedule
# given in epochs depend on it.
UNKNOWN_EXAMPLES = 1_000_000


LEVEL_FLAG = "xla_backend_optimization_level"


@dataclasses.dataclass(frozen=True)
class Program:
    """All that a validated configuration makes but its data: enough to compile the training step, not to run it.

    Attributes:
      task: the model side.
      total_steps: updates of the whole run.
      intervals: steps between logs, evaluations and checkpoints, and of sharpness, 0 for never.
      intervention_step: the last step before `config.intervention`, None for none.
      warmup_steps: of the learning rate.
      schedule: the learning rate.
      layers: of the model.
      abstract_state: shapes, types and shardings of the state, in the mesh's layout.
      create_state: makes the state before the first step, in that layout.
    """

    config: ml_collections.FrozenConfigDict
    task: TaskModel
    total_steps: int
    intervals: dict[str, int]
    intervention_step: int | None
    warmup_steps: int
    schedule: optax.Schedule
    layers: Layers
    runner: parallel.Runner
    abstract_state: TrainState
    create_state: Callable[[], TrainState]

    def due(self, event: str, step: int) -> bool:
        """True if `event` ("log", "eval", "checkpoint" or "sharpness") happens after `step`; all do after the last, but
        for sharpness where no interval of its own is set."""
        interval = self.intervals[event]
        return bool(interval) and (step % interval == 0 or step == self.total_steps)


@dataclasses.dataclass(frozen=True)
class Experiment(Program):
    """A program with its data."""

    data: TaskData

    def evaluator(self) -> Evaluator:
        """The evaluator of its splits.

        Raises:
          BadInput: one cannot be evaluated.
        """
        return Evaluator(self.runner.mesh, self.data.evaluations(self.task))

    def sharpness(self) -> Sharpness:
        """Measures the sharpness of its training loss."""
        return Sharpness(
            self.config, self.task, self.data, layers=self.layers, schedule=self.schedule, mesh=self.runner.mesh
        )

    def intervened(self) -> "Experiment":
        """The experiment as it goes on after `config.intervention`; the state and the data stay what they are."""
        config = ml_collections.ConfigDict(self.config.to_dict())
        config.model.attention_temperature *= config.intervention.attention_temperature
        config.optimizer.learning_rate *= config.intervention.learning_rate_factor
        return _experiment(validate(config), self.data)


def build(config: ml_collections.FrozenConfigDict, *, devices: Sequence[Any] | None = None) -> Experiment:
    """The experiment of a validated configuration. Opens its data; compiles and writes nothing.

    Args:
      devices: those of all processes if None.

    Raises:
      BadInput: a field is impossible, alone or with the data or the devices.
    """
    return _experiment(config, tasks.get(config.task).open_data(config), devices)


def build_program(config: ml_collections.FrozenConfigDict, *, devices: Sequence[Any] | None = None) -> Program:
    """The program of a validated configuration, without reading any data: sizes are those that the configuration asks for.

    Args:
      devices: those of all processes if None.

    Raises:
      BadInput: a field is impossible, alone or with the devices.
    """
    model = tasks.get(config.task).create_model(config, tasks.planned_files(config))
    return Program(**_parts(config, model, UNKNOWN_EXAMPLES, devices))


def _experiment(config, data: TaskData, devices=None) -> Experiment:
    # Before the model: what is wrong with the training split shows first.
    num_examples = data.num_train_examples
    check_batch_size(config.batch_size, num_examples)
    model = tasks.get(config.task).create_model(config, data.files())
    return Experiment(**_parts(config, model, num_examples, devices), data=data)


def _parts(
    config: ml_collections.FrozenConfigDict, task: TaskModel, num_examples: int, devices: Sequence[Any] | None
) -> dict[str, Any]:
    """The fields of a Program."""
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
    optimizer = create_optimizer(config.optimizer, schedule=schedule, params=layers.variables["params"], layers=layers)
    create = functools.partial(create_state, layers.initialize, optimizer, seed=config.seed, ema=config.ema_decay > 0)
    make_step = functools.partial(
        make_train_step,
        task,
        optimizer,
        schedule,
        layers=layers,
        accumulation=config.accumulation,
        ema_decay=config.ema_decay,
        qk_clip=config.optimizer.qk_clip,
    )
    abstract_state = jax.eval_shape(create)
    runner = parallel.create_runner(config, make_step, abstract_state, layers, task.batch_rows(), devices=devices)
    return dict(
        config=config,
        task=task,
        total_steps=total,
        intervals=intervals,
        intervention_step=intervention,
        warmup_steps=warmup,
        schedule=schedule,
        layers=layers,
        runner=runner,
        abstract_state=jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            abstract_state,
            runner.shardings,
        ),
        create_state=jax.jit(create, out_shardings=runner.shardings, compiler_options=_compiled_fast(runner.mesh)),
    )


def _compiled_fast(mesh: Mesh) -> dict[str, Any]:
    """Options for a program that runs once: on CPUs half of the default's compilation is optimization, for the same
    numbers. Nothing where the environment has a level of its own."""
    cpu = mesh.devices.flat[0].platform == "cpu"
    return {LEVEL_FLAG: 1} if cpu and LEVEL_FLAG not in os.environ.get("XLA_FLAGS", "") else {}
