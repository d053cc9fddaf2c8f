"""Do 36 post-LN blocks learn to hear without warmup? Every arm of configs/asr/deep.py with several seeds.

    python scripts/deep_speech.py --workdir runs/deep_asr [--seeds 3] [--depth 36] [--steps 300]

Loss in nats a label, error rates of the test split (held-out clauses in held-out voices, synthesised), and attention
entropy by block after the last step. Runs that are finished are not repeated.
"""

import os
import statistics

from absl import flags

from sigmarep import command

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of all runs.")
SEEDS = flags.DEFINE_integer("seeds", 3, "Seeds of each arm.", lower_bound=1)
DEPTH = flags.DEFINE_integer("depth", 36, "Blocks.", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", 300, "Training steps.", lower_bound=20)
CONFIG = os.path.join(os.path.dirname(__file__), "..", "configs", "asr", "deep.py")


def layers() -> list[int]:
    """The blocks that are shown: every sixth of them, the first and the last."""
    return sorted({round(i * (DEPTH.value - 1) / 6) for i in range(7)})


def main() -> None:
    workdir = command.required("workdir", WORKDIR.value)
    from sigmarep.errors import Diverged
    from sigmarep.training.divergence import PREFIX
    from sigmarep.training.loop import train_and_evaluate
    from sigmarep.training.metrics import read_metrics

    module = command.load_config_file(CONFIG)
    last: dict[str, list[dict[str, float]]] = {arm: [] for arm in module.ARMS}
    print("| arm | seed | loss at the start | last tenth | test WER | test CER | greedy CER |")
    print("|---|---|---|---|---|---|---|")
    for arm in module.ARMS:
        for seed in range(SEEDS.value):
            config = module.get_config(f"arm={arm},depth={DEPTH.value},steps={STEPS.value}")
            config.seed = seed
            config.writers.progress = "off"
            folder = os.path.join(workdir, f"{arm}-{DEPTH.value}-{STEPS.value}-{seed}")
            try:
                result = train_and_evaluate(config, folder)
            except Diverged as error:
                print(f"| {arm} | {seed} | {error} | | | | |", flush=True)
                continue
            rows = [row for row in read_metrics(os.path.join(folder, "metrics.jsonl")) if "train/loss" in row]
            losses = [row["train/loss"] for row in rows]
            end = statistics.mean(losses[-max(len(losses) // 10, 1) :])
            last[arm].append(rows[-1])
            rates = " | ".join(f"{100 * result[f'eval/test/{name}']:.1f} %" for name in ("wer", "cer", "greedy_cer"))
            print(f"| {arm} | {seed} | {losses[0]:.3f} | {end:.3f} | {rates} |", flush=True)

    print("\nAttention entropy after the last step, nats, mean over heads and seeds, by block:\n")
    print(f"| arm | {' | '.join(str(i + 1) for i in layers())} |\n|---{'|---' * len(layers())}|")
    for arm, found in last.items():
        values = [statistics.mean(row[f"{PREFIX}encoder/block_{i}"] for row in found) for i in layers() if found]
        if values:
            print(f"| {arm} | {' | '.join(f'{value:.2f}' for value in values)} |", flush=True)


if __name__ == "__main__":
    command.run(main)
