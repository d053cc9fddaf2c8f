"""Ahead-of-time compilation of the real training step, for devices that need not be present.

Nothing runs and no data is read: step, mesh and sharding rules are those of training; state and batch are shapes only.
For TPUs the compiler comes from the package libtpu.
"""

import contextlib
import importlib.util
import math
import os
import re
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import ml_collections

from sigmarep.compile import hlo_cost
from sigmarep.errors import BadInput, SigmarepError, one_line
from sigmarep.training.config import validate
from sigmarep.training.experiment import build_program

LOCAL = "local"
GIB = 2**30
_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBIC = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")


class Family(NamedTuple):
    """A generation of TPUs: shapes of its slices, memory of a chip in bytes, and the compiler's options."""

    shapes: tuple[str, ...]
    memory: int
    options: dict[str, Any]


# JAX sees a v4 or v5p chip as one device: its two cores act as one.
MEGACORE = {"chip_config_name": "megacore"}
FAMILIES = {
    "v4": Family(_CUBIC, 32 * GIB, MEGACORE),
    "v5e": Family(_FLAT, 16 * GIB, {}),
    "v5p": Family(_CUBIC, 95 * GIB, MEGACORE),
    "v6e": Family(_FLAT, 32 * GIB, {}),
}


class DoesNotFit(SigmarepError):
    """The step needs more memory than a device has."""


class Target(NamedTuple):
    """Devices to compile for.

    Attributes:
      name: the topology, or "local".
      devices: all of its devices.
      kind: the device's own name.
      memory: bytes per device.
    """

    name: str
    devices: Sequence[Any]
    kind: str
    memory: int


class Memory(NamedTuple):
    """Memory of a step in bytes per device.

    Attributes:
      arguments: the state and the batch.
      outputs: results that do not reuse the memory of the arguments.
      temporaries: intermediate values.
      code: the program itself.
      total: the sum of these.
    """

    arguments: int
    outputs: int
    temporaries: int
    code: int
    total: int


class Compiled(NamedTuple):
    """A compiled training step.

    Attributes:
      mesh: sizes of the mesh axes.
      batch: shapes of the batch it was compiled for, the largest of the task.
      memory: bytes per device.
      costs: operations and bytes of one device; None without a text.
      collectives: communication of one device, by kind.
      seconds: duration of the compilation.
      text: the optimized HLO program; None if this jaxlib cannot print what the compiler, a newer one, has made.
    """

    mesh: dict[str, int]
    batch: dict[str, tuple[int, ...]]
    memory: Memory
    costs: hlo_cost.Costs | None
    collectives: list[hlo_cost.Collective]
    seconds: float
    text: str | None


def target(topology: str) -> Target:
    """Returns the devices of a topology such as "v5e:16x16", or for "local" the devices present.

    Raises:
      BadInput: there is no such topology, or libtpu is not installed.
    """
    if topology == LOCAL:
        devices: list[Any] = jax.devices()
        return Target(LOCAL, devices, str(devices[0].device_kind), _local_memory(devices))
    family, _, shape = topology.partition(":")
    if family not in FAMILIES or shape not in FAMILIES[family].shapes:
        known = "; ".join(f"{name}:{{{','.join(each.shapes)}}}" for name, each in FAMILIES.items())
        raise BadInput(f"--topology {topology}: expected local or one of {known}")
    if importlib.util.find_spec("libtpu") is None:
        raise BadInput(
            f'--topology {topology}: needs the compiler of TPUs; pip install "sigmarep[tpu-compile]" into an environment '
            "of its own (it disturbs runs on CPU)"
        )
    # Off a TPU host there is no metadata server; without these settings libtpu waits for one.
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    # No chip is opened, so several compilations may run at a time.
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-256")
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    try:
        description: Any = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, **FAMILIES[family].options
        )
    except Exception as error:
        raise BadInput(f"--topology {topology}: the compiler does not know it ({one_line(error)})") from error
    return Target(topology, description.devices, description.devices[0].device_kind, FAMILIES[family].memory)


