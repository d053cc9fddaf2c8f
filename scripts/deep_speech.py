"""Trains speech models of 36 post-LN blocks without warmup: every arm of configs/asr/deep.py with several seeds.

    python scripts/deep_speech.py --workdir runs/deep_asr [--seeds 3] [--depth 36] [--steps 300] [--jobs 1]

Prints the loss in nats per label, error rates on the test split (held-out phrases by held-out synthetic voices), and
attention entropy by block after the last step. The runs are an ordinary sweep: scripts/report.py reads its folder, and
finished runs are not repeated.
"""

import os
import statistics

from absl import flags

from sigmarep import command

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of all runs.")
SEEDS = flags.DEFINE_integer("seeds", 3, "Number of seeds of each arm.", lower_bound=1)
DEPTH = flags.DEFINE_integer("depth", 36, "Number of blocks.", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", 300, "Number of training steps.", lower_bound=20)
JOBS = flags.DEFINE_integer("jobs", None, "Number of runs at a time; half the cores by default.", lower_bound=1)
HERE = os.path.dirname(__file__)
CONFIG = os.path.join(HERE, "..", "configs", "asr", "deep.py")


def layers() -> list[int]:
    """Indices of the blocks to print: seven, evenly spaced from the first to the last."""
    return sorted({round(i * (DEPTH.value - 1) / 6) for i in range(7)})


def main() -> None:
    workdir = command.required("workdir", WORKDIR.value)
    from sigmarep import sweeps

    arms = tuple(command.load_config_file(CONFIG).ARMS)
    fixed = sweeps.zipped(sweeps.values("depth", DEPTH.value), sweeps.values("steps", STEPS.value))
    points = sweeps.product(sweeps.values("arm", *arms), fixed, sweeps.seeds(SEEDS.value))
    command.stop_with_runs()
    outcomes = sweeps.compare(CONFIG, points, workdir, os.path.join(HERE, "train.py"), jobs=JOBS.value)
    entropies: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}
    print("| arm | seed | loss at the start | last tenth | test WER | test CER | greedy CER |")
    print("|---|---|---|---|---|---|---|")
    for outcome in outcomes:
        arm, seed = outcome.point["arm"], outcome.point["config.seed"]
        losses = [row["train/loss"] for row in outcome.logged]
        if outcome.state == "diverged":
            print(f"| {arm} | {seed} | diverged at step {outcome.logged[-1]['step']} | | | | |")
            continue
        end = statistics.mean(losses[-max(len(losses) // 10, 1) :])
        entropies[arm].append(outcome.entropies())
        rates = [f"{100 * outcome.evaluation[f'eval/test/{name}']:.1f} %" for name in ("wer", "cer", "greedy_cer")]
        print(f"| {arm} | {seed} | {losses[0]:.3f} | {end:.3f} | {' | '.join(rates)} |")

    print("\nAttention entropy after the last step, nats, mean over heads and seeds, by block:\n")
    print(f"| arm | {' | '.join(str(i + 1) for i in layers())} |\n|---{'|---' * len(layers())}|")
    for arm, ends in entropies.items():
        if ends:
            values = [statistics.mean(each[f"encoder/block_{i}"] for each in ends) for i in layers()]
            print(f"| {arm} | {' | '.join(f'{value:.2f}' for value in values)} |")


if __name__ == "__main__":
    command.run(main)
