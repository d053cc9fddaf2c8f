"""Trains the four arms of the paper's self-supervised comparison on digits, at a raised learning rate, with several seeds.

    python scripts/ssl_stability.py --workdir runs/ssl_stability [--seeds 3] [--learning_rate 0.01] [--epochs 10]

Every arm is configs/ssl/quickstart.py with its argument `arm`, logged at every step. The runs are an ordinary sweep:
scripts/report.py reads its folder, and finished runs are not repeated. A loss spike is a stretch of steps whose loss is
more than a tenth above the mean of the twenty losses before it.
"""

import os
import statistics

from absl import flags

from sigmarep import command

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of all runs.")
SEEDS = flags.DEFINE_integer("seeds", 3, "Number of seeds of each arm.", lower_bound=1)
LEARNING_RATE = flags.DEFINE_float("learning_rate", 0.01, "Peak learning rate of all arms.")
EPOCHS = flags.DEFINE_float("epochs", 10.0, "Length of every run in epochs.")
JOBS = flags.DEFINE_integer("jobs", None, "Number of runs at a time; half the cores by default.", lower_bound=1)
HERE = os.path.dirname(__file__)
CONFIG = os.path.join(HERE, "..", "configs", "ssl", "quickstart.py")
FIRST_BLOCK = "attention/entropy/vit/encoder/block_0"
WINDOW, MARGIN = 20, 0.1


def spikes(losses: list[float]) -> int:
    """Counts stretches of losses that exceed the mean of the `WINDOW` losses before the stretch by more than `MARGIN`."""
    count, high = 0, False
    calm: list[float] = []
    for loss in losses:
        above = len(calm) >= WINDOW and not loss <= (1 + MARGIN) * statistics.mean(calm[-WINDOW:])
        count += above and not high
        high = above
        # Losses of a spike do not raise the mean that later losses are compared with.
        if not above:
            calm.append(loss)
    return count


def row(arm: str, seed: int | str, spikes: str, entropy: str, probe: str, knn: str) -> str:
    return f"| {arm:12} | {seed!s:4} | {spikes:6} | {entropy:20} | {probe:24} | {knn:14} |"


def main() -> None:
    workdir = command.required("workdir", WORKDIR.value)
    from sigmarep import sweeps
    from sigmarep.remedies import SELF_SUPERVISED

    fixed = {
        "learning_rate": LEARNING_RATE.value,
        "epochs": EPOCHS.value,
        "config.log_every_steps": 1,
        "config.probe.baselines": False,
    }
    points = sweeps.product(sweeps.values("arm", *SELF_SUPERVISED), [fixed], sweeps.seeds(SEEDS.value))
    command.stop_with_runs()
    outcomes = sweeps.compare(CONFIG, points, workdir, os.path.join(HERE, "train.py"), jobs=JOBS.value)
    print(row("arm", "seed", "spikes", "lowest entropy 1st", "probe accuracy", "k-NN accuracy"))
    print("|---|---|---|---|---|---|")
    for arm in SELF_SUPERVISED:
        probes: list[float] = []
        neighbors: list[float] = []
        lowest: list[float] = []
        counts: list[int] = []
        diverged = 0
        for outcome in (each for each in outcomes if each.point["arm"] == arm):
            counts.append(spikes([each["train/loss"] for each in outcome.logged]))
            lowest.append(min(each[FIRST_BLOCK] for each in outcome.logged))
            cells = ("diverged", "diverged")
            if outcome.evaluation:
                probes.append(outcome.evaluation["eval/test/probe_accuracy"])
                neighbors.append(outcome.evaluation["eval/test/knn_accuracy"])
                cells = (f"{probes[-1]:.1%}", f"{neighbors[-1]:.1%}")
            else:
                diverged += 1
            print(row(arm, outcome.point["config.seed"], str(counts[-1]), f"{lowest[-1]:.3f} nats", *cells))
        entropy = f"{min(lowest):.3f} to {max(lowest):.3f}"
        cells = (f"{_spread(probes)}, best {max(probes):.1%}", _spread(neighbors)) if probes else ("none", "none")
        name = arm if not diverged else f"{arm} ({diverged} diverged)"
        print(row(name, "all", str(sum(counts)), entropy, *cells))


def _spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.1%} ± {deviation:.1%}"


if __name__ == "__main__":
    command.run(main)
