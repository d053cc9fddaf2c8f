"""The lock of a workdir: one trainer writes in it at a time; readers need none.

The kernel's lock on the file `.lock` ends with the process that holds it, however that dies, so that a run which was
killed goes on at once. Where the kernel does not carry it, as from another host through some network file systems, the
file itself tells: its owner rewrites it every few seconds.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from sigmarep.errors import BadInput, SigmarepError
from sigmarep.files import read_file

FILE = ".lock"
HEARTBEAT_SECONDS = 5.0
# Without a sign for this long the process of another host counts as dead.
PATIENCE_SECONDS = 30.0


class WorkdirLock:
    """Context in which this process alone trains in a workdir. Of several processes of one run, the first holds it.

    Args:
      workdir: made if missing.
      say: is given one line if the owner of a lock on another host has to be waited for.
      heartbeat, patience: seconds.

    Raises:
      BadInput: on entering, another process trains in it, or the folder cannot be written.
    """

    def __init__(
        self,
        workdir: str,
        *,
        say: Callable[[str], object] = print,
        heartbeat: float = HEARTBEAT_SECONDS,
        patience: float = PATIENCE_SECONDS,
    ):
        self._workdir, self._say = workdir, say
        self._heartbeat, self._patience = heartbeat, patience
        self._descriptor: int | None = None
        self._identity = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "boot": _boot(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        }
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._new_owner: dict[str, Any] | None = None

    def __enter__(self) -> "WorkdirLock":
        # Here, not above: `holder` needs no JAX.
        import jax

        if jax.process_index() != 0:
            return self
        try:
            os.makedirs(self._workdir, exist_ok=True)
            self._descriptor = os.open(os.path.join(self._workdir, FILE), os.O_RDWR | os.O_CREAT, 0o666)
            self._acquire(self._descriptor)
            self._write(0)
        except BaseException as error:
            self._close()
            if isinstance(error, OSError):
                raise BadInput(
                    f"--workdir {self._workdir}: cannot be written ({error.strerror}); choose another folder"
                ) from error
            raise
        # A child process that outlives this one would hold the kernel's lock.
        os.register_at_fork(after_in_child=self._close)
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor is None:
            return
        self._ended.set()
        assert self._thread is not None
        self._thread.join()
        if self._new_owner is None:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, 0)
        self._close()

    def check(self) -> None:
        """Raises SigmarepError if another process has taken the workdir, having had no sign of this one for too long."""
        if self._new_owner is not None:
            raise SigmarepError(
                f"--workdir {self._workdir}: {_name(self._new_owner)} has taken it over, as this process gave no sign "
                f"for {self._patience:g} s; nothing more is written"
            )

    def _acquire(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            kernel_locks = True
        except BlockingIOError:
            raise self._refusal(_owner(self._content())) from None
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL):
                raise BadInput(f"--workdir {self._workdir}: cannot be locked ({error.strerror})") from error
            kernel_locks = False
        owner = _owner(self._content())
        here = all(owner.get(name) == self._identity[name] for name in ("host", "boot"))
        if not owner or (here and (kernel_locks or not _alive(owner.get("pid")))):
            return
        self._wait_for_sign(owner)

    def _wait_for_sign(self, owner: dict[str, Any]) -> None:
        """Returns when the owner has given none for long enough."""
        self._say(
            f"--workdir {self._workdir}: {_name(owner)} held it last; waiting {self._patience:g} s for a sign that it "
            "still does"
        )
        before, end = self._content(), time.monotonic() + self._patience
        while time.monotonic() < end:
            time.sleep(min(self._heartbeat / 5, 1.0))
            content = self._content()
            if not content:
                return
            if content != before:
                raise self._refusal(_owner(content) or owner)

    def _refusal(self, owner: dict[str, Any]) -> BadInput:
        return BadInput(
            f"--workdir {self._workdir}: {_name(owner)} trains in it; wait for its end or stop it, or choose another folder"
        )

    def _content(self) -> bytes:
        # Opened anew each time: a network file system asks the server only then.
        try:
            return read_file(os.path.join(self._workdir, FILE))
        except OSError:
            return b""

    def _write(self, beat: int) -> None:
        assert self._descriptor is not None
        content = json.dumps({**self._identity, "beat": beat}).encode() + b"\n"
        os.pwrite(self._descriptor, content, 0)
        os.ftruncate(self._descriptor, len(content))
        os.fsync(self._descriptor)

    def _beat(self) -> None:
        beat = 0
        while not self._ended.wait(self._heartbeat):
            beat += 1
            owner = _owner(self._content())
            if owner and {**self._identity, "beat": owner.get("beat")} != owner:
                self._new_owner = owner
                return
            # A full disk, for one, must not end the run.
            with contextlib.suppress(OSError):
                self._write(beat)

    def _close(self) -> None:
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.close(self._descriptor)
            self._descriptor = None


def holder(workdir: str) -> str | None:
    """Names the process of this host that trains in a workdir; None if there is none."""
    path = os.path.join(workdir, FILE)
    try:
        owner = _owner(read_file(path))
        with open(path, "rb") as file:
            if (owner.get("host"), owner.get("boot")) != (socket.gethostname(), _boot()) or not _alive(
                owner.get("pid")
            ):
                return None
            # The number may be another process's by now.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _name(owner)
    except OSError:
        return None
    return None


def _owner(content: bytes) -> dict[str, Any]:
    """The process that a lock file names; empty where it names none."""
    try:
        owner = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _name(owner: dict[str, Any]) -> str:
    if not owner:
        return "another process"
    pid, host, since = (" ".join(str(owner.get(name, "unknown")).split())[:80] for name in ("pid", "host", "since"))
    return f"process {pid} on host {host}, started {since},"


def _alive(pid: Any) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, TypeError, ValueError, OverflowError):
        return False
    except OSError:
        return True
    return True


def _boot() -> str:
    """Tells hosts of one name apart, and a host from itself before it was started anew."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return ""
