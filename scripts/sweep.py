"""Makes every run of a configuration file's `sweep()`, on this machine or on a cluster.

    python scripts/sweep.py --config configs/stability/vit.py --workdir runs/stability_vit [--jobs 2] [--dry_run]
    python scripts/sweep.py … --vectorize 32                      # on a GPU: 32 runs of one program at a time
    python scripts/sweep.py … --launcher slurm --option gpus-per-node=1 --option time=12:00:00
    python scripts/sweep.py … --launcher skypilot --option accelerators=tpu-v5litepod-16 --option bucket=gs://NAME
    python scripts/sweep.py … --search optuna --trials 40         # the file's search() instead, run by run
    python scripts/sweep.py … --table
    python scripts/sweep.py --config configs/stability/width.py:size=gpu …      # sweep("size=gpu")

Each run has its own folder, where log.txt has its output, and is what scripts/train.py makes alone. A process makes
runs one after another, first those of one program, which differ in seed and rates alone; --jobs is the number of
processes. On an accelerator a process makes several runs of one program together where that is faster, by jax.vmap on one
device, each with its own data order, metrics, checkpoints and end; with --vectorize N up to N. Runs that are
done or diverged are not repeated; runs that failed or were stopped are. The processes share compiled programs
(JAX_COMPILATION_CACHE_DIR). `--dry_run` prints the files and commands of a launch without writing or running anything;
`--table` prints the states of the runs. See docs/launch.md.

With --search optuna the runs are not listed but chosen, in the space that the file's function search() gives, from what the
runs before have shown; those that do worse than the median are ended early. The same command goes on with the search.

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
    "Number of processes at a time; locally half the cores by default, one on an accelerator or with --vectorize.",
    lower_bound=1,
)
VECTORIZE = flags.DEFINE_string(
    "vectorize",
    "auto",
    "Most runs of one program that a process makes together; auto: 1 on CPUs, measured on an accelerator.",
)
DRY_RUN = flags.DEFINE_boolean("dry_run", False, "Print the commands without running them.")
LAUNCHER = flags.DEFINE_enum("launcher", "local", launchers.LAUNCHERS, "This machine, or the kind of cluster.")
OPTION = flags.DEFINE_multi_string(
    "option", [], "Option of the launcher, name=value: any option of sbatch; for SkyPilot accelerators, bucket, …"
)
RUN = flags.DEFINE_integer("run", None, "Make only the run of this number, from 0; used by the launchers.")
SEARCH = flags.DEFINE_enum(
    "search", None, ["optuna"], "Choose the runs one after another, in the space of the file's function search()."
)
TRIALS = flags.DEFINE_integer(
    "trials", None, "Number of runs of a search, those of earlier starts among them.", lower_bound=1
)
TABLE = flags.DEFINE_boolean("table", False, "Print the states of the runs without making any.")

TRAIN = os.path.join(os.path.dirname(__file__), "train.py")


def main() -> None:
    from sigmarep import sweeps

    given, workdir = command.required("config", CONFIG.value), command.required("workdir", WORKDIR.value)
    # What stands behind the colon is handed to sweep() or search().
    path, _, text = given.partition(":")
    if not os.path.isfile(path):
        raise BadInput(f"--config {path}: there is no such file")
    module, most = command.load_config_file(path), vectorized(VECTORIZE.value)
    if SEARCH.value:
        search(module, path, text, workdir)
        return
    if TRIALS.value:
        raise BadInput(f"--trials {TRIALS.value}: needs --search optuna")
    runs = sweeps.runs(path, listed(module, "sweep", given, text), workdir, TRAIN, imports=command.imports())
    if TABLE.value:
        for row in sweeps.table(runs, workdir):
            print("{:40} {:10} {:>8} {:>10}".format(*row))
        return
    if RUN.value is not None:
        if not 0 <= RUN.value < len(runs):
            raise BadInput(f"--run {RUN.value}: expected a number from 0 to {len(runs) - 1}")
        runs = [runs[RUN.value]]
    elif LAUNCHER.value != "local":
        if (most or 1) > 1:
            raise BadInput(f"--vectorize {most}: needs --launcher local; {LAUNCHER.value} starts each run alone")
        launch(runs, given, workdir)
        return
    if DRY_RUN.value:
        for run in runs:
            print(shlex.join(run.command))
        return
    prepare(workdir)
    jobs = JOBS.value or (1 if (most or 1) > 1 else None)
    record = sweeps.execute(
        runs,
        workdir,
        jobs=jobs,
        say=lambda text: print(text, flush=True),
        environment=sweeps.environment_of(workdir, jobs or 1),
        vectorize=most,
    )
    if RUN.value is not None and record[runs[0].name]["state"] == "stopped":
        sys.exit(143)
    end([record[run.name]["state"] for run in runs])


def vectorized(given: str) -> int | None:
    """The value of --vectorize, None for auto."""
    if given == "auto":
        return None
    if not given.isdecimal() or int(given) < 1:
        raise BadInput(f"--vectorize {given}: expected auto or a number from 1")
    return int(given)


def listed(module, name: str, given: str, text: str):
    """The result of a file's function `sweep` or `search`, called with what stands behind the colon of --config."""
    path = given.partition(":")[0]
    if not hasattr(module, name):
        raise BadInput(f"--config {path}: has no function {name}()")
    function = getattr(module, name)
    if text and not inspect.signature(function).parameters:
        raise BadInput(f"--config {given}: its {name}() takes no argument; leave out {text!r}")
    return function(text) if text else function()


