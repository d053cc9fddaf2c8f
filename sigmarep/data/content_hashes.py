"""Hashes of files' contents, kept so that a file is read again only when it has changed."""

import concurrent.futures
import hashlib
import json
import os
import time
from collections.abc import Sequence

from sigmarep.files import write_atomically

# A file changed so recently may change once more without its time changing: its hash is not kept.
SETTLED_SECONDS = 2.0

# Hashes by path, each with the file's size and times; as in the files on disk.
_known: dict[str, tuple[list[int], str]] = {}


def hashes(paths: Sequence[str], kept_in: str) -> list[str]:
    """SHA-256 of the contents of files, in hexadecimal.

    Args:
      paths: the files.
      kept_in: a JSON file of hashes by path with size, modification, change time and inode, which is read and renewed.
        Where it cannot be written, hashes are kept for this process alone.

    Raises:
      OSError: a file cannot be read.
    """
    # Paths as JSON can hold them, also those that are not UTF-8.
    names = [os.fsencode(path).hex() for path in paths]
    _known.update(_read(kept_in))
    stamps = [_stamp(path) for path in paths]
    changed = [i for i, name in enumerate(names) if _known.get(name, ([], ""))[0] != stamps[i]]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        new = dict(zip(changed, pool.map(_hash, [paths[i] for i in changed]), strict=True))
    settled_before = (time.time() - SETTLED_SECONDS) * 1e9
    for i, digest in new.items():
        if max(stamps[i][1:3]) < settled_before:
            _known[names[i]] = (stamps[i], digest)
    if new:
        _write(kept_in, {name: _known[name] for name in names if name in _known})
    return [new[i] if i in new else _known[name][1] for i, name in enumerate(names)]


def _stamp(path: str) -> list[int]:
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _hash(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(path: str) -> dict[str, tuple[list[int], str]]:
    try:
        with open(path, encoding="utf-8") as file:
            return {name: (list(stamp), str(digest)) for name, (stamp, digest) in json.load(file).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        # Missing or damaged: the files are read anew.
        return {}


def _write(path: str, known: dict[str, tuple[list[int], str]]) -> None:
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        write_atomically(path, json.dumps(known))
    except OSError:
        pass
