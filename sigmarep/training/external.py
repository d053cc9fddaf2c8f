"""Optimizers and schedules that are not this project's: any of optax by its name, anyone's by a dotted Python name.

An optimizer is called as `factory(learning_rate=schedule, **config.optimizer.arguments)`, and takes the place of a
built-in one: after gradient clipping and `relative_gradients`, before `spectral_bound` and the factors of learning rates.
One without the argument `learning_rate`, such as optax's scale_by_adam, gives directions; the rate follows it.

Weight decay: a factory with arguments for both the decay and a mask of parameters (`mask` or `weight_decay_mask`) gets
`config.optimizer.weight_decay` and the mask of `no_decay`. After one without, decay is decoupled as in AdamW. One that
would decay all parameters alike takes it from `arguments` alone.

A schedule is called as `factory(**config.optimizer.schedule_arguments)` and gives multiples of
`config.optimizer.learning_rate`. What a factory requires and the arguments do not say follows from the run: a peak or a
constant is 1, a decay takes all steps after the warmup. `warmup_*` warms up any schedule, unless it takes `warmup_steps`.
"""

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from sigmarep import doors
from sigmarep.errors import BadInput, one_line

MASKS = ("mask", "weight_decay_mask")


def is_optimizer(word: str) -> bool:
    """True if optax has an optimizer, or a transformation to directions, of this name."""
    factory = _of_optax(word)
    return factory is not None and (word.startswith("scale_by_") or "learning_rate" in _parameters(factory))


def is_schedule(word: str) -> bool:
    """True if optax has a schedule of this name."""
    factory = getattr(optax.schedules, word, None)
    return inspect.isfunction(factory) and not word.startswith("inject_")


def create_optimizer(
    word: str,
    arguments: Mapping[str, Any],
    *,
    schedule: optax.Schedule,
    weight_decay: float,
    mask: Any,
    params: Any,
) -> optax.GradientTransformation:
    """The optimizer that `word` (`config.optimizer.name`) names; see the module.

    Args:
      arguments: `config.optimizer.arguments`.
      schedule: learning rate by update.
      mask: True for every parameter that weight decay applies to.
      params: parameters, or their shapes.

    Raises:
      BadInput: there is none, it refuses an argument, or it needs more than gradients and parameters.
    """
    field = f"config.optimizer.name = {word!r}"
    factory = _of_optax(word) or doors.load(word, field="config.optimizer.name")
    parameters = _parameters(factory, field)
    decays, with_rate = "weight_decay" in parameters, "learning_rate" in parameters
    given = _with_decay(word, _plain(arguments), parameters, weight_decay, mask)
    if with_rate:
        given["learning_rate"] = schedule
    transformation = _called(factory, given, field)
    if not (hasattr(transformation, "init") and hasattr(transformation, "update")):
        raise BadInput(f"{field}: gives a {type(transformation).__name__}; expected an optax.GradientTransformation")
    _check_update(transformation, params, field)
    decay = optax.add_decayed_weights(weight_decay, mask) if weight_decay and not decays else optax.identity()
    if not with_rate:
        return optax.chain(transformation, decay, optax.scale_by_learning_rate(schedule))
    return optax.chain(transformation, _decoupled_decay(schedule, weight_decay, mask) if not decays else decay)


def _with_decay(
    word: str, given: dict[str, Any], parameters: Mapping[str, inspect.Parameter], weight_decay: float, mask: Any
) -> dict[str, Any]:
    """The arguments of an optimizer, with the weight decay and its mask if it takes both.

    Raises:
      BadInput: an argument is unknown or set elsewhere, or the optimizer would decay all parameters alike.
    """
    masks = [name for name in MASKS if name in parameters]
    decays = "weight_decay" in parameters
    set_elsewhere = ["learning_rate", *(["weight_decay"] if decays and masks else [])]
    _check_names("config.optimizer.arguments", given, parameters, set_elsewhere)
    if decays and not masks and weight_decay:
        raise BadInput(
            f"config.optimizer.weight_decay = {weight_decay}: {word} would decay biases and gains too; set it to 0.0, and "
            "config.optimizer.arguments.weight_decay if that is meant"
        )
    if decays and masks:
        given["weight_decay"] = weight_decay
    return given | {name: mask for name in masks if name not in given}


