"""Bytes that a compiled step moves to and from the device's main memory.

The compiler's count of accessed bytes has every operand and result of every instruction. On TPUs many of these never leave
the chip: the compiler places them in the memory of the core itself, as the text of the program says by `S(1)` in a buffer's
layout. Main memory is what limits a step whose operations are few, so its traffic is counted here from the text, with the
conventions of XLA's count: a fusion reads its operands and writes its results; of an operand that is only sliced it reads
the slices, and in place of a result that is updated it writes the update.

Buffers have the size of their tiles: `T(8,128)` pads the last two axes of the layout to multiples of 8 and 128.
"""

import functools
import math
import re

from sigmarep.compile import hlo_text
from sigmarep.compile.hlo_text import Computation, Instruction

CONTROL = ("while", "conditional", "call")
# They move nothing themselves.
FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier", "partition-id"),
    *("replica-id", *CONTROL),
}
SLICES = ("dynamic-slice", "slice", "gather")


def main_memory_bytes(text: str) -> float:
    """Bytes that one execution of an optimized HLO program reads from and writes to main memory, loops in full."""
    computations, entry = hlo_text.parse(text)
    counter, executions = _Counter(computations), hlo_text.executions(computations, entry)
    # All others are within an instruction of one of these.
    whole = {entry}
    for computation in computations.values():
        control = [each for each in computation.instructions if each.opcode in CONTROL]
        whole |= {name for name, _ in hlo_text.callees(Computation([], control), computations)}
    return sum(executions[name] * counter.traffic(name) for name in whole)


class _Counter:
    """Counts by computation.

    Args:
      computations: of a program, by name.
    """

    def __init__(self, computations: dict[str, Computation]):
        self._computations = computations
        self._by_name = {
            name: {each.name: each for each in computation.instructions} for name, computation in computations.items()
        }
        self._users: dict[str, dict[str, list[tuple[Instruction, int]]]] = {}

    def traffic(self, name: str) -> float:
        """Bytes of one execution of a computation, without those that it calls."""
        return sum(self._moved(name, each) for each in self._computations[name].instructions)

    def _moved(self, name: str, each: Instruction) -> float:
        if each.opcode in FREE or each.opcode.endswith(("-done", "-update")) or "AllocateBuffer" in each.rest:
            return 0
        known = self._by_name[name]
        operands = [known[operand] for operand in each.operands if operand in known]
        if each.opcode == "fusion":
            return self._of_fusion(each, operands)
        if each.opcode in SLICES:
            # As many bytes are read as the result has, wherever that lies.
            return _bytes(each.shape) + (_bytes(each.shape, everywhere=True) if _bytes(operands[0].shape) else 0)
        if each.opcode == "dynamic-update-slice":
            update = operands[1].shape
            return _bytes(update) + (_bytes(update, everywhere=True) if _bytes(each.shape) else 0)
        read = sum(_bytes(operand.shape) for operand in operands)
        if not each.opcode.endswith("-start"):
            return read + _bytes(each.shape)
        # The start of a transfer has a tuple of its operands, its results, and handles.
        arrays = [match for match in hlo_text.ARRAY.finditer(each.shape) if match[2]]
        results = arrays[len(operands) :]
        if each.opcode == "slice-start":
            read = sum(_size(match) for match in results) if read else 0
        return read + sum(_in_main_memory(match) for match in results)

    def _of_fusion(self, fusion: Instruction, operands: list[Instruction]) -> float:
        inner = fusion.fused
        total = 0.0
        for index, operand in enumerate(operands):
            whole = _bytes(operand.shape)
            read = self._read(inner, self._parameter(inner, index)) if whole else 0
            total += whole if read is None else min(read, whole)
        root = self._computations[inner].root
        results = [match[0] for match in hlo_text.ARRAY.finditer(fusion.shape)]
        values = [self._by_name[inner][each] for each in root.operands] if root.opcode == "tuple" else [root]
        if len(values) != len(results):
            # Tuples within it.
            return total + _bytes(fusion.shape)
        return total + sum(map(functools.partial(self._written, inner), values, results))

    def _parameter(self, name: str, index: int) -> str:
        start = f"{index})"
        return next(
            each.name
            for each in self._computations[name].instructions
            if each.opcode == "parameter" and each.rest.startswith(start)
        )

    def _read(self, name: str, value: str) -> float | None:
        """Bytes of a value that a fused computation reads; None for all of them."""
        if self._computations[name].root.name == value:
            return None
        total = 0.0
        for user, place in self._uses(name).get(value, []):
            part: float | None = None
            if user.opcode == "bitcast":
                part = self._read(name, user.name)
            elif user.opcode in SLICES:
                part = _bytes(user.shape, everywhere=True) if place == 0 else 0
            elif user.opcode == "tuple" or (user.opcode == "dynamic-update-slice" and place == 0):
                part = 0
            elif user.opcode == "fusion":
                parameter = self._parameter(user.fused, place)
                returned = self._behind_bitcasts(user.fused, self._computations[user.fused].root).name == parameter
                part = self._read(name, user.name) if returned else self._read(user.fused, parameter)
            if part is None:
                return None
            total += part
        return total

    def _written(self, name: str, value: Instruction, shape: str) -> float:
        """Bytes that a fused computation writes for a result."""
        whole, value = _bytes(shape), self._behind_bitcasts(name, value)
        if whole and value.opcode == "dynamic-update-slice":
            return min(whole, _bytes(self._by_name[name][value.operands[1]].shape, everywhere=True))
        if whole and value.opcode == "fusion" and self._computations[value.fused].root.opcode != "tuple":
            return min(whole, self._written(value.fused, self._computations[value.fused].root, shape))
        return whole

    def _behind_bitcasts(self, name: str, value: Instruction) -> Instruction:
        while value.opcode == "bitcast":
            value = self._by_name[name][value.operands[0]]
        return value

    def _uses(self, name: str) -> dict[str, list[tuple[Instruction, int]]]:
        if name not in self._users:
            users: dict[str, list[tuple[Instruction, int]]] = {}
            for each in self._computations[name].instructions:
                for place, operand in enumerate(each.operands):
                    users.setdefault(operand, []).append((each, place))
            self._users[name] = users
        return self._users[name]


def _bytes(shape: str, *, everywhere: bool = False) -> float:
    """Bytes of the arrays of a shape: of those in main memory, or of all."""
    return sum(_size(match) if everywhere else _in_main_memory(match) for match in hlo_text.ARRAY.finditer(shape))


def _in_main_memory(array: re.Match[str]) -> float:
    return 0 if re.search(r"S\([1-9]", array[3] or "") else _size(array)


def _size(array: re.Match[str]) -> float:
    kind, dims, layout = array.groups()
    sizes = [int(n) for n in dims.split(",") if n]
    order, _, tiles = (layout or "").partition(":")
    if (tile := re.match(r"T\(([\d,]+)\)", tiles)) and sizes:
        # The tile's last number is for the most minor axis, which the layout names first.
        axes = [int(n) for n in order.split(",")]
        for axis, part in zip(axes, reversed([int(n) for n in tile[1].split(",")]), strict=False):
            sizes[axis] = -(-sizes[axis] // part) * part
    return hlo_text.BYTES[kind] * math.prod(sizes)
