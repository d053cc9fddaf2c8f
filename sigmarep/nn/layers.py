"""One description of a model's linear layers: which axes of every kernel are inputs, outputs, and stacked.

The layers themselves are asked; no name means anything. `describe` follows one abstract `init`: Flax's Dense, DenseGeneral,
Einsum, Conv, ConvLocal, ConvTranspose and Embed and the layers of `sigmarep.nn` are read from their own attributes, and the
axes that `nn.scan` and `nn.vmap` add are seen where they are added. A module that makes a kernel itself states its axes in
a class attribute, `linear_axes = {"kernel": Axes(inputs=(0,), outputs=(1,))}`. Matrices of modules that state nothing are
listed as unknown.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> from sigmarep.nn import layers
    >>> model = nn.Sequential([nn.Embed(50, 8), nn.SelfAttention(num_heads=2)])
    >>> described = layers.describe(model.init, jax.random.key(0), jnp.zeros((1, 3), jnp.int32))
    >>> out = described["layers_1/out/kernel"]
    >>> out.shape, out.inputs, out.outputs
    ((2, 4, 8), (0, 1), (2,))
    >>> out.matrices(jnp.zeros(out.shape)).shape
    (8, 8)
    >>> described.unknown
    ()

Three of one layer, stacked along the second axis:

    >>> several = nn.vmap(nn.Dense, variable_axes={"params": 1}, split_rngs={"params": True})(5)
    >>> kernel = layers.describe(several.init, jax.random.key(0), jnp.zeros((3, 2, 8)))["kernel"]
    >>> kernel.shape, kernel.stacked, kernel.inputs, kernel.outputs
    ((8, 3, 5), (1,), (0,), (2,))
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.recurrent import DenseParams
from jax.extend.core import jaxpr_as_fun

from sigmarep.nn.linear import ROLES, Reparam, ReparametrizedLayer, Role


@dataclasses.dataclass(frozen=True, kw_only=True)
class Axes:
    """The axes of a kernel as the layer itself sees it.

    Attributes:
      inputs, outputs: the axes that are contracted with the input, and those that the output has instead.
      batch: axes over independent matrices within one layer (`batch_dims` of DenseGeneral, positions of ConvLocal).
      window: the inputs that a convolution slides over.
      groups: feature groups of a convolution, each with its own part of the outputs.
      table: rows are looked up by number, as in an embedding.
      role, makes, adds, reparam: see `sigmarep.nn.linear.ReparametrizedLayer`.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    batch: tuple[int, ...] = ()
    window: tuple[int, ...] = ()
    groups: int = 1
    table: bool = False
    role: Role = "hidden"
    makes: tuple[str, ...] = ()
    adds: bool = False
    reparam: Reparam = "none"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer(Axes):
    """A linear layer's kernel in the model's parameters; its axes are those of the parameter.

    Attributes:
      name: '/'-joined path of the parameter.
      shape: of the parameter.
      stacked: axes over layers of one kind, as `nn.scan` and `nn.vmap` add them.
    """

    name: str
    shape: tuple[int, ...]
    stacked: tuple[int, ...] = ()

    @property
    def module(self) -> str:
        """'/'-joined path of the layer."""
        return self.name.rpartition("/")[0]

    @property
    def own(self) -> tuple[int, ...]:
        """All axes that are not stacked."""
        return tuple(axis for axis in range(len(self.shape)) if axis not in self.stacked)

    @property
    def order(self) -> tuple[int, ...]:
        """The axes with the stacked ones first, then batch, inputs and outputs."""
        return self.stacked + self.batch + self.inputs + self.outputs

    def ordered(self, x: jax.Array) -> jax.Array:
        """`x`, an array of the parameter's shape, with its axes in `order`."""
        return x if self.order == tuple(range(x.ndim)) else jnp.transpose(x, self.order)

    def matrices(self, x: jax.Array) -> jax.Array:
        """`x`, an array of the parameter's shape, as matrices (*stacked, *batch, inputs, outputs)."""
        x = self.ordered(x)
        lead = len(self.stacked) + len(self.batch)
        return x.reshape(*x.shape[:lead], math.prod(x.shape[lead : lead + len(self.inputs)]), -1)

    def restored(self, matrices: jax.Array) -> jax.Array:
        """The array of the parameter's shape that `matrices` came from."""
        x = matrices.reshape([self.shape[axis] for axis in self.order])
        inverse = tuple(sorted(range(x.ndim), key=self.order.__getitem__))
        return x if inverse == tuple(range(x.ndim)) else jnp.transpose(x, inverse)


