"""SIGTERM: note it, let the loop save, and do not wait for a compilation that has nothing to save."""

import os
import signal
import socket
import threading
from collections.abc import Callable

import jax
from jax.experimental import multihost_utils


class Preemption:
    """While active, SIGTERM is noted; the loop asks `stops_after` after every step.

    Python runs a signal's handler only between its own instructions, so a SIGTERM during a long compilation would go
    unanswered. A thread woken by the signal itself ends the process there, if no step was made since the last save.

    Among several processes one may be told before the others. JAX's own listener, which runs since they joined, then
    finds a step that all of them stop after; a compilation is waited for.

    Outside the main thread signals cannot be caught; the object then never fires.
    """

    def __init__(self, exit_status: int):
        self.requested = False
        # True while the process could end this instant and lose nothing.
        self.nothing_to_save = True
        self._exit_status = exit_status
        self._restore: list[Callable[[], object]] = []

    def __enter__(self) -> "Preemption":
        if threading.current_thread() is not threading.main_thread() or jax.process_count() > 1:
            return self
        woken, wake = socket.socketpair()
        wake.setblocking(False)
        old_wakeup = signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        old_handler = signal.signal(signal.SIGTERM, self._handle)
        self._restore = [
            lambda: signal.signal(signal.SIGTERM, old_handler),
            lambda: signal.set_wakeup_fd(old_wakeup),
            wake.close,
        ]
        threading.Thread(target=self._watch, args=(woken,), daemon=True).start()
        return self

    def __exit__(self, *_):
        for restore in self._restore:
            restore()

    def stops_after(self, step: int) -> bool:
        """True if the run stops after `step`, the same in every process; to be asked after each."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self.requested

    def _handle(self, *_):
        self.requested = True

    def _watch(self, woken: socket.socket) -> None:
        with woken:
            while received := woken.recv(64):
                if signal.SIGTERM in received and self.nothing_to_save:
                    os.write(2, b"stopped by SIGTERM before the next step: everything made so far is saved\n")
                    os._exit(self._exit_status)
