"""Learning-rate schedules, each with or without a linear warmup."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from sigmarep import doors
from sigmarep.errors import BadInput
from sigmarep.fields import Free, duration, field
from sigmarep.training import external

SCHEDULES = ("constant", "cosine", "step", "rsqrt", "linear")
FIELDS: dict[str, Any] = {
    "learning_rate": field(1e-3, "Peak of the learning rate.", at_least=0),
    "schedule": field(
        "cosine",
        "Learning rate over time.",
        choices=SCHEDULES,
        also=lambda word: doors.is_dotted(word) or external.is_schedule(word),
        also_doc="a schedule of optax such as sgdr_schedule, or a dotted Python name",
    ),
    "schedule_arguments": Free("Arguments of a schedule of optax or of one's own (sigmarep.training.external)."),
    "warmup": duration(None, "Length of the linear warmup."),
    "end_factor": field(0.0, "Last learning rate as a fraction of the peak (cosine, linear).", at_least=0),
    "step_at": field(
        (0.6, 0.9), "Fractions of the run at which the step schedule falls.", at_least=0, at_most=1, order="rising"
    ),
    "step_factor": field(0.1, "Factor on the learning rate at each of them.", at_least=0),
}


def create_schedule(
    config: Any, *, total_steps: int, warmup_steps: int = 0, peak: float | jax.Array | None = None
) -> optax.Schedule:
    """The learning rate as a function of the updates made so far, 0 before the first.

    With peak η, w warmup steps, T steps in all and p = (step − w) / (T − w), after the warmup:

      constant  η
      cosine    η·(e + (1 − e)·(1 + cos πp)/2), e = end_factor
      linear    η·(1 − (1 − e)·p)
      step      η·step_factor^k, k the number of fractions step_at of the whole run that have passed
      rsqrt     η·√(w / max(step + 1, w)), w at least 1

    Other schedules are optax's, or anyone's: `sigmarep.training.external`.

    In the warmup step i has η·(i + 1)/w: the first update is not wasted at 0, the last has η.

    Args:
      config: `config.optimizer`.
      peak: takes the place of `config.learning_rate`, where that is an input of a program.

    Raises:
      BadInput: the warmup is longer than the run.
    """
    peak = config.learning_rate if peak is None else peak
    if warmup_steps > total_steps:
        raise BadInput(
            f"config.optimizer.warmup_steps = {warmup_steps}: longer than the run of {total_steps} steps; shorten it"
        )
    if config.schedule not in SCHEDULES:
        factor = external.create_schedule(
            config.schedule, config.schedule_arguments, total_steps=total_steps, warmup_steps=warmup_steps
        )
        return lambda step: peak * jnp.asarray(factor(step), jnp.float32)
    if config.schedule_arguments:
        raise BadInput(
            f"config.optimizer.schedule_arguments: are those of a schedule of optax, and {config.schedule!r} is built in; "
            "its fields are config.optimizer's own"
        )
    end = config.end_factor
    decaying = max(total_steps - warmup_steps, 1)
    boundaries = [round(fraction * total_steps) for fraction in config.step_at]

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        progress = jnp.clip((step - warmup_steps) / decaying, 0.0, 1.0)
        if config.schedule == "constant":
            factor = jnp.ones_like(step)
        elif config.schedule == "cosine":
            factor = end + (1 - end) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        elif config.schedule == "linear":
            factor = 1 - (1 - end) * progress
        elif config.schedule == "step":
            passed = sum(jnp.where(step >= boundary, 1.0, 0.0) for boundary in boundaries)
            factor = jnp.asarray(config.step_factor, jnp.float32) ** passed
        else:
            w = float(max(warmup_steps, 1))
            factor = jnp.sqrt(w / jnp.maximum(step + 1, w))
        warmup = (step + 1) / max(warmup_steps, 1)
        return peak * jnp.where(step < warmup_steps, warmup, factor)

    return schedule
