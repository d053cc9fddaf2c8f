"""A process of a sweep: makes runs one after another, and compiles what they share once.

The sweep has the other end of its connection (`sigmarep.worker`).
"""

import contextlib
import gc
import os
import sys
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection

from sigmarep import command
from sigmarep.errors import BadInput, Diverged

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