class Layers(Mapping[str, Layer]):
    """The linear layers of a model, by '/'-joined path of their kernels.

    Attributes:
      stacked: by path of every parameter, biases and scales too, its axes over layers of one kind.
      stacks: by path of every module that `nn.scan` or `nn.vmap` begins at, the number of axes it adds.
      unknown: paths of the matrices that no layer describes.
      variables: shapes of the variables that `init` returns.
      initialize: makes the variables, from arguments of the same shapes as those of `describe`. It is `init` without
        another trace of the model.
    """

    def __init__(
        self,
        layers: Mapping[str, Layer],
        *,
        stacked: Mapping[str, tuple[int, ...]],
        stacks: Mapping[str, int] | None = None,
        unknown: tuple[str, ...] = (),
        variables: Any = None,
        initialize: Callable[..., Any] = lambda *_: None,
    ):
        self._layers = dict(layers)
        self.stacked = dict(stacked)
        self.stacks = dict(stacks or {})
        self.unknown = unknown
        self.variables = variables
        self.initialize = initialize

    def __getitem__(self, name: str) -> Layer:
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)


def path_name(path: tuple[Any, ...]) -> str:
    """'/'-joined name of a pytree path."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def describe(init: Callable[..., Any], *args: Any, **kwargs: Any) -> Layers:
    """Describes the layers of the model whose variables `init(*args, **kwargs)` returns; computes shapes alone.

    Args:
      init: returns variables, `params` among them, that some Flax modules made.
      args: arrays or their shapes. kwargs: passed on as they are.

    Raises:
      ValueError: a layer has a role that does not exist.
    """

    def noted(*args: Any) -> Any:
        return init(*args, **kwargs)

    with _noting(True), nn.intercept_methods(_intercepted):
        traced = jax.jit(noted).trace(*args)
    variables = traced.out_info
    structure = jax.tree.structure(variables)

    def initialize(*args: Any) -> Any:
        leaves = jaxpr_as_fun(traced.jaxpr)(*jax.tree.leaves(args))
        return _without_notes(jax.tree.unflatten(structure, leaves))

    reader = _Reader()
    reader.read(variables.get("params", {}), (), 0)
    return Layers(
        reader.layers,
        stacked=reader.stacked,
        stacks=reader.stacks,
        unknown=tuple(reader.unknown),
        variables=_without_notes(variables),
        initialize=initialize,
    )


# A note is a variable beside a parameter, named `<parameter>:axes:<number>`, during `describe` alone. The number is that of
# the axes in `_AXES`. As an empty array of the parameter's rank, all sizes 0, it goes through whatever Flax does to the
# parameter: what it has of other sizes are stacked axes. The note on a module has no parameter's name, and more axes than
# any number that `variable_axes` may name.
_MARK = ":axes:"
_MODULE_RANK = 8
_AXES: list[Axes | None] = [None]
# Traces of jitted functions that hold notes are kept apart from all others.
_noting = jax.make_user_context(default_value=False)


def _intercepted(method: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
    result = method(*args, **kwargs)
    module = context.module
    if isinstance(module, nn.Einsum) and context.method_name != "__call__":
        return result
    if module.scope is None or not module.scope.is_mutable_collection("params"):
        return result
    variables = module.scope.variables().get("params", {})
    noted = {name.partition(_MARK)[0] for name in variables if _MARK in name}
    for name, value in list(variables.items()):
        value = nn.meta.unbox(value)
        if _MARK in name or name in noted or not hasattr(value, "ndim"):
            continue
        axes = _axes(module, name, value.ndim, args, kwargs)
        if axes not in _AXES:
            _AXES.append(axes)
        module.scope.put_variable("params", f"{name}{_MARK}{_AXES.index(axes)}", jnp.zeros((0,) * value.ndim))
    if variables and "" not in noted:
        module.scope.put_variable("params", f"{_MARK}0", jnp.zeros((0,) * _MODULE_RANK))
    return result


def _axes(module: nn.Module, name: str, rank: int, args: Any, kwargs: Any) -> Axes | None:
    """The axes of the module's own parameter `name`, None where it states none."""
    stated: Mapping[str, Axes] = getattr(module, "linear_axes", {})
    if name in stated:
        return stated[name]
    role, makes = getattr(module, "role", None), getattr(module, "makes", ())
    adds: bool = getattr(module, "adds", False) is True
    reparam: Reparam = "none"
    if isinstance(module, ReparametrizedLayer):
        if role not in ROLES:
            raise ValueError(f"role = {role!r}: expected one of {', '.join(ROLES)}")
        reparam = module.reparam
    if name != ("embedding" if isinstance(module, nn.Embed) else getattr(module, "matrix_name", "kernel")):
        return None
    axes = _einsum_axes(module, args, kwargs) if isinstance(module, nn.Einsum) else _layer_axes(module, rank)
    if axes is None:
        return None
    role = role if role in ROLES else axes.role
    return dataclasses.replace(axes, role=role, makes=tuple(makes), adds=adds, reparam=reparam)


