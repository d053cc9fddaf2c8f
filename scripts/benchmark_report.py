"""Times the report of a large sweep made up for it: 200 runs of 340 metrics at 300 logged steps.

    python scripts/benchmark_report.py [--runs 200] [--blocks 12] [--steps 300] [--repeat 3]

The runs have the metrics that a ViT logs, with random values; those of every other run fall below the level of a collapse.
Each repetition is the whole command, scripts/report.py with as many processes as it chooses. Printed are its wall-clock
time, its processor time, the size of the page, and the load of the machine before it: of a busy one the clock says little.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time

from absl import flags

from sigmarep import command

RUNS = flags.DEFINE_integer("runs", 200, "Runs of the sweep.", lower_bound=2)
BLOCKS = flags.DEFINE_integer("blocks", 12, "Blocks of the encoder, each with 28 metrics.", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", 300, "Logged steps of each run.", lower_bound=2)
REPEAT = flags.DEFINE_integer("repeat", 3, "Repetitions.", lower_bound=1)
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
PER_BLOCK = ("entropy", "entropy_normalised", "bound", "logit_variance", "max_logit", "qk_norm")
HEADS = 4
KERNELS = ("attention/query", "attention/key", "mlp/up")
PER_KERNEL = (
    "spectral/sigma",
    "spectral/gamma",
    "spectral/norm",
    "spectral/stable_rank",
    "gradient/norm",
    "update/ratio",
)


def names(blocks: int) -> list[str]:
    """Names of the metrics that are logged at every step."""
    each = ["train/loss", "train/gradient_norm", "train/learning_rate", "attention/entropy_min"]
    for block in range(blocks):
        layer = f"encoder/block_{block}"
        each += [f"attention/{kind}/{layer}" for kind in PER_BLOCK]
        each += [f"attention/entropy_head/{layer}/{head}" for head in range(HEADS)]
        each += [f"{kind}/{layer}/{kernel}" for kind in PER_KERNEL for kernel in KERNELS]
    return each


def make(folder: str, *, runs: int, blocks: int, steps: int) -> int:
    """Writes a sweep of so many runs, and returns the number of their metrics."""
    import numpy as np

    random, metrics = np.random.default_rng(0), names(blocks)
    falling = np.array([name.startswith("attention/entropy") for name in metrics])
    record = {}
    for run in range(runs):
        arm, rate, seed = ("pre_ln", "sigma")[run % 2], RATES[run // 2 % len(RATES)], run // (2 * len(RATES))
        name = f"arm={arm},learning_rate={rate},seed={seed}"
        values = 1 + 0.1 * random.standard_normal((steps, len(metrics))).cumsum(axis=0).clip(-8, 8) ** 2
        if run % 2 == 0:
            values[:, falling] *= np.linspace(1, 0.01, steps)[:, None]
        os.makedirs(os.path.join(folder, name))
        with open(os.path.join(folder, name, "metrics.jsonl"), "w") as file:
            for i, row in enumerate(values.tolist()):
                file.write(json.dumps({"step": 10 * (i + 1), **dict(zip(metrics, row, strict=True))}) + "\n")
        config = {
            "task": "image_classification",
            "seed": seed,
            "model": {"norm": "pre" if arm == "pre_ln" else "post", "reparam": "none" if arm == "pre_ln" else "sigma"},
            "optimizer": {"learning_rate": rate},
            "total_steps": 10 * steps,
        }
        with open(os.path.join(folder, name, "config.json"), "w") as file:
            json.dump(config, file)
        point = {"arm": arm, "learning_rate": rate, "config.seed": seed}
        record[name] = {"point": point, "state": "done", "status": 0, "seconds": 1.0}
    with open(os.path.join(folder, "sweep.json"), "w") as file:
        json.dump(record, file)
    return len(metrics)


def main() -> None:
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "report.py")
    with tempfile.TemporaryDirectory() as folder:
        sweep, page = os.path.join(folder, "sweep"), os.path.join(folder, "report.html")
        metrics = make(sweep, runs=RUNS.value, blocks=BLOCKS.value, steps=STEPS.value)
        print(f"{RUNS.value} runs of {metrics} metrics at {STEPS.value} steps, {os.cpu_count()} cores", flush=True)
        for _ in range(REPEAT.value):
            load = os.getloadavg()[0]
            start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, script, sweep, "--output", page], check=True, stdout=subprocess.DEVNULL)
            wall, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
            processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            size = os.path.getsize(page) / 1e6
            print(
                f"{wall:.1f} s, {processor:.1f} s of processor time, {size:.2f} MB (load before: {load:.1f})",
                flush=True,
            )


if __name__ == "__main__":
    command.run(main)
