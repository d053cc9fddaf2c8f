"""Atomic writes and locks for files that several processes share."""

import contextlib
import fcntl
import os
from collections.abc import Iterator


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
