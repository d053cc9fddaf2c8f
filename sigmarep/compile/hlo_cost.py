"""Cost of an optimized XLA program: collectives, operations and bytes, with loop bodies counted once per iteration.

XLA's own cost analysis counts the body of a loop once. The trip count of a loop made by `jax.lax.scan` is a constant in
the loop's condition; here the body is counted that many times.
"""

import importlib
import math
import re
from typing import Any, NamedTuple

import jax

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {
    **{"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2},
    **{"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8},
}
_SHAPE = re.compile(r"\b(pred|bf16|[suf]\d+|c64)\[([\d,]*)\]")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][a-z0-9-]*)\((.*)$")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|branch_computations|called_computations)=\{?%?([\w.,% -]+)\}?")


class Costs(NamedTuple):
    """Operations and bytes of one step on one device.

    Attributes:
      flops: operations by the compiler's count, loop bodies times their trip counts.
      bytes: bytes accessed, counted likewise.
      trip_counts: executions per step of each loop body, by name; empty if no loop could be counted.
      without_loops: (flops, bytes) with every loop body counted once, as XLA reports them.
    """

    flops: float
    bytes: float
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


class _Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    # The text after the opcode: operands and attributes.
    rest: str


class _Computation(NamedTuple):
    lines: list[str]
    instructions: list[_Instruction]


def collectives(text: str) -> list[Collective]:
    """Collectives of a program by kind, the kind with the most bytes first."""
    computations, entry = _parse(text)
    totals: dict[str, list[int]] = {}
    for name, executions in _executions(computations, entry).items():
        for _, shape, opcode, _ in computations[name].instructions:
            kind = opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                total = totals.setdefault(kind, [0, 0])
                total[0] += executions
                total[1] += executions * _result_bytes(shape, started=opcode != kind)
    return sorted((Collective(kind, *total) for kind, total in totals.items()), key=lambda each: -each.bytes)


def shapes_of(text: str, kind: str) -> list[tuple[int, ...]]:
    """Shapes of the results of every collective of a kind, in the order of the program."""
    computations, _ = _parse(text)
    return [
        tuple(int(n) for n in dims.split(",") if n)
        for computation in computations.values()
        for _, shape, opcode, _ in computation.instructions
        if opcode.removesuffix("-start") == kind
        for _, dims in _SHAPE.findall(shape)
    ]


