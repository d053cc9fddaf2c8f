"""Placement of activations on a mesh: modules name the dimensions, the trainer has rules for the names.

Without it the partitioner may follow the kernels: with parameters spread over every device (FSDP) each device then keeps
the features of all examples, in place of all features of its share of the examples.

Names: "batch", "length" (tokens), "embed" (the model's width), "heads", "head_dim", "mlp" (hidden units).
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def with_axes(x: jax.Array, *names: str | None) -> jax.Array:
    """Constrains the dimensions of x to the mesh axes that the rules in force give their names.

    Returns x itself outside `flax.linen.logical_axis_rules` or without a mesh of several devices (`jax.set_mesh`).

    Args:
      x: an array with as many dimensions as there are `names`. A dimension without a name or rule is whole on every
        device, as is one that its axes do not divide.
    """
    spec = spec_of(x.shape, *names)
    if spec is None:
        return x
    constrained: jax.Array = jax.lax.with_sharding_constraint(x, spec)
    return constrained


def spec_of(shape: tuple[int, ...], *names: str | None) -> jax.sharding.PartitionSpec | None:
    """The placement that `with_axes` gives an array of this shape, None where it does nothing."""
    rules, mesh = nn.get_logical_axis_rules(), jax.sharding.get_abstract_mesh()
    if not rules or mesh.empty or mesh.size == 1:
        return None
    axes = [_tuple(each) for each in nn.logical_to_mesh_axes(names, rules) or ()]
    spec = [
        each if size % math.prod(mesh.shape[axis] for axis in each) == 0 else ()
        for each, size in zip(axes, shape, strict=True)
    ]
    return jax.sharding.PartitionSpec(*(each or None for each in spec))


def shared_among_devices(function: Callable[..., jax.Array], *args: Any) -> jax.Array:
    """`function(*args)`, computed on the devices that share the batch, by each a part.

    Args:
      function: maps arrays with one first axis over independent values to one such array; zeros must not trouble it.
      args: trees of arrays that every device has.
    """
    rules, mesh = nn.get_logical_axis_rules(), jax.sharding.get_abstract_mesh()
    axes = _tuple((nn.logical_to_mesh_axes(("batch",), rules) or (None,))[0]) if rules and not mesh.empty else ()
    devices = math.prod(mesh.shape[axis] for axis in axes)
    if devices == 1:
        return function(*args)
    count = len(jax.tree.leaves(args)[0])

    def part(x: jax.Array) -> jax.Array:
        # Whole first: a sum over devices would otherwise be one of padded arrays.
        x = jax.lax.with_sharding_constraint(x, jax.sharding.PartitionSpec())
        padded = jnp.pad(x, [(0, -count % devices)] + [(0, 0)] * (x.ndim - 1))
        spread: jax.Array = jax.lax.with_sharding_constraint(padded, jax.sharding.PartitionSpec(axes))
        return spread

    results = jax.lax.with_sharding_constraint(function(*jax.tree.map(part, args)), jax.sharding.PartitionSpec(axes))
    whole: jax.Array = jax.lax.with_sharding_constraint(results, jax.sharding.PartitionSpec())[:count]
    return whole


def _tuple(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return axes if isinstance(axes, tuple) else (axes,) if isinstance(axes, str) else ()
