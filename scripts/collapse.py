"""Runs both arms of configs/collapse.py with three seeds and prints accuracy and attention entropy side by side.

    python scripts/collapse.py --workdir runs/collapse [--seeds 3] [--learning_rate 0.02]

Runs that are finished are not repeated.
"""

import os
import statistics

from absl import flags

from sigmarep import command

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of all runs.")
SEEDS = flags.DEFINE_integer("seeds", 3, "Seeds of each arm.", lower_bound=1)
LEARNING_RATE = flags.DEFINE_float("learning_rate", 0.02, "Peak learning rate of both arms.")
CONFIG = os.path.join(os.path.dirname(__file__), "..", "configs", "collapse.py")


def main() -> None:
    workdir = command.required("workdir", WORKDIR.value)
    from sigmarep.errors import Diverged
    from sigmarep.training.divergence import PREFIX
    from sigmarep.training.loop import train_and_evaluate
    from sigmarep.training.metrics import read_metrics

    module = command.load_config_file(CONFIG)
    print("arm     seed  test accuracy  lowest entropy at the end (layer)  lowest of the run")
    for arm in module.ARMS:
        accuracies, ends = [], []
        for seed in range(SEEDS.value):
            config = module.get_config(f"arm={arm},learning_rate={LEARNING_RATE.value}")
            config.seed = seed
            config.writers.progress = "off"
            folder = os.path.join(workdir, f"{arm}-{LEARNING_RATE.value:g}-{seed}")
            try:
                result = train_and_evaluate(config, folder)
            except Diverged as error:
                print(f"{arm:7} {seed:4}  {error}", flush=True)
                continue
            rows = read_metrics(os.path.join(folder, "metrics.jsonl"))
            last = [row for row in rows if "train/loss" in row][-1]
            layers = {name.removeprefix(PREFIX): value for name, value in last.items() if name.startswith(PREFIX)}
            layer = min(layers, key=lambda name: layers[name])
            accuracies.append(result["eval/test/accuracy"])
            ends.append(layers[layer])
            print(
                f"{arm:7} {seed:4}  {accuracies[-1]:13.1%}  {ends[-1]:8.3f} nats ({layer}) "
                f"{result['attention/entropy_lowest']:14.3f} nats",
                flush=True,
            )
        if accuracies:
            spread = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
            mean = statistics.mean(accuracies)
            print(f"{arm:7} mean  {mean:.1%} ± {spread:.1%}, entropy {min(ends):.3f} to {max(ends):.3f} nats")


if __name__ == "__main__":
    command.run(main)
