"""Signals that are answered at once, also while the main thread runs code that is not Python's, such as a compilation.

Python runs a signal's handler only between its own instructions, and in the main thread. A thread that the signal itself
wakes need not wait, and wakes the main thread: the system may hand the signal to another one, as it does where a stopped
process goes on, and a main thread that waits for a lock would not learn of it.
"""

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

# Takes the number of a signal; True if that is all of the answer.
Answer = Callable[[int], bool]
PARENT = "SIGMAREP_PARENT"
PARENT_SECONDS = 0.2
DEFAULTS: dict[int, Any] = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}

# Interrupts what the main thread waits in; by default a process takes no notice of it.
WAKE = signal.SIGURG

_answers: list[Answer] = []
# Signals that were blocked before a fork.
_masks: list[set[Any]] = []


@contextlib.contextmanager
def answered(answer: Answer) -> Iterator[None]:
    """Calls `answer`, in a thread, for each signal that arrives and has a handler in Python.

    Where it returns False, that of the context around this one is called too. Outside the main thread signals cannot be
    caught, and nothing happens.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _answers.append(answer)
    stop = _listen() if len(_answers) == 1 else None
    try:
        yield
    finally:
        _answers.remove(answer)
        if stop is not None:
            stop()


def _listen() -> Callable[[], None]:
    """Starts the thread; the function returned ends it."""
    woken, wake = socket.socketpair()
    wake.setblocking(False)
    old = signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    # Without a handler in Python it would interrupt nothing.
    handler = signal.signal(WAKE, lambda *_: None)
    main = threading.get_ident()

    def watch() -> None:
        with woken:
            while received := woken.recv(64):
                for number in received:
                    if number != WAKE:
                        signal.pthread_kill(main, WAKE)
                        any(answer(number) for answer in reversed(_answers))

    def stop() -> None:
        signal.set_wakeup_fd(old)
        signal.signal(WAKE, handler or signal.SIG_DFL)
        wake.close()

    threading.Thread(target=watch, daemon=True).start()
    return stop


def _block() -> None:
    if _answers:
        _masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, DEFAULTS))


def _unblock() -> None:
    if _masks:
        signal.pthread_sigmask(signal.SIG_SETMASK, _masks.pop())


def _forget() -> None:
    """Gives a forked process Python's own handlers: it would wake its parent by the signals that it gets itself."""
    if _answers:
        _answers.clear()
        signal.set_wakeup_fd(-1)
        for number, default in {**DEFAULTS, WAKE: signal.SIG_DFL}.items():
            if callable(signal.getsignal(number)):
                signal.signal(number, default)
    _unblock()


os.register_at_fork(before=_block, after_in_parent=_unblock, after_in_child=_forget)


def end(line: str, status: int) -> None:
    """Prints the line to the standard error stream and ends the process at once, whatever its threads do."""
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode(errors="replace"))
    os._exit(status)


def end_with(parent: int) -> None:
    """Ends this process soon after `parent`, the process that started it, has ended in whatever way."""
    _when_ended(parent, lambda: os._exit(128 + signal.SIGTERM))


def end_with_parent() -> None:
    """Sends this process SIGTERM when the one that started it, as `child_environment` says, has ended."""
    parent = os.environ.pop(PARENT, "")
    if parent.isdecimal():
        _when_ended(int(parent), lambda: os.kill(os.getpid(), signal.SIGTERM))


def _when_ended(parent: int, act: Callable[[], object]) -> None:
    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_SECONDS)
        act()

    threading.Thread(target=watch, daemon=True).start()


def child_environment() -> dict[str, str]:
    """Environment variable for children that are to call `end_with_parent`."""
    return {PARENT: str(os.getpid())}
