"""Trains translation models of 100 + 100 blocks: every arm of configs/mt/deep.py with several seeds.

    python scripts/deep_translation.py --workdir runs/deep [--seeds 3] [--depth 100] [--steps 200]

The loss, −ln p per token without label smoothing, is averaged over quarters of the logged steps. For comparison the loss
of the best guess without context is printed, which is the entropy of the training tokens' distribution. Then follow the
attention entropies by block after the last step, and the times to compile the training step at this depth and at 6 + 6
blocks, alternately. The runs are an ordinary sweep: scripts/report.py reads its folder, and finished runs are not
repeated.
"""

import os
import statistics
import time

from absl import flags

from sigmarep import command

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of all runs.")
SEEDS = flags.DEFINE_integer("seeds", 3, "Number of seeds of each arm.", lower_bound=1)
DEPTH = flags.DEFINE_integer("depth", 100, "Number of blocks of the encoder and of the decoder.", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", 200, "Number of training steps.", lower_bound=20)
ROUNDS = flags.DEFINE_integer("rounds", 5, "Number of compilations of each depth; 0 for none.", lower_bound=0)
JOBS = flags.DEFINE_integer("jobs", None, "Number of runs at a time; half the cores by default.", lower_bound=1)
HERE = os.path.dirname(__file__)
CONFIG = os.path.join(HERE, "..", "configs", "mt", "deep.py")
KINDS = {
    "encoder": "encoder/block_{}",
    "decoder, itself": "decoder/block_{}",
    "decoder, encoder": "decoder/block_{}/cross_attention",
}


def context_free_loss(data) -> float:
    """Entropy of the distribution of target tokens in training, including ends of sentences, in nats."""
    import numpy as np

    from sigmarep.data.text.vocabulary import EOS

    corpus = data.corpus
    tokens = np.concatenate([[*corpus.target_ids(i), EOS] for i in range(len(corpus))])
    p = np.unique(tokens, return_counts=True)[1] / len(tokens)
    return float(-np.sum(p * np.log(p)))


def compile_seconds(module, depth: int) -> float:
    import jax

    from sigmarep.training.config import validate
    from sigmarep.training.experiment import build

    experiment = build(validate(module.get_config(f"arm=sigma,depth={depth}")))
    batch = next(experiment.data.train_stream(start=0, process_index=0, process_count=1))
    jax.clear_caches()
    start = time.perf_counter()
    experiment.runner.lower(experiment.abstract_state, batch, panel=False).compile()
    return time.perf_counter() - start


def layers() -> list[int]:
    """Indices of the blocks to print: eleven, evenly spaced from the first to the last."""
    return sorted({round(i * (DEPTH.value - 1) / 10) for i in range(11)})


def main() -> None:
    workdir = command.required("workdir", WORKDIR.value)
    import jax

    from sigmarep import sweeps
    from sigmarep.training.config import validate
    from sigmarep.training.experiment import build

    module = command.load_config_file(CONFIG)
    guess = context_free_loss(build(validate(module.get_config())).data)
    fixed = sweeps.zipped(sweeps.values("depth", DEPTH.value), sweeps.values("steps", STEPS.value))
    points = sweeps.product(sweeps.values("arm", *module.ARMS), fixed, sweeps.seeds(SEEDS.value))
    command.stop_with_runs()
    outcomes = sweeps.compare(CONFIG, points, workdir, os.path.join(HERE, "train.py"), jobs=JOBS.value)
    print(
        f"{DEPTH.value} + {DEPTH.value} blocks, {STEPS.value} steps; the loss of a guess without context: {guess:.3f}\n"
    )
    print(
        "| arm | seed | loss at the start | second quarter | last quarter | below the guess |\n|---|---|---|---|---|---|"
    )
    entropies: dict[str, list[dict[str, float]]] = {arm: [] for arm in module.ARMS}
    for outcome in outcomes:
        arm, seed = outcome.point["arm"], outcome.point["config.seed"]
        if outcome.state == "diverged":
            print(f"| {arm} | {seed} | diverged at step {outcome.logged[-1]['step']} | | | |")
            continue
        losses = [row["train/nll"] for row in outcome.logged]
        quarter = len(losses) // 4
        early, end = (statistics.mean(part) for part in (losses[quarter : 2 * quarter], losses[-quarter:]))
        entropies[arm].append(outcome.entropies())
        print(f"| {arm} | {seed} | {losses[0]:.3f} | {early:.3f} | {end:.3f} | {guess - end:.3f} |")

    print("\nAttention entropy after the last step, nats, mean over heads and seeds, by block:\n")
    print(f"| arm | attention of | {' | '.join(str(i + 1) for i in layers())} |\n|---|---{'|---' * len(layers())}|")
    for arm, ends in entropies.items():
        for kind, name in KINDS.items():
            values = [statistics.mean(each[name.format(i)] for each in ends) for i in layers() if ends]
            if values:
                print(f"| {arm} | {kind} | {' | '.join(f'{value:.2f}' for value in values)} |")

    jax.config.update("jax_enable_compilation_cache", False)
    depths = (6, DEPTH.value)
    seconds = [[compile_seconds(module, depth) for depth in depths] for _ in range(ROUNDS.value)]
    if seconds:
        for depth, each in zip(depths, zip(*seconds, strict=True), strict=True):
            print(f"\ncompiling {depth} + {depth} blocks: {statistics.median(each):.1f} s", end="")
        ratios = [deep / shallow for shallow, deep in seconds]
        print(f"\nratio, median of {len(ratios)} rounds: {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    command.run(main)
