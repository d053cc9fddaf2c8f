"""Where activations live on a mesh, said by the modules in names and by the trainer in rules.

Left to itself the partitioner may follow the kernels: with parameters spread over every device (FSDP) it then keeps the
features of all examples on each device, in place of all features of some examples. Modules call `constrained` on what
they compute; it does nothing outside `flax.linen.logical_axis_rules` or without a mesh (`jax.set_mesh`), so that they
stay usable anywhere.

Names: "batch", "length" (tokens), "embed" (the model's width), "heads", "head_dim", "mlp" (hidden units).
"""

import math

import flax.linen as nn
import jax


def constrained(x: jax.Array, *names: str | None) -> jax.Array:
    """x, its dimensions on the mesh axes that the rules in force give their names.

    Args:
      x: an array with as many dimensions as there are `names`; a dimension without a name or rule is on every device
        whole, as is one that its axes do not divide.
    """
    rules, mesh = nn.get_logical_axis_rules(), jax.sharding.get_abstract_mesh()
    if not rules or mesh.empty:
        return x
    axes = [_tuple(each) for each in nn.logical_to_mesh_axes(names, rules) or ()]
    spec = [
        each if size % math.prod(mesh.shape[axis] for axis in each) == 0 else ()
        for each, size in zip(axes, x.shape, strict=True)
    ]
    return jax.lax.with_sharding_constraint(x, jax.sharding.PartitionSpec(*(each or None for each in spec)))


def _tuple(axes) -> tuple[str, ...]:
    return axes if isinstance(axes, tuple) else (axes,) if isinstance(axes, str) else ()
