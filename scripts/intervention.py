"""Lowers the attention temperature in mid-training and prints entropy and sharpness, with plain pre-LN and with σReparam.

    python scripts/intervention.py --workdir runs/intervention [--seeds 3] [--temperature 0.1] [--plot intervention.png]

Trains both arms of configs/stability/intervention.py. "Before" and "after" are means over the last 25 steps before the
intervention and the first 25 after it. The runs are an ordinary sweep: scripts/report.py reads its folder, and finished
runs are not repeated. A plot needs matplotlib: pip install "sigmarep[report]".
"""

import importlib.util
import os
import statistics

from absl import flags

from sigmarep import command
from sigmarep.errors import BadInput

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of all runs.")
SEEDS = flags.DEFINE_integer("seeds", 3, "Number of seeds of each arm.", lower_bound=1)
TEMPERATURE = flags.DEFINE_float("temperature", 0.1, "Factor on the attention temperature.")
JOBS = flags.DEFINE_integer("jobs", None, "Number of runs at a time; half the cores by default.", lower_bound=1)
PLOT = flags.DEFINE_string("plot", None, "File to draw a plot of the first seed of both arms into.")
HERE = os.path.dirname(__file__)
CONFIG = os.path.join(HERE, "..", "configs", "stability", "intervention.py")
SHOWN = {
    "lowest layer's entropy, nats": "attention/entropy_min",
    "sharpness": "sharpness/hessian",
    "sharpness, preconditioned": "sharpness/preconditioned",
    "loss": "train/loss",
}
WINDOW = 25


def series(rows, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric."""
    pairs = [(row["step"], row[name]) for row in rows if name in row]
    return [step for step, _ in pairs], [value for _, value in pairs]


def draw(path: str, runs, step: int) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 8), layout="constrained")
    panels = figure.subplots(3, 1, sharex=True)
    for color, (arm, rows) in zip(("#d95f02", "#1b6ca8"), runs.items(), strict=True):
        for axes, name in zip(panels, ("sharpness/preconditioned", "attention/entropy_min", "train/loss"), strict=True):
            axes.plot(*series(rows, name), color=color, label=arm)
        limit = series(rows, "sharpness/preconditioned_threshold")
    panels[0].plot(*limit, "k:", label="threshold (2 + 2β₁)/((1 − β₁)η)")
    panels[0].set(yscale="log", ylabel="largest eigenvalue,\npreconditioned Hessian")
    panels[1].set(ylabel="lowest layer's\nattention entropy, nats")
    panels[2].set(yscale="log", ylabel="training loss", xlabel="step")
    for axes in panels:
        axes.axvline(step, color="grey", linewidth=0.8)
    panels[0].legend()
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise BadInput(f"--plot {path}: cannot be written ({error})") from error
    print(f"plot: {path}")


def main() -> None:
    workdir = command.required("workdir", WORKDIR.value)
    # Checked before the runs rather than after them.
    if PLOT.value and importlib.util.find_spec("matplotlib") is None:
        raise BadInput('--plot: needs matplotlib; pip install "sigmarep[report]"')
    from sigmarep import sweeps

    module = command.load_config_file(CONFIG)
    step = int(module.get_config().intervention.at_steps)
    points = sweeps.product(
        sweeps.values("arm", *module.ARMS),
        sweeps.values("temperature", TEMPERATURE.value),
        sweeps.seeds(SEEDS.value),
    )
    command.stop_with_runs()
    outcomes = sweeps.compare(CONFIG, points, workdir, os.path.join(HERE, "train.py"), jobs=JOBS.value)
    first: dict[str, list[dict[str, float]]] = {}
    print(f"| arm | seed | {' | '.join(f'{name}: before → after' for name in SHOWN)} | threshold | test accuracy |")
    print(f"|---|---{'|---' * (len(SHOWN) + 2)}|")
    for outcome in outcomes:
        arm, seed = outcome.point["arm"], outcome.point["config.seed"]
        first.setdefault(arm, outcome.rows)
        accuracy = f"{outcome.evaluation['eval/test/accuracy']:.1%}" if outcome.evaluation else "diverged"
        cells = []
        for name in SHOWN.values():
            logged = list(zip(*series(outcome.rows, name), strict=True))
            before = statistics.mean(value for at, value in logged if step - WINDOW < at <= step)
            after = statistics.mean(value for at, value in logged if step < at <= step + WINDOW)
            cells.append(f"{before:.3g} → {after:.3g}")
        limit = series(outcome.rows, "sharpness/preconditioned_threshold")[1][-1]
        print(f"| {arm} | {seed} | {' | '.join(cells)} | {limit:.4g} | {accuracy} |")
    if PLOT.value:
        draw(PLOT.value, first, step)


if __name__ == "__main__":
    command.run(main)
