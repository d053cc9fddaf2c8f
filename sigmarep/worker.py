"""The processes of a sweep, from the side of the sweep: each makes runs one after another or
together (`sigmarep.worker_process`)."""

import contextlib
import subprocess
from collections.abc import Generator, Mapping, Sequence
from multiprocessing import Pipe
from typing import Any

from sigmarep import signals

POLL_SECONDS = 0.2
# In place of the exit status of a run that was made together with more others than the device has memory for.
TOO_MANY = -1000


class Worker:
    """A process of `sigmarep.worker_process`, in a process group of its own, so that a terminal's Ctrl-C does not reach it.

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

    def programs(self, arguments: Sequence[Sequence[str]]) -> tuple[list[tuple[str | None, bool]], str] | None:
        """Asks for the programs of runs.

        Returns:
          For each run a name of its program, None for one without a configuration, and True if the program can make several
          runs together on this process's devices; and the kind of these, such as "cpu". None if the process ended.
        """
        return self._ask("programs", arguments)

    def make(self, arguments: Sequence[str], workdir: str, log: str) -> tuple[int, bool]:
        """Makes a run. Returns the exit status that scripts/train.py alone would have, and True if the process goes on."""
        answer = self._ask("run", arguments, workdir, log)
        return (self.close(), False) if answer is None else answer

    def make_together(
        self, runs: Sequence[tuple[Sequence[str], str, str]], width: int
    ) -> Generator[tuple[int, int], None, bool]:
        """Makes runs together, given as arguments, workdir and log, by a program for `width`; yields the number and the
        exit status of each as it ends.

        Returns:
          True if the process goes on.
        """
        left = set(range(len(runs)))
        answer = self._ask("together", runs, width)
        while left and answer is not None:
            left.discard(answer[0])
            yield answer
            answer = self._next_answer()
        if answer is not None:
            return answer[1]
        status = self.close()
        for number in sorted(left):
            yield number, status
        return False

    def _ask(self, *question: Any) -> Any:
        with contextlib.suppress(EOFError, OSError):
            self._connection.send(question)
            return self._next_answer()
        return None

    def _next_answer(self) -> Any:
        with contextlib.suppress(EOFError, OSError):
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
