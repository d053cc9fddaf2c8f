"""The fields of a configuration: the defaults every task shares, and the checks made before a run starts.

A configuration file builds on `default_config(task)`, which is locked: a misspelled key is refused where it is
written. `validate` repeats the comparison for configurations made in any other way.
"""

import textwrap
from collections.abc import Mapping
from typing import Any, TypeVar

import ml_collections

from sigmarep import configuration, fields, tasks
from sigmarep.errors import BadInput
from sigmarep.fields import duration, field

# Sections that take any field: the arguments of somebody else's optimizer or schedule.
FREE = ("optimizer.arguments", "optimizer.schedule_arguments")

T = TypeVar("T")

# The words of these fields are read by the loop itself; the sections of optimizer, schedule, mesh, sharpness and writers
# stand in the modules that read them.
FIELDS: dict[str, Any] = {
    "task": field("", "Task: one of sigmarep.tasks.TASKS, or the dotted Python name of one."),
    "seed": field(
        0, "Seed of parameters, dropout, and the order and augmentation of the data.", at_least=0, at_most=2**32 - 1
    ),
    "batch_size": field(
        128,
        "Size of a step's global batch: examples, tokens or seconds, as the task says.",
        at_least=1,
        at_most=2**24,
    ),
    "accumulation": field(
        1, "Microbatches a step's batch is cut into; their gradients are averaged, with one power step.", at_least=1
    ),
    "total": duration(None, "Length of the run."),
    "log_every": duration(50, "Interval of the logs of loss and attention entropy."),
    "eval_every": duration(None, "Interval of evaluations; after the last step alone if not set."),
    "checkpoint_every": duration(None, "Interval of checkpoints; after the last step alone if not set."),
    "keep_checkpoints": field(
        2,
        "Newest checkpoints kept, besides the last that a later step showed to be good; 0: none is made, but where SIGTERM "
        "stops the run.",
        at_least=0,
    ),
    "compute_dtype": field("float32", "Type of activations; parameters stay float32.", choices=("float32", "bfloat16")),
    "ema_decay": field(
        0.0, "Decay per step of averaged weights, which evaluation then uses; 0 keeps no average.", at_least=0, below=1
    ),
    "divergence_factor": field(
        3.0,
        "Ends the run as diverged when the logged loss exceeds this multiple of the first one; 0: only if not finite.",
        at_least=0,
    ),
    "intervention": {
        "at": duration(None, "Time at which the run changes as the fields below say."),
        "attention_temperature": field(1.0, "Factor on the temperature of attention.", above=0),
        "learning_rate_factor": field(1.0, "Factor on the learning rate.", at_least=0),
    },
    "parallel": field(
        "jit", "jit: arrays sharded over the mesh; pmap: a copy on each device.", choices=("jit", "pmap")
    ),
    "callbacks": field((), "Callbacks of the loop (sigmarep.training.callbacks).", dotted=True),
}


def sections(task: str) -> dict[str, Any]:
    """All fields of a task's configurations: the trainer's and the task's own.

    A task declares its fields in a dictionary `FIELDS`. Of one that has only the function `default_config`, the types of
    the values are known and nothing else.

    Raises:
      BadInput: there is no such task.
    """
    # Imported here: they take the seconds that JAX takes to start.
    from sigmarep.training import init_from, mesh, metrics, optimizers, schedules, sharpness

    own = tasks.get(task)
    declared = getattr(own, "FIELDS", None)
    return {
        **fields.with_defaults(FIELDS, task=task),
        "init_from": init_from.FIELDS,
        "sharpness": sharpness.FIELDS,
        "mesh": mesh.FIELDS,
        "optimizer": {**schedules.FIELDS, **optimizers.FIELDS},
        "writers": metrics.FIELDS,
        **(fields.inferred(own.default_config()) if declared is None else declared),
    }


def default_config(task: str) -> ml_collections.ConfigDict:
    """The locked default configuration of a task: the trainer's fields and the task's own.

    Raises:
      BadInput: there is no such task.
    """
    declared = sections(task)
    return configuration.locked(configuration.make(declared), declared)


def arguments(text: str | None, **defaults: Any) -> dict[str, Any]:
    """Reads the `name=value,name=value` behind the colon of `--config file.py:…`, with the types of the defaults.

    Raises:
      BadInput: an unknown name or a value of another type.
    """
    values = dict(defaults)
    for item in filter(None, (text or "").split(",")):
        name, separator, value = item.partition("=")
        if name not in defaults or not separator:
            accepted = ", ".join(f"{key}={default}" for key, default in defaults.items())
            raise BadInput(f"config argument {item!r}: expected name=value with one of {accepted}")
        kind = type(defaults[name])
        try:
            values[name] = {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
        except (KeyError, ValueError):
            raise BadInput(f"config argument {item!r}: expected a value of type {kind.__name__}") from None
    return values


def choice(name: str, value: Any, accepted: Mapping[Any, T]) -> T:
    """The entry of `accepted` for the value of the argument `name`.

    Raises:
      BadInput: it has nothing.
    """
    if value not in accepted:
        raise BadInput(f"config argument {name} = {value!r}: expected one of {', '.join(map(str, accepted))}")
    return accepted[value]


def describe(config: ml_collections.ConfigDict, *, width: int = 100) -> str:
    """Every field of a configuration: name and value, and below them its meaning and the accepted values.

    Args:
      width: columns of a line of text.
    """
    lines = []
    for row in configuration.describe(config, sections(config.task)):
        text = f"{row.doc} Accepts {row.accepted}." if row.doc else f"Accepts {row.accepted}."
        indented = textwrap.fill(text, width, initial_indent="    ", subsequent_indent="    ")
        lines += [f"{row.name} = {row.value!r}", indented]
    return "\n".join(lines)


def validate(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """A frozen copy of `config`, checked against the fields of its task.

    Raises:
      BadInput: an unknown or missing field, or a value that is not accepted; the message names the field, the value and
        the remedy.
    """
    # Imported here as in `sections`.
    from sigmarep.training import mesh

    task = config.get("task", "")
    remedy = f"start from sigmarep.training.config.default_config({task!r})"
    configuration.check(config, sections(task), remedy=remedy)
    if config.optimizer.non_matrix_learning_rate and not config.optimizer.learning_rate:
        raise BadInput(
            "config.optimizer.learning_rate = 0.0: expected a number above 0 beside non_matrix_learning_rate"
        )
    mesh.read_rules(config.mesh.rules)
    return ml_collections.FrozenConfigDict(ml_collections.ConfigDict(config))