def _layer_axes(module: Any, rank: int) -> Axes | None:
    batch, outputs, window, groups = 0, 1, 0, 1
    if isinstance(module, nn.DenseGeneral):
        batch, outputs = len(_tuple(module.batch_dims)), len(_tuple(module.features))
    elif isinstance(module, nn.Conv):
        window, groups = len(_tuple(module.kernel_size)), module.feature_group_count
    elif isinstance(module, nn.ConvLocal):
        batch = len(_tuple(module.kernel_size))
    elif isinstance(module, nn.ConvTranspose):
        window = len(_tuple(module.kernel_size))
        if module.transpose_kernel:
            sizes = tuple(range(window))
            return Axes(inputs=(*sizes, window + 1), outputs=(window,), window=sizes)
    elif isinstance(module, ReparametrizedLayer):
        outputs = len(_tuple(module.features))
    elif not isinstance(module, nn.Dense | nn.Embed | DenseParams):
        return None
    order = tuple(range(rank))
    return Axes(
        inputs=order[batch : rank - outputs],
        outputs=order[rank - outputs :],
        batch=order[:batch],
        window=order[batch : batch + window],
        groups=groups,
        table=isinstance(module, nn.Embed),
        role="input" if isinstance(module, nn.Embed) else "hidden",
    )


def _einsum_axes(module: nn.Einsum, args: Any, kwargs: Any) -> Axes | None:
    equation = module.einsum_str or kwargs.get("einsum_str") or args[1]
    operands, _, result = equation.replace(" ", "").partition("->")
    inputs, _, kernel = operands.partition(",")
    # By whether an axis of the kernel is one of the inputs, and one of the result.
    parts: dict[tuple[bool, bool], tuple[int, ...]] = collections.defaultdict(tuple)
    for axis, letter in enumerate(kernel):
        parts[letter in inputs, letter in result] += (axis,)
    reads, makes = parts[True, False], parts[False, True]
    if "." in kernel or parts[False, False] or not reads or not makes:
        return None
    return Axes(inputs=reads, outputs=makes, batch=parts[True, True])


def _tuple(x: Any) -> tuple[int, ...]:
    return tuple(x) if isinstance(x, Iterable) else (x,)


class _Reader:
    """Takes parameters and the notes among them apart."""

    def __init__(self) -> None:
        self.layers: dict[str, Layer] = {}
        self.stacked: dict[str, tuple[int, ...]] = {}
        self.stacks: dict[str, int] = {}
        self.unknown: list[str] = []

    def read(self, params: Mapping[str, Any], path: tuple[str, ...], depth: int) -> None:
        """Reads the parameters below `path`, a module around which there are `depth` stacked axes."""
        notes = {}
        for key, value in params.items():
            name, mark, number = key.partition(_MARK)
            if mark:
                notes[name] = (_AXES[int(number)], value.shape)
        if "" in notes:
            inside = len(notes[""][1]) - _MODULE_RANK
            if inside > depth:
                self.stacks["/".join(path)] = inside - depth
            depth = inside
        is_layer = any(axes is not None for axes, _ in notes.values())
        for key, value in params.items():
            if isinstance(value, Mapping):
                self.read(value, (*path, key), depth)
            elif _MARK not in key and hasattr(value, "shape"):
                # The bias of a layer with several output axes is no matrix.
                self._read_one("/".join((*path, key)), value.shape, notes.get(key), is_layer and key == "bias")

    def _read_one(self, name: str, shape: tuple[int, ...], note: Any, is_bias: bool) -> None:
        axes, sizes = note or (None, ())
        if len(sizes) != len(shape):
            # A parameter that no module made, or that was reshaped since.
            axes, sizes = None, (0,) * len(shape)
        stacked = self.stacked[name] = tuple(axis for axis, size in enumerate(sizes) if size)
        own = [axis for axis in range(len(shape)) if axis not in stacked]
        if axes is not None:
            placed = {field: tuple(own[i] for i in getattr(axes, field)) for field in _POSITIONS}
            self.layers[name] = Layer(**(vars(axes) | placed), name=name, shape=shape, stacked=stacked)
        elif sum(shape[axis] > 1 for axis in own) > 1 and not is_bias:
            self.unknown.append(name)


_POSITIONS = ("inputs", "outputs", "batch", "window")


def _without_notes(tree: Any) -> Any:
    """Variables as they are without `describe`."""
    if isinstance(tree, Mapping):
        return {name: _without_notes(value) for name, value in tree.items() if _MARK not in name}
    if type(tree) in (list, tuple):
        return type(tree)(map(_without_notes, tree))
    return tree
