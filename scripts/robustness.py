"""Prints which settings each arm of a sweep survives: the test accuracy of every seed, and the number of failed runs.

    python scripts/robustness.py --workdir runs/robustness [--plot robustness.svg]

For the sweep of configs/stability/robustness.py; what counts as failed, and the thresholds, are defined in
docs/experiments.md. A plot needs matplotlib: pip install "sigmarep[report]".
"""

from absl import flags

from sigmarep import command

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the sweep.")
METRIC = flags.DEFINE_string("metric", "eval/test/accuracy", "Accuracy of the last evaluation.")
PLOT = flags.DEFINE_string("plot", None, "File to draw a plot into: png, svg or pdf.")


def main() -> None:
    workdir = command.required("workdir", WORKDIR.value)
    from sigmarep.diagnostics import plots, robustness

    grid = robustness.read_grid(workdir)
    print("\n\n".join(robustness.tables(grid, METRIC.value)))
    if PLOT.value:
        plots.save(lambda: robustness.draw(grid, METRIC.value), PLOT.value)
        print(f"\nplot: {PLOT.value}")


if __name__ == "__main__":
    command.run(main)
