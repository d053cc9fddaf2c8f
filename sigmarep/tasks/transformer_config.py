"""`config.model`'s part that every Transformer shares, and what it makes."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import ml_collections

from sigmarep import fields
from sigmarep.errors import BadInput
from sigmarep.nn import TransformerConfig
from sigmarep.nn.positions import TOKEN_POSITIONS

# Position embeddings of models of tokens.
TEXT_POSITIONS = (*TOKEN_POSITIONS, "rotary")
# Decided elsewhere: by the kind of positions, and by the model that the blocks stand in.
NOT_CONFIGURED = ("rotary_base", "residual_scale", "branch_init_scale")


def transformer_fields(**changed: Any) -> dict[str, fields.Field]:
    """The fields of `TransformerConfig` that a configuration sets, with their defaults but for `changed`."""
    declared = fields.of_dataclass(TransformerConfig).items()
    return fields.with_defaults({name: each for name, each in declared if name not in NOT_CONFIGURED}, **changed)


def create_transformer(config: ml_collections.ConfigDict, **changed: Any) -> TransformerConfig:
    """The TransformerConfig of `config.model`, other fields of which are passed over.

    Args:
      changed: fields that come from elsewhere, such as `depth` of one of two stacks.

    Raises:
      BadInput: a field has an unknown word or an impossible value.
    """
    names = {each.name for each in dataclasses.fields(TransformerConfig)}
    values = {name: value for name, value in dict(config.model).items() if name in names}
    try:
        return TransformerConfig(**(values | changed), dtype=jnp.dtype(config.compute_dtype))
    except ValueError as error:
        raise BadInput(f"config.model.{error}") from error


def portable(transformer: TransformerConfig) -> TransformerConfig:
    """The same with attention that every kind of device computes; a kernel of one kind would not run on the others."""
    changed: dict[str, Any] = {"attention_implementation": "xla"}
    return dataclasses.replace(transformer, **changed)
