"""A process of a sweep: makes runs one after another, and compiles what they share once.

`serve` is its own side of the connection, `Worker` that of the sweep.
"""

import contextlib
import gc
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from sigmarep import command, signals
from sigmarep.errors import BadInput, Diverged

POLL_SECONDS = 0.2
# After a run with another status the process ends: memory may be missing, or a signal asked for the end.
GOES_ON = (0, BadInput.exit_status, Diverged.exit_status)


def serve(descriptor: int, train: Callable[..., None]) -> None:
    """Makes the runs that come by the connection, until it is closed.

    Args:
      descriptor: of the connection.
      train: `train(config, workdir, programs)` makes a run.
    """
    import jax

    from sigmarep.training.experiment import Programs, program_key

    # Processes that a run starts would keep the connection open.
    os.set_inheritable(descriptor, False)
    programs = Programs()

    def key(arguments: Sequence[str]) -> str | None:
        keys: list[str] = []
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
            command.outcome(lambda: keys.append(program_key(command.resolve(arguments).to_dict())))
        return keys[0] if keys else None

    with Connection(descriptor) as connection, contextlib.suppress(EOFError, OSError):
        while True:
            what, *details = connection.recv()
            if what == "keys":
                connection.send([key(arguments) for arguments in details[0]])
                continue
            arguments, workdir, log = details
            _print_to(log)
            status = command.outcome(lambda: train(command.resolve(arguments), workdir, programs))  # noqa: B023
            sys.stdout.flush()
            sys.stderr.flush()
            goes_on = status in GOES_ON and jax.process_count() == 1
            connection.send((status, goes_on))
            if not goes_on:
                sys.exit(status)
            # The state of the run is part of cycles.
            gc.collect()


def _print_to(path: str) -> None:
    """Makes a file the end of all that this process prints, also from code that is not Python's."""
    sys.stdout.flush()
    sys.stderr.flush()
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.close(file)


class Worker:
    """A process of `serve`, in a process group of its own, so that a terminal's Ctrl-C does not reach it.

    Args:
      start: the command, to which the connection is added.
      log: file for what is printed before the first run.
      environment: its environment variables.
    """

    def __init__(self, start: Sequence[str], log: str, environment: Mapping[str, str]):
        self._connection, theirs = Pipe()
        with theirs, open(log, "a") as file:
            descriptor = theirs.fileno()
            self._process = subprocess.Popen(
                [*start, f"--connection={descriptor}"],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**environment, **signals.child_environment()},
                process_group=0,
                pass_fds=[descriptor],
            )

    def keys(self, arguments: Sequence[Sequence[str]]) -> list[str | None] | None:
        """A name for the program of each run, None for those without a configuration; None if the process ended."""
        return self._ask("keys", arguments)

    def make(self, arguments: Sequence[str], workdir: str, log: str) -> tuple[int, bool]:
        """Makes a run. Returns the exit status that scripts/train.py alone would have, and True if the process goes on."""
        answer = self._ask("run", arguments, workdir, log)
        return (self.close(), False) if answer is None else answer

    def _ask(self, *question: Any) -> Any:
        with contextlib.suppress(EOFError, OSError):
            self._connection.send(question)
            # A process that it has started may hold the connection open after its end.
            while not self._connection.poll(POLL_SECONDS):
                if self._process.poll() is not None and not self._connection.poll():
                    return None
            return self._connection.recv()
        return None

    def stop(self) -> None:
        """Sends SIGTERM: the run is saved, and the process ends."""
        self._process.terminate()

    def close(self) -> int:
        """Lets the process end after what it does, and returns its exit status."""
        self._connection.close()
        return self._process.wait()
