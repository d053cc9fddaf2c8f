"""The four arms of the paper's self-supervised comparison at a raised learning rate, several seeds each, on real digits.

    python scripts/ssl_stability.py --workdir runs/ssl_stability [--seeds 3] [--learning_rate 0.01] [--epochs 10]

Every arm is configs/ssl/quickstart.py with one word changed, logged at every step. Runs that are finished are not
repeated. A loss spike is a stretch of steps whose loss is more than a tenth above the mean of the twenty before it.
"""

import os
import statistics

from absl import flags

from sigmarep import command

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of all runs.")
SEEDS = flags.DEFINE_integer("seeds", 3, "Seeds of each arm.", lower_bound=1)
LEARNING_RATE = flags.DEFINE_float("learning_rate", 0.01, "Peak learning rate of all arms.")
EPOCHS = flags.DEFINE_float("epochs", 10.0, "Epochs of every run.")
CONFIG = os.path.join(os.path.dirname(__file__), "..", "configs", "ssl", "quickstart.py")
FIRST_BLOCK = "attention/entropy/vit/encoder/block_0"
WINDOW, MARGIN = 20, 0.1


def spikes(losses: list[float]) -> int:
    """Stretches of losses more than `MARGIN` above the mean of the `WINDOW` before each stretch."""
    count, high = 0, False
    calm: list[float] = []
    for loss in losses:
        above = len(calm) >= WINDOW and not loss <= (1 + MARGIN) * statistics.mean(calm[-WINDOW:])
        count += above and not high
        high = above
        # What is inside a spike is no measure of what is above it.
        if not above:
            calm.append(loss)
    return count


def row(arm: str, seed: int | str, spikes: str, entropy: str, probe: str, knn: str) -> str:
    return f"| {arm:12} | {seed!s:4} | {spikes:6} | {entropy:20} | {probe:24} | {knn:14} |"


def main() -> None:
    workdir = command.required("workdir", WORKDIR.value)
    from sigmarep.errors import Diverged
    from sigmarep.tasks.contrastive import ARMS
    from sigmarep.training.loop import train_and_evaluate
    from sigmarep.training.metrics import read_metrics

    module = command.load_config_file(CONFIG)
    print(row("arm", "seed", "spikes", "lowest entropy 1st", "probe accuracy", "k-NN accuracy"))
    print("|---|---|---|---|---|---|", flush=True)
    for arm in ARMS:
        probes: list[float] = []
        neighbours: list[float] = []
        lowest: list[float] = []
        counts: list[int] = []
        diverged = 0
        for seed in range(SEEDS.value):
            config = module.get_config(f"arm={arm},learning_rate={LEARNING_RATE.value},epochs={EPOCHS.value}")
            config.seed = seed
            config.log_every_steps = 1
            config.writers.progress = "off"
            config.probe.baselines = False
            folder = os.path.join(workdir, f"{arm}-{LEARNING_RATE.value:g}-{EPOCHS.value:g}-{seed}")
            try:
                result = train_and_evaluate(config, folder)
            except Diverged:
                result, diverged = {}, diverged + 1
            logged = [each for each in read_metrics(os.path.join(folder, "metrics.jsonl")) if "train/loss" in each]
            counts.append(spikes([each["train/loss"] for each in logged]))
            lowest.append(min(each[FIRST_BLOCK] for each in logged))
            if result:
                probes.append(result["eval/test/probe_accuracy"])
                neighbours.append(result["eval/test/knn_accuracy"])
            said = (f"{probes[-1]:.1%}", f"{neighbours[-1]:.1%}") if result else ("diverged", "diverged")
            print(row(arm, seed, str(counts[-1]), f"{lowest[-1]:.3f} nats", *said), flush=True)
        entropy = f"{min(lowest):.3f} to {max(lowest):.3f}"
        said = (f"{_spread(probes)}, best {max(probes):.1%}", _spread(neighbours)) if probes else ("none", "none")
        name = arm if not diverged else f"{arm} ({diverged} diverged)"
        print(row(name, "all", str(sum(counts)), entropy, *said), flush=True)


def _spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.1%} ± {deviation:.1%}"


if __name__ == "__main__":
    command.run(main)
