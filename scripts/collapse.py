"""Trains both arms of configs/collapse.py with three seeds and prints accuracy and attention entropy.

    python scripts/collapse.py --workdir runs/collapse [--seeds 3] [--learning_rate 0.02] [--jobs 1]

The runs are an ordinary sweep: scripts/report.py reads its folder, and finished runs are not repeated.
"""

import os
import statistics

from absl import flags

from sigmarep import command

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of all runs.")
SEEDS = flags.DEFINE_integer("seeds", 3, "Number of seeds of each arm.", lower_bound=1)
LEARNING_RATE = flags.DEFINE_float("learning_rate", 0.02, "Peak learning rate of both arms.")
JOBS = flags.DEFINE_integer("jobs", None, "Number of runs at a time; half the cores by default.", lower_bound=1)
HERE = os.path.dirname(__file__)
CONFIG = os.path.join(HERE, "..", "configs", "collapse.py")


def main() -> None:
    workdir = command.required("workdir", WORKDIR.value)
    from sigmarep import sweeps
    from sigmarep.training.diagnosis import lowest_entropy

    arms = tuple(command.load_config_file(CONFIG).ARMS)
    points = sweeps.product(
        sweeps.values("arm", *arms), sweeps.values("learning_rate", LEARNING_RATE.value), sweeps.seeds(SEEDS.value)
    )
    command.stop_with_runs()
    outcomes = sweeps.compare(CONFIG, points, workdir, os.path.join(HERE, "train.py"), jobs=JOBS.value)
    print("arm     seed  test accuracy  lowest entropy at the end (layer)  lowest of the run")
    for arm in arms:
        accuracies, ends = [], []
        for outcome in (each for each in outcomes if each.point["arm"] == arm):
            seed = outcome.point["config.seed"]
            if outcome.state == "diverged":
                print(f"{arm:7} {seed:4}  diverged at step {outcome.logged[-1]['step']}")
                continue
            entropies = outcome.entropies()
            layer = min(entropies, key=lambda name: entropies[name])
            lowest = lowest_entropy(outcome.logged)
            accuracies.append(outcome.evaluation["eval/test/accuracy"])
            ends.append(entropies[layer])
            print(f"{arm:7} {seed:4}  {accuracies[-1]:13.1%}  {ends[-1]:8.3f} nats ({layer}) {lowest:14.3f} nats")
        if accuracies:
            spread = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
            mean = statistics.mean(accuracies)
            print(f"{arm:7} mean  {mean:.1%} ± {spread:.1%}, entropy {min(ends):.3f} to {max(ends):.3f} nats")


if __name__ == "__main__":
    command.run(main)
