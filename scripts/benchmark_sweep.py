"""Times a sweep with this checkout and with another one by turns, on some runs of some arms.

    git worktree add ../before COMMIT
    python scripts/benchmark_sweep.py --before ../before [--config configs/stability/vit.py] [--arms pre_ln,sigma]

Both make the same runs with one worker, from an empty folder. Printed are wall-clock and processor time, and how long all
runs of the file's sweep() would take: that of an arm's first run, which compiles, for each arm, and the mean of the later
ones for each other run. Runs of both whose metrics differ are counted.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

from absl import flags

from sigmarep import command
from sigmarep.errors import BadInput

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BEFORE = flags.DEFINE_string("before", None, "Folder of the other checkout; only this one is timed if not given.")
CONFIG = flags.DEFINE_string("config", "configs/stability/vit.py", "Configuration file with arms, in both checkouts.")
ARMS = flags.DEFINE_list("arms", ["pre_ln", "sigma"], "Arms to be made.")
RUNS = flags.DEFINE_integer("runs", 3, "Runs of each arm.", lower_bound=2)
FILE = """
from sigmarep.command import load_config_file

get_config = load_config_file({path!r}).get_config

def sweep():
    return {points!r}
"""


class Cost(NamedTuple):
    """Seconds of one sweep: wall-clock and processor time, and wall-clock time of an arm's first and its later runs."""

    wall: float
    processor: float
    first: float
    later: float


def made(checkout: str, points: list[dict], folder: str) -> Cost:
    """Makes the runs of the points in `folder` by scripts/sweep.py of a checkout."""
    os.makedirs(folder)
    file = os.path.join(folder, "config.py")
    with open(file, "w") as out:
        out.write(FILE.format(path=os.path.join(checkout, CONFIG.value), points=points))
    begin, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    script, workdir = os.path.join(checkout, "scripts", "sweep.py"), os.path.join(folder, "runs")
    subprocess.run(
        [sys.executable, script, "--config", file, "--workdir", workdir, "--jobs", "1"],
        check=True,
        env={**os.environ, "PYTHONPATH": checkout},
    )
    wall, after = time.monotonic() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    with open(os.path.join(workdir, "sweep.json")) as record:
        outcomes = list(json.load(record).values())
    seconds: dict[str, list[float]] = {}
    for each in outcomes:
        seconds.setdefault(each["point"]["arm"], []).append(each["seconds"])
    later = [value for values in seconds.values() for value in values[1:]]
    return Cost(
        wall,
        after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        sum(values[0] for values in seconds.values()) / len(seconds),
        sum(later) / len(later),
    )


def rows(folder: str) -> dict[str, list[dict]]:
    """Rows of metrics by run, without what depends on the clock."""
    result = {}
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name, "metrics.jsonl")
        if os.path.exists(path):
            with open(path) as lines:
                each = [json.loads(line) for line in lines]
            result[name] = [{k: v for k, v in row.items() if "per_second" not in k} for row in each]
    return result


def main() -> None:
    if not os.path.isfile(os.path.join(ROOT, CONFIG.value)):
        raise BadInput(f"--config {CONFIG.value}: there is no such file in {ROOT}")
    everything = command.load_config_file(os.path.join(ROOT, CONFIG.value)).sweep()
    points = []
    for arm in ARMS.value:
        own = [point for point in everything if point.get("arm") == arm]
        if len(own) < RUNS.value:
            raise BadInput(
                f"--arms: {CONFIG.value} has {len(own)} runs of the arm {arm!r}; expected {RUNS.value} or more"
            )
        points += own[:: len(own) // RUNS.value][: RUNS.value]
    arms = len({point["arm"] for point in everything})
    checkouts = {"before": os.path.abspath(BEFORE.value)} if BEFORE.value else {}
    costs = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, checkout in {**checkouts, "now": ROOT}.items():
            cost = costs[name] = made(checkout, points, os.path.join(folder, name))
            # Without one program for an arm all runs cost what the first does or less: a compilation cache is shared.
            whole = arms * cost.first + (len(everything) - arms) * cost.later
            print(
                f"{name}: {len(points)} runs in {cost.wall:.0f} s, {cost.processor:.0f} s of processor time; first run of "
                f"an arm {cost.first:.1f} s, later ones {cost.later:.1f} s; all {len(everything)} runs {whole:.0f} s",
                flush=True,
            )
        if checkouts:
            old, new = (rows(os.path.join(folder, name, "runs")) for name in costs)
            differing = sum(old[name] != new[name] for name in old)
            print(
                f"now/before: {costs['now'].processor / costs['before'].processor:.2f} of the processor time of these runs"
            )
            print(f"{differing} of {len(old)} runs have other metrics than before")


if __name__ == "__main__":
    command.run(main)
