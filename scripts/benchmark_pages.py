"""Times a training with memory in huge pages and without (`sigmarep.huge_pages`), by turns.

    python scripts/benchmark_pages.py --config configs/stability/width.py:arm=sigma,width=64,steps=100 [--rounds 3]

Printed for each are the examples or tokens a second over the second half of its steps, the seconds of the whole command,
and the most memory that it had, medians over the rounds; and how many of the metrics differ between the two kinds.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

from absl import flags

from sigmarep import command, huge_pages
from sigmarep.errors import BadInput
from sigmarep.training.metrics import FILE, read_metrics

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CONFIG = flags.DEFINE_string("config", "configs/stability/lm.py", "Configuration file of the training.")
ROUNDS = flags.DEFINE_integer("rounds", 3, "Trainings of each kind.", lower_bound=1)
KINDS = {"without": "0", "huge pages": "1"}


class Training(NamedTuple):
    """The lines of its metrics, the command's seconds, and the most memory of its process, in GiB."""

    lines: list[dict[str, float]]
    seconds: float
    memory: float

    @property
    def speed(self) -> float:
        """Examples or tokens a second, the median of the second half of its logs."""
        every = [value for line in self.lines for name, value in line.items() if name.endswith("_per_second")]
        return statistics.median(every[len(every) // 2 :])


def made(setting: str, folder: str) -> Training:
    """Trains in `folder`, with that value of the setting.

    Raises:
      BadInput: the training failed; what it printed is above.
    """
    begin = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, os.path.join(ROOT, "scripts", "train.py"), "--config", CONFIG.value, "--workdir", folder],
        stdout=subprocess.DEVNULL,
        env={**os.environ, huge_pages.TUNABLES: f"{huge_pages.SETTING}={setting}"},
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise BadInput(f"--config {CONFIG.value}: the training ended with status {process.returncode}")
    lines = read_metrics(os.path.join(folder, FILE))
    return Training(lines, time.monotonic() - begin, usage.ru_maxrss / 2**20)


def main() -> None:
    runs: dict[str, list[Training]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(ROUNDS.value):
            for kind, setting in KINDS.items():
                runs[kind].append(made(setting, os.path.join(folder, f"{kind} {number}")))
    for kind, trainings in runs.items():
        speed, seconds, memory = (
            statistics.median(values)
            for values in zip(*((each.speed, each.seconds, each.memory) for each in trainings), strict=True)
        )
        print(f"{kind}: {speed:.4g} a second, {seconds:.3g} s in all, {memory:.2f} GiB")
    pairs = list(zip(*runs.values(), strict=True))
    print(f"ratio of the speeds, by rounds: {', '.join(f'{fast.speed / slow.speed:.2f}' for slow, fast in pairs)}")
    lines = [both for slow, fast in pairs for both in zip(slow.lines, fast.lines, strict=True)]
    names = [(one[name], two.get(name)) for one, two in lines for name in one if not name.endswith("_per_second")]
    print(f"other metrics that differ: {sum(one != two for one, two in names)} of {len(names)}")


if __name__ == "__main__":
    command.run(main)
