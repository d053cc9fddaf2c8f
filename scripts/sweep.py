"""Makes every run of a configuration file's `sweep()`, here or on a cluster.

    python scripts/sweep.py --config configs/stability/vit.py --workdir runs/stability_vit [--jobs 2] [--dry_run]
    python scripts/sweep.py … --launcher slurm --option gpus-per-node=1 --option time=12:00:00
    python scripts/sweep.py … --launcher skypilot --option accelerators=tpu-v5litepod-16 --option bucket=gs://NAME
    python scripts/sweep.py … --table

Each run is scripts/train.py in a folder of its own, with its output in log.txt. Runs that are done or diverged are not
made again; those that failed or were stopped are. Programs that differ in nothing are compiled once
(JAX_COMPILATION_CACHE_DIR). On a machine with one accelerator use --jobs 1. `--dry_run` prints exactly what would be
written and run, `--table` what became of the runs so far. See docs/launch.md.

Exit status: 0 if every run is done or diverged, or was handed to the cluster; 1 if one failed; 143 if stopped, by
Ctrl-C too: the runs save their states first.
"""

import collections
import os
import shlex
import sys

from absl import flags

from sigmarep import command, launchers
from sigmarep.errors import BadInput

CONFIG = flags.DEFINE_string("config", None, "Configuration file with a function sweep().")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of all runs.")
JOBS = flags.DEFINE_integer("jobs", None, "Runs at a time; here half the cores if not given.", lower_bound=1)
DRY_RUN = flags.DEFINE_boolean("dry_run", False, "Prints the commands and runs none.")
LAUNCHER = flags.DEFINE_enum("launcher", "local", launchers.LAUNCHERS, "Where the runs are made.")
OPTION = flags.DEFINE_multi_string(
    "option", [], "Of the launcher, as name=value: any option of sbatch; accelerators, bucket, … of SkyPilot."
)
RUN = flags.DEFINE_integer("run", None, "Makes only the run of this number, from 0; what the launchers start.")
TABLE = flags.DEFINE_boolean("table", False, "Prints what became of the runs and makes none.")


def main() -> None:
    from sigmarep import sweeps

    path, workdir = command.required("config", CONFIG.value), command.required("workdir", WORKDIR.value)
    if not os.path.isfile(path):
        raise BadInput(f"--config {path}: there is no such file")
    module = command.load_config_file(path)
    if not hasattr(module, "sweep"):
        raise BadInput(f"--config {path}: has no function sweep()")
    script = os.path.join(os.path.dirname(__file__), "train.py")
    runs = sweeps.runs(path, module.sweep(), workdir, script, imports=command.imports())
    if TABLE.value:
        for row in sweeps.table(runs, workdir):
            print("{:40} {:10} {:>8} {:>10}".format(*row))
        return
    if RUN.value is not None:
        if not 0 <= RUN.value < len(runs):
            raise BadInput(f"--run {RUN.value}: expected a number from 0 to {len(runs) - 1}")
        runs = [runs[RUN.value]]
    elif LAUNCHER.value != "local":
        launch(runs, path, workdir)
        return
    if DRY_RUN.value:
        for run in runs:
            print(shlex.join(run.command))
        return
    try:
        os.makedirs(workdir, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--workdir {workdir}: cannot be written ({error.strerror}); choose another folder") from error
    command.stop_with_runs()
    record = sweeps.execute(
        runs,
        workdir,
        jobs=JOBS.value or sweeps.default_jobs(),
        say=lambda text: print(text, flush=True),
        environment=sweeps.shared_cache(workdir),
    )
    if RUN.value is not None and record[runs[0].name]["state"] == "stopped":
        sys.exit(143)
    states = collections.Counter(record[run.name]["state"] for run in runs)
    print(", ".join(f"{count} {state}" for state, count in states.most_common()))
    if set(states) - set(sweeps.FINAL):
        sys.exit(1)


def launch(runs, path: str, workdir: str) -> None:
    """Hands the runs that are not final to the cluster."""
    from sigmarep import sweeps

    record, given = sweeps.read_record(workdir), launchers.options(OPTION.value)
    imports = command.imports()
    waiting = [i for i, run in enumerate(runs) if record.get(run.name, {}).get("state") not in sweeps.FINAL]
    if not waiting:
        print(f"{len(runs)} runs, all finished before")
        return
    if LAUNCHER.value == "slurm":
        made = launchers.slurm(path, workdir, waiting, script=__file__, jobs=JOBS.value, given=given, imports=imports)
    else:
        made = launchers.skypilot(path, workdir, waiting, [runs[i].name for i in waiting], given=given, imports=imports)
    if DRY_RUN.value:
        print(launchers.show(made))
        return
    launchers.submit(made)


if __name__ == "__main__":
    command.run(main)
