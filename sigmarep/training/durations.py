"""Durations of a configuration, given in steps, epochs or examples."""

import math
from typing import Any

from sigmarep.errors import BadInput
from sigmarep.fields import UNITS


def steps(config: Any, name: str, *, batch_size: int, num_examples: int, prefix: str = "config.") -> int | None:
    """Steps of the duration `name`, None if none of `<name>_steps`, `_epochs`, `_examples` is set.

    Epochs and examples are rounded to the nearest step, to at least one unless they are 0.

    Args:
      config: the block that holds the fields.
      batch_size: examples a step.
      num_examples: examples an epoch.
      prefix: of the field in error messages.

    Raises:
      BadInput: several are set, or the value is negative, not finite, or not a whole number of steps.
    """
    fields = {unit: config[f"{name}_{unit}"] for unit in UNITS}
    given = {unit: value for unit, value in fields.items() if value is not None}
    if not given:
        return None
    if len(given) > 1:
        first, second = (f"{prefix}{name}_{unit}" for unit in list(given)[:2])
        raise BadInput(f"{first} and {second} are both set: keep one and set the other to None")
    ((unit, value),) = given.items()
    field = f"{prefix}{name}_{unit} = {value:g}"
    if not math.isfinite(value) or value < 0:
        raise BadInput(f"{field}: expected a finite number of at least 0")
    if unit == "steps" and value != int(value):
        raise BadInput(f"{field}: expected a whole number of steps")
    examples_a_unit = {"steps": batch_size, "epochs": num_examples, "examples": 1}[unit]
    exact = value * examples_a_unit / batch_size
    return max(round(exact), 1) if exact > 0 else 0
