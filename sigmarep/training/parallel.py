"""The same training step on many devices: `jit` over a mesh, or replicated under `pmap`.

`jit` is the one to prefer: it shards parameters as well as data and keeps random numbers and losses independent of the
number of devices. `pmap` keeps a whole copy of the state on every device of this process.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, Protocol, Self

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from sigmarep.errors import BadInput
from sigmarep.nn.layers import Layers
from sigmarep.tasks.protocol import AXIS
from sigmarep.training import mesh as meshes
from sigmarep.training.step import StepOutput, TrainState, evaluation_variables


class Runner(Protocol):
    """Runs the step. `state` in its methods is in the runner's own layout; checkpoints and evaluation use the mesh's."""

    mesh: Mesh
    shardings: Any

    def with_inputs(self, *inputs: Any) -> Self:
        """A runner of the same compiled programs that gives the step `inputs`, trees of numbers, after its arguments."""

    def put_state(self, state: TrainState) -> Any:
        """Converts a state from the mesh's layout to the runner's."""

    def get_state(self, state: Any) -> TrainState:
        """Converts a state from the runner's layout to the mesh's."""

    def evaluation_variables(self, state: Any) -> Any:
        """`step.evaluation_variables` of a state in the runner's layout, in the mesh's."""
        return evaluation_variables(self.get_state(state))

    def step(self, state: Any, batch: Any, *, panel: bool) -> tuple[Any, StepOutput]:
        """One training step on this process's rows of the global batch; `state` is consumed."""

    def lower(self, state: Any, batch: Any, *, panel: bool) -> jax.stages.Lowered:
        """The program of `step`, not compiled yet. `state` may be shapes, and then `batch` may be those of a global one."""


def _of_many(step: Callable[..., Any]) -> Callable[..., Any]:
    """The step of several runs: `(states, batches, index, active, panel, inputs) -> (states, outputs)`.

    States, inputs and outputs have the runs as their first axis; the batch of run i is `batches[index[i]]`, or `batches`
    for all where `index` is None. Runs that `active` (runs,) has False for keep their state; None: all are active.
    """

    def step_of_many(states, batches, index, active, panel, inputs):
        if index is not None:
            batches = jax.tree.map(lambda x: x[index], batches)
        new, outputs = jax.vmap(
            lambda state, batch, own: step(state, batch, panel, *own), in_axes=(0, None if index is None else 0, 0)
        )(states, batches, inputs)
        if active is not None:
            new = jax.tree.map(lambda x, y: jnp.where(jnp.expand_dims(active, range(1, x.ndim)), x, y), new, states)
        return new, outputs

    return step_of_many


class JitRunner(Runner):
    """The state and the batch are global arrays over a mesh.

    Attributes:
      inputs: see `with_inputs`.
      step_of_many: compiled, see `_of_many`; for runs on one device.
    """

    def __init__(self, mesh: Mesh, make_step: Callable[..., Any], shardings: Any):
        self.mesh = mesh
        self.shardings = shardings
        self._batch = meshes.batch_sharding(mesh)
        self.inputs: tuple[Any, ...] = ()
        step = make_step(axis_name=None, placed=shardings.params if mesh.shape["data"] > 1 else None)
        self._step = jax.jit(
            step,
            static_argnums=2,
            donate_argnums=0,
            out_shardings=(self.shardings, meshes.replicated(mesh)),
        )
        # Of several runs, on one device: see `_of_many`.
        self.step_of_many = jax.jit(
            _of_many(step), static_argnums=4, donate_argnums=0, out_shardings=meshes.replicated(mesh)
        )

    def with_inputs(self, *inputs):
        other = copy.copy(self)
        other.inputs = inputs
        return other

    def put_state(self, state):
        return state

    def get_state(self, state):
        return state

    def step(self, state, batch, *, panel):
        with meshes.activations_placed(self.mesh):
            return self._step(state, global_batch(batch, self.mesh), panel, *self._on_devices())

    def _on_devices(self) -> tuple[Any, ...]:
        """The inputs as arrays over the mesh; put there once."""
        if any(not isinstance(x, jax.Array) for x in jax.tree.leaves(self.inputs)):
            place = meshes.replicated(self.mesh)
            self.inputs = jax.tree.map(
                lambda x: jax.make_array_from_callback((), place, lambda _: np.asarray(x, np.float32)), self.inputs
            )
        return self.inputs

    def lower(self, state, batch, *, panel):
        inputs = self.inputs
        if _abstract(batch):
            place = meshes.replicated(self.mesh)
            inputs = jax.tree.map(lambda _: jax.ShapeDtypeStruct((), jnp.float32, sharding=place), inputs)
            batch = {
                name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._batch) for name, x in dict(batch).items()
            }
        else:
            batch, inputs = global_batch(batch, self.mesh), self._on_devices()
        with meshes.activations_placed(self.mesh):
            return self._step.lower(state, batch, panel, *inputs)