def create_schedule(
    word: str, arguments: Mapping[str, Any], *, total_steps: int, warmup_steps: int
) -> Callable[[jax.Array], jax.Array]:
    """Multiples of the learning rate by update, from the schedule that `word` (`config.optimizer.schedule`) names; see the
    module.

    Args:
      arguments: `config.optimizer.schedule_arguments`.

    Raises:
      BadInput: there is none, it refuses or lacks an argument, or it gives no number.
    """
    field = f"config.optimizer.schedule = {word!r}"
    factory = (
        getattr(optax.schedules, word) if is_schedule(word) else doors.load(word, field="config.optimizer.schedule")
    )
    parameters = _parameters(factory, field)
    warms_up = "warmup_steps" in parameters
    decaying = total_steps if warms_up else max(total_steps - warmup_steps, 1)
    of_run = {
        "init_value": 0.0 if "peak_value" in parameters else 1.0,
        "peak_value": 1.0,
        "value": 1.0,
        "warmup_steps": warmup_steps,
        "decay_steps": decaying,
        "transition_steps": decaying,
        "total_steps": total_steps,
    }
    given = _plain(arguments)
    _check_names("config.optimizer.schedule_arguments", given, parameters, [])
    required = {name for name, each in parameters.items() if each.default is inspect.Parameter.empty}
    given = {name: value for name, value in of_run.items() if name in required} | given
    factor = _called(factory, given, field)
    try:
        shape = jax.eval_shape(factor, jax.ShapeDtypeStruct((), jnp.int32)).shape
    except Exception as error:
        raise BadInput(f"{field}: cannot be called with a step ({type(error).__name__}: {one_line(error)})") from error
    if shape != ():
        raise BadInput(f"{field}: gives an array of shape {shape} for a step; expected a number")
    if warms_up or not warmup_steps:
        return factor

    def warmed_up(step):
        first = factor(jnp.zeros_like(step))
        return jnp.where(
            step < warmup_steps, first * (step + 1) / warmup_steps, factor(jnp.maximum(step - warmup_steps, 0))
        )

    return warmed_up


class DecayState(NamedTuple):
    """`step`: () int32, updates made so far."""

    step: jax.Array


def _decoupled_decay(schedule: optax.Schedule, weight_decay: float, mask: Any) -> optax.GradientTransformation:
    """Adds −η·λ·W to updates that hold the learning rate η already."""
    if not weight_decay:
        return optax.identity()

    def update(updates, state, params=None):
        rate = schedule(state.step) * weight_decay
        updates = jax.tree.map(
            lambda u, w, decays: u - (rate * w).astype(u.dtype) if decays else u, updates, params, mask
        )
        return updates, DecayState(optax.safe_increment(state.step))

    return optax.GradientTransformation(lambda _: DecayState(jnp.zeros((), jnp.int32)), update)


def _of_optax(word: str) -> Callable[..., Any] | None:
    for module in (optax, optax.contrib):
        if inspect.isfunction(getattr(module, word, None)):
            return getattr(module, word)
    return None


def _parameters(factory: Any, field: str = "") -> Mapping[str, inspect.Parameter]:
    """The arguments that can be given by name."""
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):
        raise BadInput(f"{field}: cannot be called by the names of its arguments; expected a function") from None
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)
    return {name: each for name, each in parameters.items() if each.kind in kinds}


def _check_names(
    section: str, given: Mapping[str, Any], parameters: Mapping[str, inspect.Parameter], set_elsewhere: list[str]
) -> None:
    takes_any = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    for name in given:
        if name in set_elsewhere:
            raise BadInput(f"{section}.{name}: is given by config.optimizer.{name}; set that")
        if name not in parameters and not takes_any:
            close = difflib.get_close_matches(name, parameters, n=1)
            hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(parameters)}"
            raise BadInput(f"{section}.{name}: there is no such argument; {hint}")


def _called(factory: Callable[..., Any], given: Mapping[str, Any], field: str) -> Any:
    try:
        return factory(**given)
    except Exception as error:
        raise BadInput(f"{field}: refuses its arguments ({type(error).__name__}: {one_line(error)})") from error


def _check_update(transformation: Any, params: Any, field: str) -> None:
    """Refuses an optimizer whose update needs what the trainer does not have, such as the loss."""
    try:
        jax.eval_shape(lambda p: transformation.update(p, transformation.init(p), p), params)
    except Exception as error:
        raise BadInput(
            f"{field}: cannot update from gradients and parameters alone ({type(error).__name__}: {one_line(error)})"
        ) from error


def _plain(arguments: Any) -> Any:
    """Sections as dictionaries; keys that are whole numbers, which a configuration holds as text, are numbers."""
    if not hasattr(arguments, "items"):
        return arguments
    return {int(name) if str(name).isdecimal() else name: _plain(value) for name, value in arguments.items()}