def prepare(workdir: str) -> None:
    """Makes the folder of the runs; from here on a signal stops them too."""
    try:
        os.makedirs(workdir, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--workdir {workdir}: cannot be written ({error.strerror}); choose another folder") from error
    command.stop_with_runs()


def end(states: list[str]) -> None:
    """Prints how many runs ended in each state, and exits with 1 if one did not reach its end."""
    from sigmarep import sweeps

    print(", ".join(f"{count} {state}" for state, count in collections.Counter(states).most_common()))
    if set(states) - set(sweeps.FINAL):
        sys.exit(1)


def search(module, path: str, text: str, workdir: str) -> None:
    """Makes the trials of a file's search(), and prints the best."""
    from sigmarep import searches, sweeps

    for flag, unusual in (
        ("dry_run", DRY_RUN.value),
        ("run", RUN.value is not None),
        ("launcher", LAUNCHER.value != "local"),
        ("vectorize", (vectorized(VECTORIZE.value) or 1) > 1),
        ("table", TABLE.value),
    ):
        if unusual:
            raise BadInput(f"--{flag}: does not go with --search, whose runs are chosen one after another")
    if not TRIALS.value:
        raise BadInput("--trials is missing: the number of runs of the search")
    wanted = searches.check(listed(module, "search", f"{path}:{text}", text), path)

    def plan(point, name: str):
        file = sweeps.with_arguments(path, point)
        own = module.get_config(file.partition(":")[2]) if ":" in file else module.get_config()
        more = [searches.with_pruner(own.callbacks)]
        return sweeps.planned_run(name, path, point, workdir, TRAIN, command.imports(), more)

    prepare(workdir)
    trials = searches.Trials(wanted, workdir, TRIALS.value, plan)
    jobs = JOBS.value or sweeps.default_jobs()
    print(f"{TRIALS.value} trials, {trials.finished} finished before, {jobs} at a time", flush=True)
    record = sweeps.execute(
        [],
        workdir,
        jobs=jobs,
        say=lambda text: print(text, flush=True),
        environment=sweeps.environment_of(workdir, jobs),
        source=trials,
    )
    if best := trials.best():
        folder, value, point = best
        setting = ", ".join(
            f"{name} = {each:.4g}" if isinstance(each, float) else f"{name} = {each}" for name, each in point.items()
        )
        print(f"best: {wanted.metric} = {value:.4g} with {setting} ({folder})")
    end([run["state"] for run in record.values()])


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
