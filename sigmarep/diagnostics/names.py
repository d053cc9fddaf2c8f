"""Names of layers and runs: grouped, taken apart and shortened."""

import re
from collections.abc import Sequence

BLOCK = re.compile(r"block_(\d+)")


def by_group(names: Sequence[str]) -> dict[str, list[str]]:
    """Groups names that differ in numbers alone: `encoder`, `decoder/cross_attention`, …"""
    grouped: dict[str, list[str]] = {}
    for name in names:
        parts = [part for part in name.split("/") if not BLOCK.fullmatch(part) and not part.isdigit()]
        grouped.setdefault("/".join(parts) or name, []).append(name)
    return grouped


def kind_and_stack(layer: str) -> tuple[str, str]:
    """Splits the name of a layer, without block numbers, into its last part and the stack before it."""
    *stack, kind = [part for part in layer.split("/") if not BLOCK.fullmatch(part)] or [layer]
    return kind, "/".join(stack)


def shortened(name: str, most: int) -> str:
    """The name with its middle left out where it has more than `most` characters."""
    return name if len(name) <= most else f"{name[: most // 2]}…{name[len(name) - most // 2 + 1 :]}"
