"""Makes every run of a configuration file's `sweep()`, several at a time.

    python scripts/sweep.py --config configs/stability/vit.py --workdir runs/stability_vit [--jobs 2] [--dry_run]

Each run is scripts/train.py in a folder of its own, with its output in log.txt. Runs that are done or diverged are not
made again; those that failed or were stopped are. Programs that differ in nothing are compiled once
(JAX_COMPILATION_CACHE_DIR). On a machine with one accelerator use --jobs 1.

Exit status: 0 if every run is done or diverged, 1 if one failed.
"""

import collections
import os
import shlex
import signal
import sys

from absl import flags

from sigmarep import command
from sigmarep.errors import BadInput

CONFIG = flags.DEFINE_string("config", None, "Configuration file with a function sweep().")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of all runs.")
JOBS = flags.DEFINE_integer("jobs", max((os.cpu_count() or 2) // 2, 1), "Runs at a time.", lower_bound=1)
DRY_RUN = flags.DEFINE_boolean("dry_run", False, "Prints the commands and runs none.")


def main() -> None:
    from sigmarep import sweeps

    path, workdir = command.required("config", CONFIG.value), command.required("workdir", WORKDIR.value)
    if not os.path.isfile(path):
        raise BadInput(f"--config {path}: there is no such file")
    module = command.load_config_file(path)
    if not hasattr(module, "sweep"):
        raise BadInput(f"--config {path}: has no function sweep()")
    runs = sweeps.runs(path, module.sweep(), workdir, os.path.join(os.path.dirname(__file__), "train.py"))
    if DRY_RUN.value:
        for run in runs:
            print(shlex.join(run.command))
        return
    try:
        os.makedirs(workdir, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--workdir {workdir}: cannot be written ({error.strerror}); choose another folder") from error
    # SIGTERM stops the sweep as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    environment = {"JAX_COMPILATION_CACHE_DIR": os.path.join(os.path.abspath(workdir), ".compiled"), **os.environ}
    record = sweeps.execute(
        runs, workdir, jobs=JOBS.value, say=lambda text: print(text, flush=True), environment=environment
    )
    states = collections.Counter(record[run.name]["state"] for run in runs)
    print(", ".join(f"{count} {state}" for state, count in states.most_common()))
    if set(states) - set(sweeps.FINAL):
        sys.exit(1)


if __name__ == "__main__":
    command.run(main)
