"""What an optimised XLA program does: collectives, and operations and bytes with the turns of its loops counted.

XLA's own cost analysis counts the body of a loop once. A loop that `jax.lax.scan` makes turns a constant number of times,
which stands in its condition; here every loop's body is counted that often.
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
    """Of one device and one step: `flops` and `bytes` by the compiler's own count; `turns`, how often its loops' bodies
    were counted, by name; `once`, the same two with every body counted once."""

    flops: float
    bytes: float
    turns: dict[str, int]
    once: tuple[float, float]


class Collective(NamedTuple):
    """`times` collectives of one `kind` a step, `bytes` of their results on one device; in loops those of all turns."""

    kind: str
    times: int
    bytes: int


class _Computation(NamedTuple):
    lines: list[str]
    # Name, type and opcode of each instruction, and what stands behind its opcode.
    instructions: list[tuple[str, str, str, str]]


def collectives(text: str) -> list[Collective]:
    """The collectives of a program by kind, the largest first."""
    computations, entry = _parsed(text)
    found: dict[str, list[int]] = {}
    for name, turns in _turns(computations, entry).items():
        for _, shape, opcode, _ in computations[name].instructions:
            kind = opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                total = found.setdefault(kind, [0, 0])
                total[0] += turns
                total[1] += turns * _size(shape, started=opcode != kind)
    return sorted((Collective(kind, *total) for kind, total in found.items()), key=lambda each: -each.bytes)


def shapes_of(text: str, kind: str) -> list[tuple[int, ...]]:
    """The shapes of the results of every collective of a kind."""
    computations, _ = _parsed(text)
    return [
        tuple(int(n) for n in dims.split(",") if n)
        for computation in computations.values()
        for _, shape, opcode, _ in computation.instructions
        if opcode.removesuffix("-start") == kind
        for _, dims in _SHAPE.findall(shape)
    ]


def costs(text: str, counted: Any) -> Costs:
    """Operations and bytes of a program.

    Args:
      counted: the compiler's analysis of it, as `jax.stages.Compiled.cost_analysis` gives it.
    """
    counted = counted[0] if isinstance(counted, list) else counted or {}
    once = (float(counted.get("flops", 0.0)), float(counted.get("bytes accessed", 0.0)))
    computations, entry = _parsed(text)
    turns = _turns(computations, entry)
    bodies = {name: _bodies(computations, name) for name in (entry, *_all_bodies(computations, entry))}
    repeated = {name: turns[name] for name in bodies if turns[name] > 1}
    if not repeated:
        return Costs(*once, turns={}, once=once)
    whole = {name: _analysed(text, name) for name in bodies}
    if any(each is None for each in whole.values()):
        return Costs(*once, turns={}, once=once)
    found: list[float] = []
    for i in range(2):
        sizes = {name: each[i] for name, each in whole.items() if each is not None}
        total = sum(turns[name] * (sizes[name] - sum(sizes[body] for body, _ in bodies[name])) for name in bodies)
        # The analysis here knows no padding of a device's tiles; the compiler's own count of the whole does.
        found.append(once[i] * total / sizes[entry] if sizes[entry] else once[i])
    return Costs(found[0], found[1], turns=repeated, once=once)


def _parsed(text: str) -> tuple[dict[str, _Computation], str]:
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
            found = _INSTRUCTION.match(re.sub(r"/\*.*?\*/", "", line))
            if found:
                current.instructions.append((found[1], found[2], found[3], found[4]))
            if line == "}":
                current = None
    return computations, entry


def _bodies(computations: dict[str, _Computation], name: str) -> list[tuple[str, int]]:
    """The loops of a computation and of what it calls, but not those in their bodies: (body, turns)."""
    found = []
    for called, turns in _callees(computations[name], computations):
        found += [(called, turns)] if turns else _bodies(computations, called)
    return found


def _all_bodies(computations: dict[str, _Computation], name: str) -> list[str]:
    found = []
    for body, _ in _bodies(computations, name):
        found += [body, *_all_bodies(computations, body)]
    return list(dict.fromkeys(found))


def _callees(computation: _Computation, computations) -> list[tuple[str, int]]:
    """What a computation calls; with the number of turns for the body of a loop, 0 for anything else."""
    found = []
    for _, _, opcode, rest in computation.instructions:
        for group in _CALLED.findall(rest):
            for name in re.findall(r"[\w.-]+", group):
                if name in computations:
                    found.append((name, _trips(rest, computations) if opcode == "while" else 0))
    return found


def _trips(rest: str, computations: dict[str, _Computation]) -> int:
    known = re.search(r'known_trip_count[^}]*?"n":"(\d+)"', rest)
    if known:
        return int(known[1])
    condition = re.search(r"condition=%?([\w.-]+)", rest)
    lines = computations[condition[1]].lines if condition else []
    limits = [int(n) for line in lines for n in re.findall(r"[su]32\[\]\S* constant\((\d+)\)", line)]
    # A loop whose end is not a constant is counted once.
    return -(-limits[0] // _increment(rest, lines, computations)) if len(limits) == 1 and limits[0] else 1


def _increment(rest: str, condition: list[str], computations: dict[str, _Computation]) -> int:
    """What a loop adds to its counter each turn, if that is a constant: more than 1 where the compiler unrolled it."""
    body = re.search(r"body=%?([\w.-]+)", rest)
    counter = re.findall(r"[su]32\[\]\S* get-tuple-element\(.*index=(\d+)", "\n".join(condition))
    if not body or len(counter) != 1:
        return 1
    instructions = computations[body[1]].instructions
    operands = re.findall(r"%([\w.-]+)", instructions[-1][3].partition(")")[0])
    index = int(counter[0])
    added = {name: rest for name, _, opcode, rest in instructions if opcode == "add"}
    constants = {
        name: int(rest.partition(")")[0])
        for name, shape, opcode, rest in instructions
        if opcode == "constant" and re.match(r"[su]32\[\]", shape)
    }
    terms = re.findall(r"%([\w.-]+)", added.get(operands[index], "").partition(")")[0]) if index < len(operands) else []
    return next((constants[term] for term in terms if constants.get(term)), 1)


def _turns(computations: dict[str, _Computation], entry: str) -> dict[str, int]:
    """How often each computation runs in a step."""
    turns: dict[str, int] = {}

    def visit(name: str, times: int) -> None:
        turns[name] = turns.get(name, 0) + times
        for called, trips in _callees(computations[name], computations):
            visit(called, times * (trips or 1))

    visit(entry, 1)
    return turns


def _size(shape: str, *, started: bool) -> int:
    found = _SHAPE.findall(shape)
    if started:
        # Handles of a permutation stand beside its operand and result.
        found = [(kind, dims) for kind, dims in found if (kind, dims) != ("u32", "")]
    sizes = [BYTES[kind] * math.prod(int(n) for n in dims.split(",") if n) for kind, dims in found]
    # What starts a collective holds its operands before its results.
    return sum(sizes[len(sizes) // 2 :] if started and len(sizes) > 1 else sizes)


def _analysed(text: str, name: str) -> tuple[float, float] | None:
    """Operations and bytes of one computation, the loops in it counted once; None where this jaxlib cannot tell."""
    # Computations stand behind those that they call: what comes after this one is not needed.
    start = re.search(rf"^(?:ENTRY )?%?{re.escape(name)} .*\{{$", text, re.MULTILINE)
    assert start is not None
    end = text.index("\n}", start.start()) + 3
    head = text.index("\n") + 1
    before, itself = text[head : start.start()], text[start.start() : end]
    module = f"HloModule part, is_scheduled=true\n{before}ENTRY {itself.removeprefix('ENTRY ')}"
    try:
        # What jax.stages.Compiled.cost_analysis is made of, with no public name in jaxlib 0.10.
        hlo, xla = importlib.import_module("jaxlib._hlo"), importlib.import_module("jaxlib._jax")
        client = jax.local_devices(backend="cpu")[0].client
        found = xla.hlo_module_cost_analysis(client, hlo.hlo_module_from_text(module))
    except Exception:
        return None
    return float(found["flops"]), float(found["bytes accessed"])
