"""Digests of the contents of many files, remembered for as long as the files do not change."""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import time
from collections.abc import Sequence

from sigmarep.files import write_atomically

# A file that was changed less than this before it was read may change again within one tick of the file system's clock.
SETTLED_SECONDS = 2.0


def content_digests(paths: Sequence[str], memory: str | None) -> dict[str, str]:
    """Hexadecimal SHA-256 of each file's contents; files that cannot be read have none.

    Args:
      paths: the files.
      memory: a file of earlier digests, which is updated where it can be written; None for none. A digest in it holds for
        a file with the same size, inode and times of change.
    """
    earlier = _load(memory)

    def record(path: str) -> list | None:
        """State and digest of a file, None if it cannot be read."""
        with contextlib.suppress(OSError):
            state, recorded = _state(path), earlier.get(path)
            unchanged = isinstance(recorded, list) and recorded[:-1] == state
            return recorded if unchanged else [*state, _digest(path)]
        return None

    # Hashing leaves the interpreter to other threads.
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        current = {path: each for path, each in zip(paths, pool.map(record, paths), strict=True) if each is not None}
    digests = {path: each[-1] for path, each in current.items()}
    settled = time.time_ns() - SETTLED_SECONDS * 1e9
    records = {path: each for path, each in current.items() if max(each[2:-1]) < settled}
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
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
