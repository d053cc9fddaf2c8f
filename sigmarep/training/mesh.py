"""The device mesh, and where every array of the training state lives on it.

Kernels are placed by the description of their layers (`sigmarep.nn.layers`):

    hidden layers                 `tensor` on one side of the matrix, `fsdp` on the other
    those that read the model's
    input or make its output      `fsdp` on the inputs
    convolutions                  `fsdp` on the outputs
    projectors                    `fsdp` on the inputs, `tensor` on the outputs

In a hidden layer `tensor` is on the side that consists of heads and their dimensions, on the heads, or without heads on the
wider side, the outputs if both are alike: so the second layer of an MLP contracts the hidden units that the first spreads.
Axes over stacked layers stay whole, and so do tables of positions and whatever no layer describes. Moments and averages are
found by their parameter's path at the end of their own, and placed as the parameter is.

`config.mesh.rules` are exceptions: a regular expression over the '/'-joined path of an array, then = and the mesh axes of
its last dimensions, - for one that stays whole; the first that matches counts. Activations are placed by the names that
`sigmarep.nn.axes` gives their dimensions.
"""

import contextlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import ml_collections
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sigmarep.errors import BadInput
from sigmarep.fields import field
from sigmarep.nn.layers import Layer, path_name

AXES = ("data", "fsdp", "tensor")
FIELDS: dict[str, Any] = {
    "data": field(-1, "Devices along the data axis; -1 takes those that the other axes leave.", at_least=-1),
    "fsdp": field(1, "Devices that share parameters and data.", at_least=-1),
    "tensor": field(1, "Devices that share heads and hidden units.", at_least=-1),
    "rules": field(
        (),
        "Exceptions to the placement of parameters: a regular expression over paths, = and the mesh axes of the last "
        "dimensions, as gate/kernel$=fsdp,tensor,-.",
    ),
}

# A regular expression over paths, and a mesh axis or None for each of the last dimensions of what it finds.
Rule = tuple[re.Pattern[str], tuple[str | None, ...]]

# Mesh axes of the dimensions of activations, by the names of `sigmarep.nn.axes`; the others are whole.
ACTIVATION_RULES = (("batch", ("data", "fsdp")), ("heads", "tensor"), ("mlp", "tensor"))

# Arrays of fewer elements are read sooner than the devices have agreed on a sum.
SMALL = 2**14


