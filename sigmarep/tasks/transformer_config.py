"""`config.model`'s part that every Transformer shares, and what it makes."""

import contextlib
import dataclasses
from typing import Any

import jax.numpy as jnp
import ml_collections

from sigmarep.errors import BadInput
from sigmarep.nn import TransformerConfig

# Decided elsewhere: by config.compute_dtype, by the kind of positions, and by the model that the blocks stand in.
NOT_CONFIGURED = ("dtype", "rotary_base", "residual_scale", "branch_init_scale")


def transformer_defaults(**changed: Any) -> ml_collections.ConfigDict:
    """The fields of `TransformerConfig` that a configuration sets, with their defaults but for `changed`."""
    fields = dataclasses.asdict(TransformerConfig(**changed))
    return ml_collections.ConfigDict({name: value for name, value in fields.items() if name not in NOT_CONFIGURED})


def create_transformer(config: ml_collections.ConfigDict, **changed: Any) -> TransformerConfig:
    """The TransformerConfig of `config.model`, other fields of which are passed over.

    Args:
      changed: fields that come from elsewhere, such as `depth` of one of two stacks.

    Raises:
      BadInput: a field has an unknown word or an impossible value.
    """
    names = {field.name for field in dataclasses.fields(TransformerConfig)}
    fields = {name: value for name, value in dict(config.model).items() if name in names}
    # The command line gives a number as text, because the field takes words too.
    with contextlib.suppress(ValueError):
        fields["gamma_init"] = float(fields["gamma_init"])
    try:
        return TransformerConfig(**(fields | changed), dtype=jnp.dtype(config.compute_dtype))
    except ValueError as error:
        raise BadInput(f"config.model.{error}") from error
