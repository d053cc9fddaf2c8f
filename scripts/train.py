"""Trains from a configuration file.

    python scripts/train.py --config configs/quickstart.py --workdir runs/quickstart [--config.seed=1 …]
    python scripts/train.py --config configs/quickstart.py --describe      # every field: value, meaning, what is accepted

The same command goes on where it was stopped. On several hosts it is started on each, with the same workdir on storage
that all of them see; see docs/launch.md and --help (--distributed). Exit status: 0 done, 1 failed, 2 bad input,
3 diverged, 143 stopped by SIGTERM or Ctrl-C after saving, 130 by a second Ctrl-C.
"""

import os
import shutil

from absl import flags

from sigmarep import command, signals
from sigmarep.training import process_flags
from sigmarep.training.config import describe, validate

CONFIG = command.define_config_flag()
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; made if missing, resumed if not.")
DESCRIBE = flags.DEFINE_boolean(
    "describe", False, "Prints every field of the configuration with its meaning, and ends."
)
CONNECTION = flags.DEFINE_integer("connection", None, "File descriptor by which scripts/sweep.py hands over its runs.")
process_flags.define()


def main() -> None:
    if CONNECTION.value is not None:
        _prepare()
        from sigmarep import worker_process

        worker_process.serve(CONNECTION.value, train, show)
        return
    config = command.resolved_config(CONFIG)
    if DESCRIBE.value:
        print(describe(validate(config), width=min(shutil.get_terminal_size((100, 0)).columns, 120)))
        return
    workdir = command.required("workdir", WORKDIR.value)
    _prepare()
    train(config, workdir)


def _prepare() -> None:
    command.ctrl_c_is_sigterm()
    signals.end_with_parent()
    from sigmarep.training import processes

    processes.join_by_flags()


def train(config, workdir: str, programs=None) -> None:
    """Makes a run and prints its result."""
    # Importing the trainer starts JAX; a wrong flag should not wait for that.
    from sigmarep.training import processes
    from sigmarep.training.loop import train_and_evaluate

    with processes.ending_together():
        result = train_and_evaluate(config, workdir, programs=programs)
    if not processes.index():
        show(result, workdir)


def show(result, workdir: str) -> None:
    """Prints the result of a run and where its files are."""
    for name, value in result.items():
        if name.startswith("eval/"):
            print(f"{name.removeprefix('eval/').replace('/', ' ')}: {value:.4g}")
    if "attention/entropy_lowest" in result:
        print(
            f"lowest attention entropy: {result['attention/entropy_lowest']:.3g} nats "
            f"(layer {result['attention/entropy_lowest_layer']}, step {result['attention/entropy_lowest_step']})"
        )
    if "stopped_early" in result:
        print(f"stopped early: {result['stopped_early']}")
    if "attention/entropy_nonfinite_step" in result:
        print(f"attention statistics were not finite first at step {result['attention/entropy_nonfinite_step']}")
    for what, where in (("metrics", "metrics.jsonl"), ("checkpoints", "checkpoints"), ("configuration", "config.json")):
        print(f"{what}: {os.path.join(workdir, where)}")


if __name__ == "__main__":
    command.run(main, compiles=True)
