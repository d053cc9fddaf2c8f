"""Files that several processes share, or that anybody may have written: reading, atomic writes, locks."""

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Iterator
from typing import Any, BinaryIO


def shipped(name: str) -> str:
    """The folder `configs` or `scripts`: that of the installed package, or of the checkout that it is part of."""
    package = os.path.dirname(os.path.abspath(__file__))
    inside = os.path.join(package, name)
    return inside if os.path.isdir(inside) else os.path.join(os.path.dirname(package), name)


def is_plain_name(name: str) -> bool:
    """True for the name of a file or folder that leads nowhere but into the folder that it is put in."""
    return name == os.path.basename(name) and name not in ("", ".", "..") and "\0" not in name


def read_file(path: str) -> bytes:
    """The contents of a regular file.

    Raises:
      OSError: there is none, it cannot be read, or it is a pipe or a device, which would be read for ever.
    """
    with open_file(path) as file:
        return file.read()


def open_file(path: str) -> BinaryIO:
    """Opens a regular file for reading.

    Raises:
      OSError: see `read_file`.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(errno.EINVAL, f"{os.path.basename(path)} is no file")
    # Lines of metrics are longer than the usual buffer.
    return open(path, "rb", buffering=2**20)


def read_json(path: str) -> Any:
    """The value that a JSON file holds.

    Raises:
      OSError: see `read_file`.
      ValueError: it is no JSON, or nested too deeply to be read.
    """
    try:
        return json.loads(read_file(path))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def write_atomically(path: str, content: bytes | str, *, sync: bool = False) -> None:
    """Replaces a file so that readers see either the old or the new content, never a part of it.

    Args:
      path: the file.
      content: bytes, or text that is written as UTF-8.
      sync: returns only when the content is on disk.

    Raises:
      OSError: the folder is missing or cannot be written.
    """
    temporary = f"{path}.{os.getpid()}"
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise


@contextlib.contextmanager
def locked(path: str) -> Iterator[None]:
    """Holds the lock of `path`, a file `<path>.lock`, and waits while another process holds it.

    Raises:
      OSError: the folder cannot be created or written.
    """
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(f"{path}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
