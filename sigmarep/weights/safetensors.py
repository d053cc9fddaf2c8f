"""The safetensors format: a JSON header of names, types and places, then the arrays' bytes. Holds data and no code.

u64 little-endian  size of the header
header             {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, …, "__metadata__": {…}}
bytes              little-endian, in C order
"""

import json
import math
import os
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from sigmarep.files import write_atomically

DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
# Larger headers are of no real file.
MOST_HEADER = 100_000_000


def read(path: str) -> dict[str, np.ndarray]:
    """The arrays of a file by name, mapped from the disk as they are looked at.

    Raises:
      OSError: the file cannot be read.
      ValueError: it is no whole safetensors file.
    """
    header, start, size = _header(path)
    content = np.memmap(path, np.uint8, "r") if size else np.zeros(0, np.uint8)
    arrays = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape = np.dtype(DTYPES[entry["dtype"]]), tuple(entry["shape"])
            first, last = entry["data_offsets"]
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"its header has {name} with a type, shape or place that is none") from None
        whole = all(type(each) is int and each >= 0 for each in (*shape, first, last))
        if not whole or last - first != math.prod(shape) * dtype.itemsize or start + last > size:
            raise ValueError(f"{name} is not whole")
        arrays[name] = content[start + first : start + last].view(dtype).reshape(shape)
    return arrays


def metadata(path: str) -> dict[str, str]:
    """The texts that a file holds besides its arrays. Raises as `read`."""
    texts = _header(path)[0].get("__metadata__", {})
    return texts if isinstance(texts, dict) else {}


def write(path: str, arrays: Mapping[str, np.ndarray], about: Mapping[str, str]) -> None:
    """Writes arrays and texts about them.

    Raises:
      OSError: the file cannot be written.
      KeyError: the format has no such type.
    """
    words = {np.dtype(dtype): word for word, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(about)}
    parts, place = [], 0
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        header[name] = {
            "dtype": words[array.dtype],
            "shape": list(np.shape(arrays[name])),
            "data_offsets": [place, place + array.nbytes],
        }
        parts.append(array.tobytes())
        place += array.nbytes
    text = json.dumps(header).encode()
    # Arrays begin at a multiple of eight bytes.
    text += b" " * (-len(text) % 8)
    write_atomically(path, b"".join([len(text).to_bytes(8, "little"), text, *parts]))


def _header(path: str) -> tuple[dict[str, Any], int, int]:
    """The header, the place of the first array, and the size of the file."""
    size = os.stat(path).st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MOST_HEADER):
            raise ValueError("it is no safetensors file")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError):
            header = None
    if not isinstance(header, dict):
        raise ValueError("it is no safetensors file")
    return header, 8 + length, size
