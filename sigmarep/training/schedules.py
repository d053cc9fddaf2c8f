"""Learning-rate schedules, each with or without a linear warmup."""

from typing import Any

import jax.numpy as jnp
import optax

from sigmarep.errors import BadInput
from sigmarep.training import external
from sigmarep.training.config import CHOICES


def create_schedule(config: Any, *, total_steps: int, warmup_steps: int = 0) -> optax.Schedule:
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

    Raises:
      BadInput: the warmup is longer than the run.
    """
    if warmup_steps > total_steps:
        raise BadInput(
            f"config.optimizer.warmup_steps = {warmup_steps}: longer than the run of {total_steps} steps; shorten it"
        )
    if config.schedule not in CHOICES["optimizer.schedule"]:
        factor = external.create_schedule(
            config.schedule, config.schedule_arguments, total_steps=total_steps, warmup_steps=warmup_steps
        )
        return lambda step: config.learning_rate * jnp.asarray(factor(step), jnp.float32)
    if config.schedule_arguments:
        raise BadInput(
            f"config.optimizer.schedule_arguments: are those of a schedule of optax, and {config.schedule!r} is built in; "
            "its fields are config.optimizer's own"
        )
    peak, end = config.learning_rate, config.end_factor
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
