"""Cost of an optimized XLA program: collectives, operations and bytes, with loop bodies counted once per iteration.

XLA's own cost analysis counts the body of a loop once.
"""

import importlib
import math
import re
from typing import Any, NamedTuple

import jax

from sigmarep.compile import hlo_text, memory_traffic

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


class Costs(NamedTuple):
    """Operations and bytes of one step on one device.

    Attributes:
      flops: operations by the compiler's count, loop bodies times their trip counts.
      bytes: bytes accessed by instructions, counted likewise, wherever they lie.
      main_memory: bytes to and from the device's main memory, by another count (`sigmarep.compile.memory_traffic`).
      trip_counts: executions per step of each loop body, by name; empty if no loop could be counted.
      without_loops: (flops, bytes) with every loop body counted once, as XLA reports them.
    """

    flops: float
    bytes: float
    main_memory: float
    trip_counts: dict[str, int]
    without_loops: tuple[float, float]


class Collective(NamedTuple):
    """The collectives of one kind in a step; those in loops count once per iteration.

    Attributes:
      kind: one of `COLLECTIVES`.
      executions: number per step.
      bytes: bytes of their results on one device.
    """

    kind: str
    executions: int
    bytes: int


def collectives(text: str) -> list[Collective]:
    """Collectives of a program by kind, the kind with the most bytes first."""
    computations, entry = hlo_text.parse(text)
    totals: dict[str, list[int]] = {}
    for name, executions in hlo_text.executions(computations, entry).items():
        for _, shape, opcode, _ in computations[name].instructions:
            kind = opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                total = totals.setdefault(kind, [0, 0])
                total[0] += executions
                total[1] += executions * _result_bytes(shape, started=opcode != kind)
    return sorted((Collective(kind, *total) for kind, total in totals.items()), key=lambda each: -each.bytes)


def shapes_of(text: str, kind: str) -> list[tuple[int, ...]]:
    """Shapes of the results of every collective of a kind, in the order of the program."""
    computations, _ = hlo_text.parse(text)
    return [
        tuple(int(n) for n in dims.split(",") if n)
        for computation in computations.values()
        for _, shape, opcode, _ in computation.instructions
        if opcode.removesuffix("-start") == kind
        for _, dims, _ in hlo_text.ARRAY.findall(shape)
    ]


def costs(text: str, analysis: Any) -> Costs:
    """Operations and bytes of a program, with loop bodies counted once per iteration.

    Args:
      text: the optimized HLO program.
      analysis: the compiler's own analysis, the result of `jax.stages.Compiled.cost_analysis`.
    """
    analysis = analysis[0] if isinstance(analysis, list) else analysis or {}
    reported = (float(analysis.get("flops", 0.0)), float(analysis.get("bytes accessed", 0.0)))
    traffic = memory_traffic.main_memory_bytes(text)
    computations, entry = hlo_text.parse(text)
    executions = hlo_text.executions(computations, entry)
    bodies = {
        name: hlo_text.bodies_in(computations, name) for name in (entry, *hlo_text.all_bodies(computations, entry))
    }
    repeated = {name: executions[name] for name in bodies if executions[name] > 1}
    if not repeated:
        return Costs(*reported, traffic, trip_counts={}, without_loops=reported)
    analyses = {}
    for name in bodies:
        analysis = _analyze(text, name)
        if analysis is None:
            return Costs(*reported, traffic, trip_counts={}, without_loops=reported)
        analyses[name] = analysis

    def counted(i: int) -> float:
        sizes = {name: each[i] for name, each in analyses.items()}
        own = {name: sizes[name] - sum(sizes[body] for body, _ in inner) for name, inner in bodies.items()}
        # `_analyze` does not know how the device pads its tiles, the compiler's count of the whole program does: only
        # the ratio is taken from `_analyze`.
        ratio = sum(executions[name] * own[name] for name in bodies) / sizes[entry] if sizes[entry] else 1.0
        return reported[i] * ratio

    return Costs(counted(0), counted(1), traffic, trip_counts=repeated, without_loops=reported)


def _result_bytes(shape: str, *, started: bool) -> int:
    """Bytes of a collective's results. `started` tells that its shape is that of an asynchronous start."""
    arrays = [(kind, dims) for kind, dims, _ in hlo_text.ARRAY.findall(shape)]
    if started:
        # The start of a permutation also returns two scalar handles.
        arrays = [(kind, dims) for kind, dims in arrays if (kind, dims) != ("u32", "")]
    sizes = [hlo_text.BYTES[kind] * math.prod(int(n) for n in dims.split(",") if n) for kind, dims in arrays]
    # The start of a collective returns its operands, followed by its results.
    return sum(sizes[len(sizes) // 2 :] if started and len(sizes) > 1 else sizes)


def _analyze(text: str, name: str) -> tuple[float, float] | None:
    """Operations and bytes of one computation, its loops counted once; None if this jaxlib cannot analyze it."""
    # Computations follow the ones they call, so the text after this one is not needed.
    start = re.search(rf"^(?:ENTRY )?%?{re.escape(name)} .*\{{$", text, re.MULTILINE)
    assert start is not None
    end = text.index("\n}", start.start()) + 3
    head = text.index("\n") + 1
    before, itself = text[head : start.start()], text[start.start() : end]
    module = f"HloModule part, is_scheduled=true\n{before}ENTRY {itself.removeprefix('ENTRY ')}"
    try:
        # jax.stages.Compiled.cost_analysis is built on these; jaxlib 0.10 has no public name for them.
        hlo, xla = importlib.import_module("jaxlib._hlo"), importlib.import_module("jaxlib._jax")
        client = jax.local_devices(backend="cpu")[0].client
        analysis = xla.hlo_module_cost_analysis(client, hlo.hlo_module_from_text(module))
    except Exception:
        return None
    return float(analysis["flops"]), float(analysis["bytes accessed"])
