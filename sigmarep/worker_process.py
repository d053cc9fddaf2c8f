"""A process of a sweep: makes runs one after another or together, and compiles what they share once.

The sweep has the other end of its connection (`sigmarep.worker`).
"""

import contextlib
import functools
import gc
import os
import sys
from collections.abc import Callable, Generator, Sequence
from multiprocessing.connection import Connection
from typing import Any

from sigmarep import command
from sigmarep.errors import BadInput, Diverged
from sigmarep.worker import TOO_MANY

# After a run with another status the process ends: memory may be missing, or a signal asked for the end.
GOES_ON = (0, BadInput.exit_status, Diverged.exit_status)


def serve(descriptor: int, train: Callable[..., None], show: Callable[..., None]) -> None:
    """Makes the runs that come by the connection, until it is closed.

    Args:
      descriptor: of the connection.
      train: `train(config, workdir, programs)` makes a run and prints its result.
      show: `show(result, workdir)` prints the result of a run that is made together with others.
    """
    import jax

    from sigmarep.training.experiment import Programs, program_key

    # Processes that a run starts would keep the connection open.
    os.set_inheritable(descriptor, False)
    programs = Programs()

    def program(arguments: Sequence[str]) -> tuple[str | None, bool]:
        configs: list[Any] = []
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
            command.outcome(lambda: configs.append(command.resolve(arguments)))
        if not configs:
            return None, False
        return program_key(configs[0].to_dict()), jax.device_count() == 1 and configs[0].get("parallel") == "jit"

    with Connection(descriptor) as connection, contextlib.suppress(EOFError, OSError):
        while True:
            what, *details = connection.recv()
            if what == "programs":
                connection.send(([program(arguments) for arguments in details[0]], jax.default_backend()))
                continue
            if what == "together":
                status = _together(connection, programs, show, *details)
            else:
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


def _together(
    connection: Connection,
    programs: Any,
    show: Callable[..., None],
    runs: Sequence[tuple[Sequence[str], str, str]],
    width: int,
) -> int:
    """Makes runs together, and sends the number and the exit status of each, or `TOO_MANY`, as it ends.

    Args:
      runs: arguments, workdir and log of each.
      width: see `sigmarep.training.lanes.Group`.

    Returns:
      The first status that is not in `GOES_ON`, 0 if there is none.
    """
    from sigmarep.training.lanes import Group, TooManyRuns
    from sigmarep.training.loop import training
    from sigmarep.training.requests import Steps

    def steps(arguments: Sequence[str], workdir: str, place: Any) -> Steps:
        """Makes a run, and returns its exit status."""
        try:
            result = yield from training(command.resolve(arguments), workdir, programs=programs, place=place)
            show(result, workdir)
            return 0
        except TooManyRuns as error:
            command.status_of(error)
            return TOO_MANY
        except (Exception, SystemExit) as error:
            return command.status_of(error)

    def ended(number: int, status: int) -> None:
        statuses.append(TooManyRuns.exit_status if status == TOO_MANY else status)
        connection.send((number, status))

    statuses: list[int] = []
    group = Group(width)
    # All that is not printed by Python.
    _print_to(runs[0][2])
    with contextlib.ExitStack() as stack:
        lanes = []
        for arguments, workdir, log in runs:
            file = stack.enter_context(open(log, "a", buffering=1))
            lanes.append(_printing_to(file, steps(arguments, workdir, group.lane())))
        group.run(lanes, ended)
    return next((status for status in statuses if status not in GOES_ON), 0)


def _printing_to(file: Any, steps: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
    """The same generator, with all that it prints in a file."""
    resume = functools.partial(steps.send, None)
    try:
        while True:
            try:
                with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                    request = resume()
            except StopIteration as end:
                return end.value
            try:
                answer = yield request
                resume = functools.partial(steps.send, answer)
            except GeneratorExit:
                raise
            except BaseException as error:
                resume = functools.partial(steps.throw, error)
    finally:
        with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            steps.close()


def _print_to(path: str) -> None:
    """Makes a file the end of all that this process prints, also from code that is not Python's."""
    sys.stdout.flush()
    sys.stderr.flush()
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.close(file)