def costs(text: str, analysis: Any) -> Costs:
    """Operations and bytes of a program, with loop bodies counted once per iteration.

    Args:
      text: the optimized HLO program.
      analysis: the compiler's own analysis, the result of `jax.stages.Compiled.cost_analysis`.
    """
    analysis = analysis[0] if isinstance(analysis, list) else analysis or {}
    reported = (float(analysis.get("flops", 0.0)), float(analysis.get("bytes accessed", 0.0)))
    computations, entry = _parse(text)
    executions = _executions(computations, entry)
    bodies = {name: _bodies(computations, name) for name in (entry, *_all_bodies(computations, entry))}
    repeated = {name: executions[name] for name in bodies if executions[name] > 1}
    if not repeated:
        return Costs(*reported, trip_counts={}, without_loops=reported)
    analyses = {}
    for name in bodies:
        analysis = _analyze(text, name)
        if analysis is None:
            return Costs(*reported, trip_counts={}, without_loops=reported)
        analyses[name] = analysis

    def counted(i: int) -> float:
        sizes = {name: each[i] for name, each in analyses.items()}
        own = {name: sizes[name] - sum(sizes[body] for body, _ in inner) for name, inner in bodies.items()}
        # `_analyze` does not know how the device pads its tiles, the compiler's count of the whole program does: only
        # the ratio is taken from `_analyze`.
        ratio = sum(executions[name] * own[name] for name in bodies) / sizes[entry] if sizes[entry] else 1.0
        return reported[i] * ratio

    return Costs(counted(0), counted(1), trip_counts=repeated, without_loops=reported)


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
    """Parses a program into its computations by name; also returns the name of the entry."""
    computations: dict[str, _Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head and not line.startswith(("HloModule", " ")):
            current = _Computation([], [])
            computations[head[2]] = current
            entry = head[2] if head[1] else entry
        elif current is not None:
            current.lines.append(line)
            instruction = _INSTRUCTION.match(re.sub(r"/\*.*?\*/", "", line))
            if instruction:
                current.instructions.append(_Instruction(*instruction.groups()))
            if line == "}":
                current = None
    return computations, entry


def _bodies(computations: dict[str, _Computation], name: str) -> list[tuple[str, int]]:
    """(body, trip count) of the outermost loops of a computation and of the computations that it calls."""
    loops = []
    for callee, trip_count in _callees(computations[name], computations):
        loops += [(callee, trip_count)] if trip_count else _bodies(computations, callee)
    return loops


def _all_bodies(computations: dict[str, _Computation], name: str) -> list[str]:
    """Bodies of all loops, nested ones included."""
    bodies = []
    for body, _ in _bodies(computations, name):
        bodies += [body, *_all_bodies(computations, body)]
    return list(dict.fromkeys(bodies))


def _callees(computation: _Computation, computations) -> list[tuple[str, int]]:
    """(name, trip count) of the computations that one calls; the trip count is 0 unless the callee is a loop body."""
    callees = []
    for _, _, opcode, rest in computation.instructions:
        for group in _CALLED.findall(rest):
            for name in re.findall(r"[\w.-]+", group):
                if name in computations:
                    callees.append((name, _trip_count(rest, computations) if opcode == "while" else 0))
    return callees


def _trip_count(rest: str, computations: dict[str, _Computation]) -> int:
    """Iterations of a loop, given its attributes; 1 if the number is not a constant of the program."""
    known = re.search(r'known_trip_count[^}]*?"n":"(\d+)"', rest)
    if known:
        return int(known[1])
    condition = re.search(r"condition=%?([\w.-]+)", rest)
    lines = computations[condition[1]].lines if condition else []
    limits = [int(n) for line in lines for n in re.findall(r"[su]32\[\]\S* constant\((\d+)\)", line)]
    return -(-limits[0] // _increment(rest, lines, computations)) if len(limits) == 1 and limits[0] else 1


def _increment(rest: str, condition: list[str], computations: dict[str, _Computation]) -> int:
    """Constant by which an iteration increases the loop's counter: above 1 if the compiler unrolled it; 1 if unknown."""
    body = re.search(r"body=%?([\w.-]+)", rest)
    counter = re.findall(r"[su]32\[\]\S* get-tuple-element\(.*index=(\d+)", "\n".join(condition))
    if not body or len(counter) != 1:
        return 1
    instructions = computations[body[1]].instructions
    operands = re.findall(r"%([\w.-]+)", instructions[-1].rest.partition(")")[0])
    index = int(counter[0])
    added = {name: rest for name, _, opcode, rest in instructions if opcode == "add"}
    constants = {
        name: int(rest.partition(")")[0])
        for name, shape, opcode, rest in instructions
        if opcode == "constant" and re.match(r"[su]32\[\]", shape)
    }
    terms = re.findall(r"%([\w.-]+)", added.get(operands[index], "").partition(")")[0]) if index < len(operands) else []
    return next((constants[term] for term in terms if constants.get(term)), 1)


def _executions(computations: dict[str, _Computation], entry: str) -> dict[str, int]:
    """Number of executions of each computation in a step."""
    executions: dict[str, int] = {}

    def visit(name: str, times: int) -> None:
        executions[name] = executions.get(name, 0) + times
        for callee, trip_count in _callees(computations[name], computations):
            visit(callee, times * (trip_count or 1))

    visit(entry, 1)
    return executions


def _result_bytes(shape: str, *, started: bool) -> int:
    """Bytes of a collective's results. `started` tells that its shape is that of an asynchronous start."""
    arrays = _SHAPE.findall(shape)
    if started:
        # The start of a permutation also returns two scalar handles.
        arrays = [(kind, dims) for kind, dims in arrays if (kind, dims) != ("u32", "")]
    sizes = [BYTES[kind] * math.prod(int(n) for n in dims.split(",") if n) for kind, dims in arrays]
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
