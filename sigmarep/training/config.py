"""What a configuration may contain: the defaults every task shares, and the checks made before a run starts.

A configuration file builds on `default_config(task)`, which is locked: a misspelled key is refused where it is
written. `validate` repeats the comparison for configurations made in any other way.
"""

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import ml_collections
from ml_collections import config_dict

from sigmarep import doors, tasks
from sigmarep.errors import BadInput

T = TypeVar("T")

UNITS = ("steps", "epochs", "examples")

CHOICES = {
    "parallel": ("jit", "pmap"),
    "compute_dtype": ("float32", "bfloat16"),
    "writers.progress": ("auto", "plain", "off"),
    "optimizer.name": ("adamw", "adam", "sgd", "lars", "lamb", "adagrad", "lion", "muon"),
    "optimizer.schedule": ("constant", "cosine", "step", "rsqrt", "linear"),
}

# The words that these fields take besides.
OPEN = {
    "optimizer.name": ", an optimizer of optax such as adafactor, or a dotted Python name",
    "optimizer.schedule": ", a schedule of optax such as sgdr_schedule, or a dotted Python name",
}


def _at_least(least: float) -> tuple[Callable[[float], bool], str]:
    return lambda value: math.isfinite(value) and value >= least, f"a finite number of at least {least:g}"


def _above(least: float) -> tuple[Callable[[float], bool], str]:
    return lambda value: math.isfinite(value) and value > least, f"a finite number above {least:g}"


def _rate() -> tuple[Callable[[float], bool], str]:
    return lambda value: 0 <= value < 1, "a number from 0 to below 1"


RANGES = {
    "batch_size": _at_least(1),
    "accumulation": _at_least(1),
    "keep_checkpoints": _at_least(1),
    "ema_decay": _rate(),
    "divergence_factor": _at_least(0),
    "sharpness.iterations": _at_least(1),
    "intervention.attention_temperature": _above(0),
    "intervention.learning_rate_factor": _at_least(0),
    "optimizer.learning_rate": _at_least(0),
    "optimizer.weight_decay": _at_least(0),
    "optimizer.clip_norm": _at_least(0),
    "optimizer.gain_factor": _at_least(0),
    "optimizer.other_learning_rate": _at_least(0),
    "optimizer.spectral_bound": _at_least(0),
    "optimizer.qk_clip": _at_least(0),
    "optimizer.momentum": _rate(),
    "optimizer.beta1": _rate(),
    "optimizer.beta2": _rate(),
    "optimizer.epsilon": _at_least(0),
}
# Sections that take any field: those of an optimizer or a schedule that this project does not know.
FREE = ("optimizer.arguments", "optimizer.schedule_arguments")
# Fields that may be None beside the durations.
OPTIONAL = ("data_dir",)


def duration(config: ml_collections.ConfigDict, name: str, value: float | None = None, unit: str = "steps"):
    """Adds `<name>_steps`, `<name>_epochs` and `<name>_examples` to `config`; at most one may be set at a time."""
    for each in UNITS:
        config[f"{name}_{each}"] = config_dict.placeholder(float)
    if value is not None:
        config[f"{name}_{unit}"] = value


def trainer_defaults() -> ml_collections.ConfigDict:
    """The fields of every task: the training loop, the optimizer, the devices."""
    config = ml_collections.ConfigDict()
    config.task = ""
    config.seed = 0
    config.batch_size = 128
    # A step's batch is cut into this many microbatches whose gradients are averaged; still one power step a step.
    config.accumulation = 1
    duration(config, "total")
    duration(config, "log_every", 50)
    duration(config, "eval_every")
    duration(config, "checkpoint_every")
    config.keep_checkpoints = 2
    config.compute_dtype = "float32"
    # 0 keeps no average; otherwise evaluation uses weights averaged with this decay a step.
    config.ema_decay = 0.0
    # The run ends as diverged when the logged loss exceeds this multiple of the first one; 0 looks at non-finite only.
    config.divergence_factor = 3.0

    # Adds the largest eigenvalues of the Hessian to the metrics; see sigmarep.training.sharpness.
    config.sharpness = ml_collections.ConfigDict()
    duration(config.sharpness, "every")
    config.sharpness.iterations = 10

    # What a run changes in itself after so many steps, to see what follows.
    config.intervention = ml_collections.ConfigDict()
    duration(config.intervention, "at")
    config.intervention.attention_temperature = 1.0
    config.intervention.learning_rate_factor = 1.0

    config.parallel = "jit"
    config.mesh = ml_collections.ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})

    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.name = "adamw"
    # Of an optimizer of optax, or of one's own, by the names it gives them; see sigmarep.training.external.
    config.optimizer.arguments = ml_collections.ConfigDict()
    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.schedule_arguments = ml_collections.ConfigDict()
    duration(config.optimizer, "warmup")
    # The learning rate's last value as a fraction of its peak (cosine, linear).
    config.optimizer.end_factor = 0.0
    # Fractions of the run at which the step schedule multiplies the learning rate by step_factor.
    config.optimizer.step_at = (0.6, 0.9)
    config.optimizer.step_factor = 0.1
    config.optimizer.weight_decay = 0.0
    # Regular expressions over parameter paths left out of weight decay and of LARS/LAMB trust ratios.
    config.optimizer.no_decay = ("gamma$", "bias$", "scale$", "alpha$", "shift$", "position", "class_token")
    # Multiplies the learning rate of the parameters that the expressions find: γ, biases, scales and offsets of norms.
    config.optimizer.gains = ("gamma$", "bias$", "scale$", "alpha$", "shift$")
    config.optimizer.gain_factor = 1.0
    # Of all but the blocks' matrices, with the same schedule; 0: learning_rate.
    config.optimizer.other_learning_rate = 0.0
    # Multiplies the gradient in a reparametrised kernel by the kernel's norm, before momentum and second moments.
    config.optimizer.relative_gradients = False
    config.optimizer.clip_norm = 0.0
    config.optimizer.momentum = 0.9
    config.optimizer.nesterov = False
    config.optimizer.beta1 = 0.9
    config.optimizer.beta2 = 0.999
    config.optimizer.epsilon = 1e-8
    config.optimizer.trust_coefficient = 0.001
    # Bounds the spectral norm of every update of a block's matrix by this multiple of the matrix's own (AdamW²); 0: off.
    config.optimizer.spectral_bound = 0.0
    # Shrinks the queries' and keys' kernels of heads whose largest logit of a step is above it (QK-clip); 0: off.
    config.optimizer.qk_clip = 0.0

    config.writers = ml_collections.ConfigDict()
    config.writers.tensorboard = False
    config.writers.wandb_project = ""
    # Dotted Python names of writers of one's own; see sigmarep.training.metrics.Writer.
    config.writers.extra = ()
    # "auto": a live line on a terminal, plain lines elsewhere; "plain"; "off".
    config.writers.progress = "auto"
    # Dotted Python names of what watches the run and may end it early; see sigmarep.training.callbacks.
    config.callbacks = ()
    return config