def _local_memory(devices: Sequence[Any]) -> int:
    with contextlib.suppress(Exception):
        return int(devices[0].memory_stats()["bytes_limit"])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(devices)


def compile_step(config: ml_collections.ConfigDict, on: Target, *, panel: bool = False) -> Compiled:
    """Compiles the training step of `config` for the largest batch of its task.

    Args:
      config: of the run.
      on: devices to compile for, see `target`.
      panel: compiles the step that also records attention statistics.

    Raises:
      BadInput: the configuration is invalid, by itself or for these devices.
      DoesNotFit: the step needs more memory than a device has; the message tells what to change.
    """
    config = validate(config)
    if config.parallel != "jit" and on.name != LOCAL:
        raise BadInput(
            f"config.parallel = {config.parallel!r}: expected 'jit' to compile for devices that are not present"
        )
    program = build_program(config, devices=on.devices)
    batch = program.task.abstract_batches()[-1]
    start = time.perf_counter()
    lowered = program.runner.lower(program.abstract_state, batch, panel=panel)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        sizes = re.findall(r"\b(\d+(?:\.\d+)?)([KMG])\b", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or len(sizes) < 2:
            raise
        vmem = r"memory space vmem while allocating on stack for %(\w+).*with size (\S+) and limit (\S+) "
        if kernel := re.search(vmem, str(error), re.DOTALL):
            raise DoesNotFit(
                f"the kernel {kernel[1]} needs {kernel[2]} of a core's own memory, of which {on.name} has {kernel[3]}; for "
                "one of attention set config.model.attention_implementation = 'xla'"
            ) from None
        # The message gives the memory needed first, then the memory available.
        used, available = (float(number) * 1024.0 ** (1 + "KMG".index(unit)) for number, unit in sizes[:2])
        raise DoesNotFit(_advice(config, program, int(used), int(available), on)) from None
    seconds = time.perf_counter() - start
    stats: Any = compiled.memory_analysis()
    arguments, outputs = stats.argument_size_in_bytes, stats.output_size_in_bytes - stats.alias_size_in_bytes
    parts = (arguments, outputs, stats.temp_size_in_bytes, stats.generated_code_size_in_bytes)
    memory = Memory(*parts, total=sum(parts))
    if memory.total > on.memory:
        raise DoesNotFit(_advice(config, program, memory.total, on.memory, on))
    text = program_text(compiled)
    return Compiled(
        mesh=dict(program.runner.mesh.shape),
        batch={name: tuple(x.shape) for name, x in batch.items()},
        memory=memory,
        costs=None if text is None else hlo_cost.costs(text, compiled.cost_analysis()),
        collectives=[] if text is None else hlo_cost.collectives(text),
        seconds=seconds,
        text=text,
    )


def program_text(compiled: jax.stages.Compiled) -> str | None:
    """The optimized HLO program; None if it cannot be printed."""
    try:
        return compiled.as_text() or ""
    except jax.errors.JaxRuntimeError:
        return None


def state_bytes(state: Any) -> int:
    """Bytes that a sharded abstract state takes on one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(state) if x.shape)


def _advice(config, program, used: int, available: int, on: Target) -> str:
    state = state_bytes(program.abstract_state)
    mesh = program.runner.mesh.shape
    need = (
        f"needs {used / GIB:.2f} GiB per device but {on.name} has {available / GIB:.2f} GiB; "
        f"the state takes {state / GIB:.2f} GiB"
    )
    if state > available / 2 and mesh["fsdp"] < math.prod(mesh.values()):
        return f"{need}; increase config.mesh.fsdp from {mesh['fsdp']} to {2 * mesh['fsdp']}, which shards the state"
    if config.get("model", {}).get("remat") == "none":
        return f"{need}; set config.model.remat = 'full', which stores only the inputs of each block"
    if program.task.microbatches:
        return (
            f"{need}; double config.accumulation ({config.accumulation}), or increase config.mesh.tensor from "
            f"{mesh['tensor']} to {2 * mesh['tensor']}, which shards the activations"
        )
    return f"{need}; increase config.mesh.tensor from {mesh['tensor']} to {2 * mesh['tensor']}, or use more devices"
