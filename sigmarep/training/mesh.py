"""The device mesh, and where every array of the training state lives on it.

A rule is a regular expression over the '/'-joined path of an array and the mesh axes of its trailing dimensions: arrays
stacked over layers have one more in front, which stays whole. The first rule that matches counts, and every array must
have one. Optimizer moments are found under the path of their parameter. Activations are placed by the names that
`sigmarep.nn.constraints` gives their dimensions.
"""

import contextlib
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import ml_collections
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sigmarep.errors import BadInput
from sigmarep.fields import field

AXES = ("data", "fsdp", "tensor")
FIELDS: dict[str, Any] = {
    "data": field(-1, "Devices along the data axis; -1 takes those that the other axes leave.", at_least=-1),
    "fsdp": field(1, "Devices that share parameters and data.", at_least=-1),
    "tensor": field(1, "Devices that share heads and hidden units.", at_least=-1),
}

RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"(query|key|value)/kernel$", ("fsdp", "tensor", None)),
    (r"(qkv|qk)/kernel$", ("fsdp", None, "tensor", None)),
    (r"attention/out/kernel$", ("tensor", None, "fsdp")),
    (r"up/kernel$", ("fsdp", "tensor")),
    (r"down/kernel$", ("tensor", "fsdp")),
    (r"patch_embedding/kernel$", (None, None, None, "fsdp")),
    (r"front_end/kernel$", (None, None, "fsdp")),
    (r"head/kernel$", ("fsdp", None)),
    (r"(tables|projections)_\d+/(embedding|kernel)$", ("fsdp", None)),
    (r"tokens/classes/kernel$", ("fsdp", None)),
    (r"(projector|predictor)/dense_\d+/kernel$", ("fsdp", "tensor")),
    (r"(positions/embedding|class_token)$", ()),
    # The factor that drives entropy to its target, and the losses that modules sow.
    (r"/(log_scale|entropy_target|seq_vcr)$", ()),
    (r"/(bias|scale|alpha|attention_shift|gamma|u|basis|sigma|mean|var)$", ()),
    # Counters, the key of the random numbers, and what an optimizer keeps that is no moment of a parameter.
    (r"(^|/)(step|rng|count|notfinite_count|last_finite|total_notfinite|ns_coeffs)$", ()),
)

# Mesh axes of the dimensions of activations, by the names of `sigmarep.nn.constraints`; the others are whole.
ACTIVATION_RULES = (("batch", ("data", "fsdp")), ("heads", "tensor"), ("mlp", "tensor"))


def create_mesh(config: ml_collections.ConfigDict, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of `config.mesh`; one axis may be −1 and takes the devices the others leave.

    Raises:
      BadInput: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = [config[name] for name in AXES]
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise BadInput(f"config.mesh = {dict(config)}: expected sizes of at least 1, or -1 for one of them")
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if math.prod(sizes) != len(devices):
        raise BadInput(
            f"config.mesh = {dict(config)}: does not multiply to the {len(devices)} devices; "
            "set one axis to -1 to take what the others leave"
        )
    grid = np.asarray(devices).reshape(sizes)
    if devices[0].platform == "tpu":
        # Neighbours on an axis are neighbours on the chips' own network.
        grid = mesh_utils.create_device_mesh(tuple(sizes), devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def fits(config: ml_collections.ConfigDict) -> bool:
    """Whether the devices of this machine make the mesh of `config.mesh`."""
    try:
        create_mesh(config)
    except BadInput:
        return False
    return True


def path_name(path: tuple[Any, ...]) -> str:
    """'/'-joined name of a pytree path."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def partition_spec(name: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The placement of the array `name` by `RULES`; a dimension that its axis does not divide stays whole.

    Raises:
      ValueError: no rule matches, or the rule has more dimensions than the array.
    """
    axes = next((axes for pattern, axes in RULES if re.search(pattern, name)), None)
    if axes is None:
        raise ValueError(f"no sharding rule matches {name!r} of shape {shape}: add one to sigmarep/training/mesh.py")
    if len(axes) > len(shape):
        # Optimizers keep scalars in place of moments they do not need.
        return PartitionSpec()
    spec = [None] * (len(shape) - len(axes)) + [
        axis if axis and size % mesh.shape[axis] == 0 else None
        for axis, size in zip(axes, shape[len(shape) - len(axes) :], strict=True)
    ]
    return PartitionSpec(*spec)


def state_shardings(abstract_state: Any, mesh: Mesh) -> Any:
    """A NamedSharding for every array of the training state."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: NamedSharding(mesh, partition_spec(path_name(path), x.shape, mesh)), abstract_state
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Examples are spread over the data and fsdp axes."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


class InputShare(NamedTuple):
    """Number `part` of `parts` equal parts of every global batch."""

    part: int
    parts: int


def input_share(mesh: Mesh, process_index: int | None = None) -> InputShare:
    """The rows that a process must bring: processes whose devices differ in their place on the tensor axis alone need
    the same ones.

    Args:
      process_index: this process if None.

    Raises:
      BadInput: two processes share some rows and not all.
    """
    process_index = jax.process_index() if process_index is None else process_index
    rows: dict[int, set[int]] = {}
    for (data, fsdp, _), device in np.ndenumerate(mesh.devices):
        rows.setdefault(device.process_index, set()).add(data * mesh.shape["fsdp"] + fsdp)
    parts = sorted({tuple(sorted(each)) for each in rows.values()})
    if sum(len(each) for each in parts) != mesh.shape["data"] * mesh.shape["fsdp"] or len(set(map(len, parts))) > 1:
        raise BadInput(
            f"config.mesh = {dict(mesh.shape)}: the devices of {len(rows)} processes do not share a batch evenly; let "
            "tensor divide the devices of a process, or be a multiple of them"
        )
    return InputShare(parts.index(tuple(sorted(rows[process_index]))), len(parts))


@contextlib.contextmanager
def activations_placed(mesh: Mesh) -> Iterator[None]:
    """What is traced within keeps its activations where `ACTIVATION_RULES` say; for the whole call of a jitted function."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(ACTIVATION_RULES):
        yield


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())
