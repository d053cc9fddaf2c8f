"""Files that several processes share: atomic writes, and locks."""

import contextlib
import fcntl
import os
from collections.abc import Iterator


def write_atomically(path: str, content: bytes | str, *, sync: bool = False) -> None:
    """Replaces the file at `path`: a reader sees the old content or the new one, never a part.

    Args:
      content: bytes, or text that is written as UTF-8.
      sync: return only once the content is on the disk.

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
    """Holds the lock of `path`, the file `<path>.lock` beside it; waits while another process holds it.

    Raises:
      OSError: the folder cannot be made or written.
    """
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(f"{path}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
