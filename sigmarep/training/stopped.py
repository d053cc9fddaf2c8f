"""`stopped.json` of a workdir: why a callback ended the run."""

import json
import os
from typing import NamedTuple

from sigmarep.files import read_json, write_atomically

FILE = "stopped.json"


class StoppedEarly(NamedTuple):
    """Why a callback ended a run, after `step` of its `total_steps`."""

    step: int
    total_steps: int
    reason: str

    def __str__(self):
        return f"stopped early after step {self.step} of {self.total_steps}: {self.reason}"


def write_stopped(workdir: str, stopped: StoppedEarly) -> None:
    """Notes in the workdir that a callback ended the run, which then counts as finished."""
    write_atomically(os.path.join(workdir, FILE), json.dumps(stopped._asdict()))


def stopped_early(workdir: str) -> StoppedEarly | None:
    """The note of `write_stopped`; None if no callback ended the run."""
    try:
        return StoppedEarly(**read_json(os.path.join(workdir, FILE)))
    except (OSError, ValueError, TypeError):
        return None
