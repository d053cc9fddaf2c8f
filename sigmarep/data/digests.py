"""Digests of the contents of many files, remembered for as long as the files do not change."""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Sequence

from sigmarep.files import write_atomically

# A file that was changed less than this before it was read may change again within one tick of the file system's clock.
SETTLED_SECONDS = 2.0
# Bytes read at a time.
BLOCK = 2**20


def content_digests(paths: Sequence[str], memory: str | None) -> dict[str, str]:
    """Hexadecimal SHA-256 of each file's contents; files that cannot be read have none.

    Args:
      paths: the files.
      memory: a file of earlier digests, which is updated where it can be written; None for none. A digest in it holds for
        a file with the same size, inode and times of change.
    """
    earlier = _load(memory)
    digests: dict[str, str] = {}
    records: dict[str, list] = {}
    for path in paths:
        with contextlib.suppress(OSError):
            state = _state(path)
            recorded = earlier.get(path)
            if isinstance(recorded, list) and recorded[:-1] == state:
                digests[path] = recorded[-1]
            else:
                digests[path] = _digest(path)
            if time.time_ns() - max(state[2:]) > SETTLED_SECONDS * 1e9:
                records[path] = [*state, digests[path]]
    if memory is not None and records != earlier:
        with contextlib.suppress(OSError):
            os.makedirs(os.path.dirname(memory), exist_ok=True)
            write_atomically(memory, json.dumps(records))
    return digests


def _load(memory: str | None) -> dict[str, list]:
    try:
        with open(memory or "", encoding="utf-8") as file:
            records = json.load(file)
    except (OSError, ValueError):
        return {}
    return records if isinstance(records, dict) else {}


def _state(path: str) -> list[int]:
    """Size, inode, and the times of the last change of contents and of inode, in ns."""
    status = os.stat(path)
    return [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]


def _digest(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