def default_config(task: str) -> ml_collections.ConfigDict:
    """The locked default configuration of a task: the trainer's fields and the task's own.

    Raises:
      BadInput: there is no such task.
    """
    config = trainer_defaults()
    config.task = task
    for name, value in tasks.get(task).default_config().items():
        config[name] = value
    return locked(config)


def locked(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Locks `config` except for its sections `FREE`."""
    config.lock()
    for section in FREE:
        block, _, name = section.partition(".")
        if name in config.get(block, {}):
            config[block][name].unlock()
    return config


def flatten(config: ml_collections.ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Dotted names to leaf values."""
    leaves: dict[str, Any] = {}
    for key in config:
        value = config[key]
        if isinstance(value, ml_collections.ConfigDict):
            leaves.update(flatten(value, f"{prefix}{key}."))
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


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
    """What `accepted` has for the value of the argument `name`.

    Raises:
      BadInput: it has nothing.
    """
    if value not in accepted:
        raise BadInput(f"config argument {name} = {value!r}: expected one of {', '.join(map(str, accepted))}")
    return accepted[value]


def validate(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """A frozen copy of `config`, checked against the defaults of its task.

    Raises:
      BadInput: an unknown or missing field, a value of another type or outside what is accepted; the message names
        the field, the value and the remedy.
    """
    task = config.get("task", "")
    schema = default_config(task)
    known, given = flatten(schema), flatten(config)
    free = tuple(f"{section}." for section in FREE)
    for name in given:
        if name not in known and not name.startswith(free):
            raise BadInput(f"config.{name}: there is no such field{nearest(name, known)}")
    for name in known:
        if name not in given:
            raise BadInput(f"config.{name}: is missing; start from sigmarep.training.config.default_config({task!r})")
        _check_type(name, given[name], _type(schema, name))
    for name, words in CHOICES.items():
        if given[name] not in words and not (name in OPEN and _is_open(name, given[name])):
            also = OPEN.get(name, "")
            raise BadInput(f"config.{name} = {given[name]!r}: expected one of {', '.join(words)}{also}")
    for name in ("callbacks", "writers.extra"):
        for word in given[name]:
            if not doors.is_dotted(word):
                raise BadInput(
                    f"config.{name} = {tuple(given[name])!r}: expected dotted Python names, as my_package.my_name"
                )
    for name, (test, accepted) in RANGES.items():
        if not test(given[name]):
            raise BadInput(f"config.{name} = {given[name]!r}: expected {accepted}")
    if given["optimizer.other_learning_rate"] and not given["optimizer.learning_rate"]:
        raise BadInput("config.optimizer.learning_rate = 0.0: expected a number above 0 beside other_learning_rate")
    copy = ml_collections.ConfigDict(config)
    return ml_collections.FrozenConfigDict(copy)


def _is_open(name: str, word: str) -> bool:
    if doors.is_dotted(word):
        return True
    # Imported where a word is not this project's: it takes the seconds that JAX takes to start.
    from sigmarep.training import external

    return {"optimizer.name": external.is_optimizer, "optimizer.schedule": external.is_schedule}[name](word)


def _type(schema: ml_collections.ConfigDict, name: str) -> type:
    *blocks, leaf = name.split(".")
    for block in blocks:
        schema = schema[block]
    return schema.get_type(leaf)


def _check_type(name: str, value: Any, expected: type) -> None:
    accepted: tuple[type, ...] = {float: (float, int), tuple: (tuple, list)}.get(expected, (expected,))
    if (value is None and name.rsplit(".", 1)[-1] in OPTIONAL) or any(name.endswith(f"_{unit}") for unit in UNITS):
        accepted = (*accepted, type(None))
    if not isinstance(value, accepted) or (isinstance(value, bool) and expected is not bool):
        raise BadInput(f"config.{name} = {value!r}: expected a value of type {expected.__name__}")


def nearest(name: str, known: Iterable[str]) -> str:
    """A clause that offers the nearest known name, or nothing."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not close:
        by_leaf = {each.rsplit(".", 1)[-1]: each for each in known}
        close = [by_leaf[leaf] for leaf in difflib.get_close_matches(name.rsplit(".", 1)[-1], by_leaf, n=1)]
    return f"; did you mean config.{close[0]}?" if close else ""
