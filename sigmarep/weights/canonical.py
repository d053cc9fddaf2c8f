"""One form of a model's parameters, whether they are stacked, fused or below another model's name.

A name of this form is the path of a plain parameter with blocks unrolled and projections separate:

    encoder/blocks/attention/qkv/kernel (L, D, 3, N, H)  →  encoder/block_0/attention/query/kernel (D, N, H), …

so weights of a stacked model enter an unrolled one, and the reverse. Only names are there to tell, because a file has
nothing else: those of `sigmarep.nn.TransformerStack` and `sigmarep.nn.MultiHeadAttention`.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

STACK, BLOCK = "blocks", "block_{}"
SLOTS = {"qkv": ("query", "key", "value"), "qk": ("query", "key")}
# The kernel that every ViT has, whatever module it is in.
ANCHOR = "patch_embedding/kernel"


def pieces(path: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Canonical names of the parts of a parameter, each with its index into the array."""
    parts = path.split("/")
    stacked = STACK in parts and len(shape) > 0
    slots = SLOTS.get(parts[-2], ()) if len(parts) > 1 and len(shape) >= 3 + stacked else ()
    for i in range(shape[0]) if stacked else (None,):
        names = [BLOCK.format(i) if part == STACK and stacked else part for part in parts]
        lead = () if i is None else (i,)
        for j, slot in enumerate(slots):
            # Kernels (D, slots, N, H) and biases (slots, N, H) alike.
            yield "/".join([*names[:-2], slot, names[-1]]), (*lead, ..., j, slice(None), slice(None))
        if not slots:
            yield "/".join(names), lead


def split(params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Parameters by path in canonical form."""
    return {
        name: np.asarray(x)[index] if index else np.asarray(x)
        for path, x in params.items()
        for name, index in pieces(path, np.shape(x))
    }


def split_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """`split` of arrays of these shapes: canonical names and shapes."""
    abstract = {path: np.broadcast_to(np.float32(0), shape) for path, shape in shapes.items()}
    return {name: x.shape for name, x in split(abstract).items()}


def assembled(path: str, shape: tuple[int, ...], piece: Callable[[str], np.ndarray]) -> np.ndarray:
    """The parameter whose parts `piece` gives by canonical name, each of its shape."""
    whole = np.empty(shape, np.float32)
    for name, index in pieces(path, shape):
        whole[index] = piece(name)
    return whole


def numbered(name: str) -> tuple[str, str]:
    """The name with {} in place of its block's number, and that number; "" outside of blocks."""
    number = re.search(r"(?<![^/])block_(\d+)/", name)
    return (name, "") if number is None else (name.replace(f"block_{number[1]}/", "block_{}/", 1), number[1])


def depths(names: Mapping[str, Any]) -> dict[str, int]:
    """Number of blocks by the path of the module that they are in."""
    counts: dict[str, int] = {}
    for name in names:
        if match := re.match(r"(?:(.*)/)?block_(\d+)/", name):
            counts[match[1] or ""] = max(counts.get(match[1] or "", 0), int(match[2]) + 1)
    return counts


def root(names: Mapping[str, Any], anchor: str = ANCHOR) -> str | None:
    """The beginning of the names of a ViT's parameters, such as "vit/"; None without one."""
    ends = [name.removesuffix(anchor) for name in sorted(names) if name.endswith(anchor)]
    return ends[0] if ends and (not ends[0] or ends[0][-1] in "/.") else None
