"""Makes every run of a configuration file's `sweep()`, on this machine or on a cluster.

    python scripts/sweep.py --config configs/stability/vit.py --workdir runs/stability_vit [--jobs 2] [--dry_run]
    python scripts/sweep.py … --vectorize 32                      # on a GPU: 32 runs of one program at a time
    python scripts/sweep.py … --launcher slurm --option gpus-per-node=1 --option time=12:00:00
    python scripts/sweep.py … --launcher skypilot --option accelerators=tpu-v5litepod-16 --option bucket=gs://NAME
    python scripts/sweep.py … --table
    python scripts/sweep.py --config configs/stability/width.py:size=gpu …      # sweep("size=gpu")

Each run has its own folder, where log.txt has its output, and is what scripts/train.py makes alone. A process makes
runs one after another, first those of one program, which differ in seed and rates alone; --jobs is the number of
processes. With --vectorize N a process makes up to N runs of one program together, by jax.vmap on one device, each with
its own data order, metrics, checkpoints and end: for an accelerator that a single small run leaves idle. Runs that are
done or diverged are not repeated; runs that failed or were stopped are. The processes share compiled programs
(JAX_COMPILATION_CACHE_DIR). On a machine with one accelerator use --jobs 1. `--dry_run` prints the files and commands of
a launch without writing or running anything; `--table` prints the states of the runs. See docs/launch.md.

Exit status: 0 if every run is done or diverged, or was submitted to the cluster; 1 if a run failed; 143 if stopped by
SIGTERM or Ctrl-C, after the runs have saved their states.
"""

import collections
import inspect
import os
import shlex
import sys

from absl import flags

from sigmarep import command, launchers
from sigmarep.errors import BadInput

CONFIG = flags.DEFINE_string(
    "config", None, "Configuration file with a function sweep(); what stands behind a colon is its argument."
)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of all runs.")
JOBS = flags.DEFINE_integer(
    "jobs",
    None,
    "Number of processes at a time; locally half the cores by default, one with --vectorize.",
    lower_bound=1,
)
VECTORIZE = flags.DEFINE_integer(
    "vectorize", 1, "Most runs of one program that a process makes together, on an accelerator.", lower_bound=1
)
DRY_RUN = flags.DEFINE_boolean("dry_run", False, "Print the commands without running them.")
LAUNCHER = flags.DEFINE_enum("launcher", "local", launchers.LAUNCHERS, "This machine, or the kind of cluster.")
OPTION = flags.DEFINE_multi_string(
    "option", [], "Option of the launcher, name=value: any option of sbatch; for SkyPilot accelerators, bucket, …"
)
RUN = flags.DEFINE_integer("run", None, "Make only the run of this number, from 0; used by the launchers.")
TABLE = flags.DEFINE_boolean("table", False, "Print the states of the runs without making any.")


def main() -> None:
    from sigmarep import sweeps

    given, workdir = command.required("config", CONFIG.value), command.required("workdir", WORKDIR.value)
    # What stands behind the colon is handed to sweep().
    path, _, text = given.partition(":")
    if not os.path.isfile(path):
        raise BadInput(f"--config {path}: there is no such file")
    module = command.load_config_file(path)
    if not hasattr(module, "sweep"):
        raise BadInput(f"--config {path}: has no function sweep()")
    script = os.path.join(os.path.dirname(__file__), "train.py")
    if text and not inspect.signature(module.sweep).parameters:
        raise BadInput(f"--config {given}: its sweep() takes no argument; leave out {text!r}")
    points = module.sweep(text) if text else module.sweep()
    runs = sweeps.runs(path, points, workdir, script, imports=command.imports())
    if TABLE.value:
        for row in sweeps.table(runs, workdir):
            print("{:40} {:10} {:>8} {:>10}".format(*row))
        return
    if RUN.value is not None:
        if not 0 <= RUN.value < len(runs):
            raise BadInput(f"--run {RUN.value}: expected a number from 0 to {len(runs) - 1}")
        runs = [runs[RUN.value]]
    elif LAUNCHER.value != "local":
        if VECTORIZE.value > 1:
            raise BadInput(
                f"--vectorize {VECTORIZE.value}: needs --launcher local; {LAUNCHER.value} starts each run alone"
            )
        launch(runs, given, workdir)
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
    jobs = JOBS.value or (sweeps.default_jobs() if VECTORIZE.value == 1 else 1)
    record = sweeps.execute(
        runs,
        workdir,
        jobs=jobs,
        say=lambda text: print(text, flush=True),
        environment=sweeps.environment_of(workdir, jobs),
        vectorize=VECTORIZE.value,
    )
    if RUN.value is not None and record[runs[0].name]["state"] == "stopped":
        sys.exit(143)
    states = collections.Counter(record[run.name]["state"] for run in runs)
    print(", ".join(f"{count} {state}" for state, count in states.most_common()))
    if set(states) - set(sweeps.FINAL):
        sys.exit(1)


def launch(runs, path: str, workdir: str) -> None:
    """Submits the runs that are not finished to the cluster."""
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
