"""Times a sweep with this checkout and with another one by turns, on some runs of some arms; or runs made together.

    git worktree add ../before COMMIT
    python scripts/benchmark_sweep.py --before ../before [--config configs/stability/vit.py] [--arms pre_ln,sigma]
    python scripts/benchmark_sweep.py --vectorize 8 --vectorize 32 [--config configs/stability/lm.py] [--arms sigma]

The third makes that many seeds of each arm together (`scripts/sweep.py --vectorize`), and --runs of them one after another,
on this machine's first device. Printed are seconds of all, with the start and compilation; examples or tokens a second of
all runs over the last steps; and the largest relative difference of the training loss in the first ten steps.

With --before both make the same runs with one worker, from an empty folder. Printed are wall-clock and processor time, and
how long all runs of the file's sweep() would take: that of an arm's first run, which compiles, for each arm, and the mean
of the later ones for each other run. Runs of both whose metrics differ are counted.
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
VECTORIZE = flags.DEFINE_multi_integer("vectorize", [], "Seeds made together, instead of the above.", lower_bound=2)
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


def made(checkout: str, points: list[dict], folder: str, *more: str) -> Cost:
    """Makes the runs of the points in `folder` by scripts/sweep.py of a checkout, with more flags."""
    os.makedirs(folder)
    file = os.path.join(folder, "config.py")
    with open(file, "w") as out:
        out.write(FILE.format(path=os.path.join(checkout, CONFIG.value), points=points))
    begin, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    script, workdir = os.path.join(checkout, "scripts", "sweep.py"), os.path.join(folder, "runs")
    subprocess.run(
        [sys.executable, script, "--config", file, "--workdir", workdir, "--jobs", "1", *more],
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


def speed(folder: str) -> float:
    """Examples or tokens a second at the end of each run, added up."""
    total = 0.0
    for name in os.listdir(folder):
        path = os.path.join(folder, name, "metrics.jsonl")
        if os.path.exists(path):
            with open(path) as lines:
                logged = [row for row in map(json.loads, lines) if "train/loss" in row]
            total += next(value for name, value in logged[-1].items() if "per_second" in name)
    return total


def difference(folder: str, other: str) -> float:
    """Largest relative difference of the training loss of the runs that both folders have, in the first ten steps."""
    ours, theirs = ({name: _losses(each) for name, each in rows(where).items()} for where in (folder, other))
    return max(
        abs(loss - theirs[name][step]) / abs(theirs[name][step])
        for name in ours.keys() & theirs.keys()
        for step, loss in ours[name].items()
    )


def _losses(each: list[dict]) -> dict[int, float]:
    return {row["step"]: float(row["train/loss"]) for row in each if "train/loss" in row and row["step"] <= 10}


def compare_together(arm: str, point: dict, count: int, folder: str) -> None:
    """Makes seeds of a point together, and some of them one after another, and prints how long both take."""
    points = [{**point, "config.seed": seed} for seed in range(count)]
    several, single = os.path.join(folder, f"{arm}{count}"), os.path.join(folder, f"{arm}{count}_alone")
    together = made(ROOT, points, several, "--vectorize", str(count))
    alone = made(ROOT, points[: min(RUNS.value, count)], single)
    whole = alone.first + (count - 1) * alone.later
    # One run at a time has the speed of each.
    fast = speed(os.path.join(several, "runs"))
    slow = speed(os.path.join(single, "runs")) / min(RUNS.value, count)
    unequal = difference(os.path.join(several, "runs"), os.path.join(single, "runs"))
    print(
        f"{arm}, {count} seeds: together {together.wall:.0f} s, {fast:,.0f} a second; one after another {whole:.0f} s "
        f"(first {alone.first:.1f}, later {alone.later:.1f}), {slow:,.0f} a second; {whole / together.wall:.2f} times as "
        f"fast in all, {fast / slow:.2f} times while they train; losses differ by {unequal:.1e}",
        flush=True,
    )


def main() -> None:
    if not os.path.isfile(os.path.join(ROOT, CONFIG.value)):
        raise BadInput(f"--config {CONFIG.value}: there is no such file in {ROOT}")
    everything = command.load_config_file(os.path.join(ROOT, CONFIG.value)).sweep()
    if VECTORIZE.value:
        with tempfile.TemporaryDirectory() as folder:
            for arm in ARMS.value:
                own = [point for point in everything if point.get("arm") == arm]
                if not own:
                    raise BadInput(f"--arms: {CONFIG.value} has no runs of the arm {arm!r}")
                for count in VECTORIZE.value:
                    compare_together(arm, own[len(own) // 2], count, folder)
        return
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