class PmapRunner(Runner):
    """Every device of this process holds a whole state and an equal share of the batch."""

    def __init__(self, mesh: Mesh, make_step: Callable[..., Any], shardings: Any):
        if mesh.shape["fsdp"] * mesh.shape["tensor"] > 1:
            raise BadInput("config.parallel = 'pmap': keeps whole parameters; set config.mesh.fsdp and .tensor to 1")
        self.mesh = mesh
        self.shardings = shardings
        self._devices = jax.local_devices()
        self._inputs: tuple[Any, ...] = ()
        # The inputs are whole on every device, as one argument.
        step = make_step(axis_name=AXIS)
        self._step = jax.pmap(
            lambda state, batch, panel, inputs: step(state, batch, panel, *inputs),
            axis_name=AXIS,
            static_broadcasted_argnums=2,
            donate_argnums=0,
            in_axes=(0, 0, None, None),
        )

    def with_inputs(self, *inputs):
        other = copy.copy(self)
        other._inputs = jax.tree.map(np.float32, inputs)
        return other

    def put_state(self, state):
        count = len(self._devices)
        return jax.tree.map(lambda x: jnp.broadcast_to(np.asarray(x), (count, *x.shape)), state)

    def get_state(self, state):
        return jax.tree.map(lambda x, sharding: jax.device_put(np.asarray(_first(x)), sharding), state, self.shardings)

    def step(self, state, batch, *, panel):
        state, output = self._step(state, self._split(batch), panel, self._inputs)
        return state, jax.tree.map(_first, output)

    def lower(self, state, batch, *, panel):
        count = len(self._devices)
        if not _abstract(batch):
            return self._step.lower(state, self._split(batch), panel, self._inputs)

        def stacked(x, *shape):
            return jax.ShapeDtypeStruct((count, *shape), x.dtype)

        batch = {name: stacked(x, x.shape[0] // self.mesh.size, *x.shape[1:]) for name, x in batch.items()}
        return self._step.lower(jax.tree.map(lambda x: stacked(x, *x.shape), state), batch, panel, self._inputs)

    def _split(self, batch):
        count = len(self._devices)
        return {name: np.reshape(x, (count, -1, *x.shape[1:])) for name, x in batch.items()}


def _first(x: jax.Array) -> jax.Array:
    """The first device's part of an output of pmap. `x[0]` would be one more program of all devices,
    beside the step's own collectives: XLA once ended a process of eight CPU devices on two busy cores there."""
    return x.addressable_shards[0].data[0]


RUNNERS: dict[str, Callable[..., Runner]] = {"jit": JitRunner, "pmap": PmapRunner}


def create_runner(
    config: ml_collections.ConfigDict,
    make_step: Callable[..., Any],
    abstract_state: Any,
    layers: Layers,
    batch_rows: tuple[int, ...],
    *,
    devices: Sequence[Any] | None = None,
) -> Runner:
    """The runner of `config.parallel` over the mesh of `config.mesh`.

    Args:
      make_step: `make_step(axis_name=…, placed=…)` returns the training step.
      abstract_state: shapes of the state.
      layers: of the model.
      batch_rows: rows that a global batch may have.
      devices: those of all processes if None.

    Raises:
      BadInput: the devices do not fit the mesh, the batch does not divide over them, or a rule finds no array.
    """
    mesh = meshes.create_mesh(config.mesh, devices)
    check_rows(config, batch_rows, mesh, microbatches=config.accumulation)
    rules = meshes.read_rules(config.mesh.rules)
    meshes.check_matches(abstract_state, rules)
    shardings = meshes.state_shardings(abstract_state, mesh, layers, rules)
    return RUNNERS[config.parallel](mesh, make_step, shardings)


def check_rows(
    config: ml_collections.ConfigDict, batch_rows: tuple[int, ...], mesh: Mesh, *, microbatches: int = 1
) -> None:
    """Raises BadInput where a global batch of one of `batch_rows` does not divide over the devices and microbatches."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if microbatches < 1:
        raise BadInput(f"config.accumulation = {microbatches}: expected at least 1")
    odd = [rows for rows in batch_rows if rows < 1 or rows % (shards * microbatches)]
    if odd:
        which = "" if batch_rows == (config.batch_size,) else f", a batch of {odd[0]} rows among it,"
        raise BadInput(
            f"config.batch_size = {config.batch_size}:{which} does not divide over {shards} devices x "
            f"{microbatches} microbatches (config.accumulation); use a multiple of {shards * microbatches}"
        )


def _abstract(batch: Any) -> bool:
    return any(isinstance(x, jax.ShapeDtypeStruct) for x in dict(batch).values())


def global_batch(batch: Any, mesh: Mesh) -> Any:
    """This process's rows (`meshes.input_share`) as part of arrays over all processes."""
    sharding, count = meshes.batch_sharding(mesh), meshes.input_share(mesh).parts

    def one(x):
        x = np.asarray(x)
        return jax.make_array_from_process_local_data(sharding, x, (len(x) * count, *x.shape[1:]))

    return jax.tree.map(one, dict(batch))