def create_mesh(config: ml_collections.ConfigDict, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of `config.mesh`; one axis may be −1 and takes the devices the others leave.

    Raises:
      BadInput: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = [config[name] for name in AXES]
    asked = dict(zip(AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise BadInput(f"config.mesh = {asked}: expected sizes of at least 1, or -1 for one of them")
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if math.prod(sizes) != len(devices):
        raise BadInput(
            f"config.mesh = {asked}: does not multiply to the {len(devices)} devices; "
            "set one axis to -1 to take what the others leave"
        )
    grid = np.asarray(devices).reshape(sizes)
    if devices[0].platform == "tpu":
        # Neighbours on an axis are neighbours on the chips' own network.
        grid = mesh_utils.create_device_mesh(tuple(sizes), devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def fits(config: ml_collections.ConfigDict) -> bool:
    """True if the devices of this machine make the mesh of `config.mesh`."""
    try:
        create_mesh(config)
    except BadInput:
        return False
    return True


def read_rules(rules: Sequence[str]) -> list[Rule]:
    """The rules of `config.mesh.rules`.

    Raises:
      BadInput: one is no regular expression with names of mesh axes behind it.
    """
    read = []
    for rule in rules:
        pattern, separator, names = rule.rpartition("=")
        axes = [name.strip() for name in names.split(",")] if names.strip() else []
        named = [axis for axis in axes if axis != "-"]
        if not separator or not set(named) <= set(AXES) or len(set(named)) < len(named):
            raise BadInput(
                f"config.mesh.rules = {tuple(rules)!r}: {rule!r}: expected a regular expression, = and for each of the "
                f"last dimensions one of {', '.join(AXES)} (each once) or -, as gate/kernel$=fsdp,tensor,-"
            )
        try:
            read.append((re.compile(pattern), tuple(None if axis == "-" else axis for axis in axes)))
        except re.error as error:
            raise BadInput(f"config.mesh.rules = {tuple(rules)!r}: {rule!r}: {error}") from error
    return read


def check_matches(abstract_state: Any, rules: Sequence[Rule]) -> None:
    """Raises BadInput where the regular expression of a rule finds no array of the state."""
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(abstract_state)]
    for pattern, _ in rules:
        if not any(map(pattern.search, names)):
            raise BadInput(
                f"config.mesh.rules: {pattern.pattern!r} finds none of the arrays, which are named as {names[0]}"
            )


def layer_axes(layer: Layer) -> tuple[str | None, ...]:
    """The mesh axes of a kernel's dimensions (module docstring)."""
    axes: dict[int, str] = {}
    if layer.window:
        axes = {layer.outputs[-1]: "fsdp"}
    elif layer.role in ("input", "output"):
        axes = {layer.inputs[0]: "fsdp"}
    elif layer.role != "position":
        inputs, outputs = (math.prod(layer.shape[axis] for axis in side) for side in (layer.inputs, layer.outputs))
        by_outputs = (
            len(layer.outputs) > 1 or (len(layer.inputs) == 1 and outputs >= inputs) or layer.role == "projector"
        )
        spread, other = (layer.outputs, layer.inputs) if by_outputs else (layer.inputs, layer.outputs)
        # Heads stand before their dimensions, and behind the slots of a fused projection.
        axes = {spread[-2:][0]: "tensor", other[-2:][0]: "fsdp"}
    return tuple(axes.get(axis) for axis in range(len(layer.shape)))


def partition_spec(
    name: str, shape: tuple[int, ...], mesh: Mesh, layers: Mapping[str, Layer], rules: Sequence[Rule] = ()
) -> PartitionSpec:
    """The placement of the array `name`, by the first rule that finds it, else by the layer that it is the kernel of; a
    dimension that its axis does not divide stays whole."""
    axes = next((axes for pattern, axes in rules if pattern.search(name)), None)
    if axes is None:
        layer = _layer_of(name, layers)
        axes = () if layer is None or layer.shape != tuple(shape) else layer_axes(layer)
    if len(axes) > len(shape):
        # Optimizers keep scalars in place of moments they do not need.
        return PartitionSpec()
    spec = [None] * (len(shape) - len(axes)) + [
        axis if axis and size % mesh.shape[axis] == 0 else None
        for axis, size in zip(axes, shape[len(shape) - len(axes) :], strict=True)
    ]
    return PartitionSpec(*spec)


def _layer_of(name: str, layers: Mapping[str, Layer]) -> Layer | None:
    """The layer whose kernel's path is all of `name` or its end, as that of a moment or an average is."""
    parts = name.split("/")
    return next(filter(None, (layers.get("/".join(parts[i:])) for i in range(len(parts)))), None)


def state_shardings(abstract_state: Any, mesh: Mesh, layers: Mapping[str, Layer], rules: Sequence[Rule] = ()) -> Any:
    """A NamedSharding for every array of the training state."""

    def sharding(path, x):
        return NamedSharding(mesh, partition_spec(path_name(path), x.shape, mesh, layers, rules))

    return jax.tree_util.tree_map_with_path(sharding, abstract_state)


def spread_over_data(x: jax.Array, placed: NamedSharding) -> jax.Array:
    """`x` with one of its dimensions divided among the devices of the data axis too, each of which has all of it already.

    Sums over the result read a part of the array on each device. Small arrays, and those with no dimension that divides
    by the number of devices, are returned as they are.

    Args:
      placed: where x lies, by which the program that computes it stays as it is.
    """
    mesh = placed.mesh
    if x.size < SMALL:
        return x
    spec: list[Any] = [*placed.spec, *(None,) * (x.ndim - len(placed.spec))]
    for dimension, axes in enumerate(spec):
        both = (*(axes if isinstance(axes, tuple) else (axes,) if axes else ()), "data")
        if "data" not in both[:-1] and x.shape[dimension] % math.prod(mesh.shape[a] for a in both) == 0:
            spec[dimension] = both
            x = jax.lax.with_sharding_constraint(x, placed)
            return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*spec)))
    return x


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
    """Keeps the activations of programs traced within where `ACTIVATION_RULES` say; for whole calls of jitted functions."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(ACTIVATION_RULES):
        yield


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())
