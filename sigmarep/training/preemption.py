"""SIGTERM: note it, let the loop save, and do not wait for a compilation that has nothing to save."""

import contextlib
import signal
import threading

import jax
from jax.experimental import multihost_utils

from sigmarep import signals


class Preemption:
    """While active, SIGTERM is noted; the loop asks `stops_after` after every step.

    Python runs a signal's handler only between its own instructions, so a SIGTERM during a long compilation would go
    unanswered. `sigmarep.signals` ends the process there, if no step was made since the last save.

    Among several processes one may be told before the others. JAX's own listener, which runs since they joined, then
    finds a step that all of them stop after; a compilation is waited for.

    Outside the main thread signals cannot be caught; the object then never fires.
    """

    def __init__(self, exit_status: int):
        self.requested = False
        # True while the process could end this instant and lose nothing.
        self.nothing_to_save = True
        self._exit_status = exit_status
        self._active = contextlib.ExitStack()

    def __enter__(self) -> "Preemption":
        if threading.current_thread() is not threading.main_thread() or jax.process_count() > 1:
            return self
        self._active.enter_context(signals.answered(self._answer))
        self._active.callback(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, self._handle))
        return self

    def __exit__(self, *_):
        self._active.close()

    def stops_after(self, step: int) -> bool:
        """True if the run stops after `step`, the same in every process; to be asked after each."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self.requested

    def _handle(self, *_):
        self.requested = True

    def _answer(self, number: int) -> bool:
        if number == signal.SIGTERM and self.nothing_to_save:
            signals.end("stopped by SIGTERM before the next step: everything made so far is saved", self._exit_status)
        return number == signal.SIGTERM
