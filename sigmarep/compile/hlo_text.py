"""The text of an optimized XLA program: its computations, their instructions, and how often a step executes each.

The trip count of a loop made by `jax.lax.scan` is a constant in the loop's condition.
"""

import re
from typing import NamedTuple

BYTES = {
    **{"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2},
    **{"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8},
}
# An array in a shape: its type, its dimensions and its layout.
ARRAY = re.compile(r"\b(pred|bf16|[suf]\d+|c64)\[([\d,]*)\](?:\{([^}]*)\})?")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][a-z0-9-]*)\((.*)$")
_ROOT = re.compile(r"^\s*ROOT %?([\w.-]+) = ")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|branch_computations|called_computations)=\{?%?([\w.,% -]+)\}?")


class Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    # The text after the opcode: operands and attributes.
    rest: str

    @property
    def operands(self) -> list[str]:
        """Names of the operands."""
        depth = 0
        for i, character in enumerate(self.rest):
            depth += (character in "({[") - (character in ")}]")
            if depth < 0:
                return re.findall(r"%([\w.-]+)", self.rest[:i])
        return []

    @property
    def fused(self) -> str:
        """The name of the computation of a fusion."""
        match = re.search(r"\bcalls=%?([\w.-]+)", self.rest)
        assert match is not None
        return match[1]


class Computation(NamedTuple):
    lines: list[str]
    instructions: list[Instruction]

    @property
    def root(self) -> Instruction:
        """The instruction that makes the result."""
        name = next(match[1] for line in self.lines if (match := _ROOT.match(line)))
        return next(each for each in self.instructions if each.name == name)


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Parses a program into its computations by name; also returns the name of the entry."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head and not line.startswith(("HloModule", " ")):
            current = Computation([], [])
            computations[head[2]] = current
            entry = head[2] if head[1] else entry
        elif current is not None:
            current.lines.append(line)
            instruction = _INSTRUCTION.match(re.sub(r"/\*.*?\*/", "", line))
            if instruction:
                current.instructions.append(Instruction(*instruction.groups()))
            if line == "}":
                current = None
    return computations, entry


def bodies_in(computations: dict[str, Computation], name: str) -> list[tuple[str, int]]:
    """(body, trip count) of the outermost loops of a computation and of the computations that it calls."""
    loops = []
    for callee, trips in callees(computations[name], computations):
        loops += [(callee, trips)] if trips else bodies_in(computations, callee)
    return loops


def all_bodies(computations: dict[str, Computation], name: str) -> list[str]:
    """Bodies of all loops, nested ones included."""
    bodies = []
    for body, _ in bodies_in(computations, name):
        bodies += [body, *all_bodies(computations, body)]
    return list(dict.fromkeys(bodies))


def callees(computation: Computation, computations) -> list[tuple[str, int]]:
    """(name, trip count) of the computations that one calls; the trip count is 0 unless the callee is a loop body."""
    called = []
    for _, _, opcode, rest in computation.instructions:
        for group in _CALLED.findall(rest):
            for name in re.findall(r"[\w.-]+", group):
                if name in computations:
                    called.append((name, trip_count(rest, computations) if opcode == "while" else 0))
    return called


def trip_count(rest: str, computations: dict[str, Computation]) -> int:
    """Iterations of a loop, given its attributes; 1 if the number is not a constant of the program."""
    known = re.search(r'known_trip_count[^}]*?"n":"(\d+)"', rest)
    if known:
        return int(known[1])
    condition = re.search(r"condition=%?([\w.-]+)", rest)
    lines = computations[condition[1]].lines if condition else []
    limits = [int(n) for line in lines for n in re.findall(r"[su]32\[\]\S* constant\((\d+)\)", line)]
    return -(-limits[0] // _increment(rest, lines, computations)) if len(limits) == 1 and limits[0] else 1


def _increment(rest: str, condition: list[str], computations: dict[str, Computation]) -> int:
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


def executions(computations: dict[str, Computation], entry: str) -> dict[str, int]:
    """Number of executions of each computation in a step."""
    counts: dict[str, int] = {}

    def visit(name: str, times: int) -> None:
        counts[name] = counts.get(name, 0) + times
        for callee, trips in callees(computations[name], computations):
            visit(callee, times * (trips or 1))

    visit(entry, 1)
    return counts
