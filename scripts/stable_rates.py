"""Prints the highest stable learning rate of every arm against the width of its model, and the best held-out losses.

    python scripts/stable_rates.py --workdir runs/width [--plot width.svg]

For the sweep of configs/stability/width.py; definitions and thresholds are those of docs/experiments.md. Cells are the
median over seeds (lowest to highest). "≥" marks an arm that is stable at the highest rate tried; the exponent is the slope
of ln(rate) against ln(width), fitted to each seed. A plot needs matplotlib: pip install "sigmarep[report]".
"""

from absl import flags

from sigmarep import command

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the sweep.")
METRIC = flags.DEFINE_string("metric", "eval/test/loss", "Metric of the last evaluation, the lower the better.")
PLOT = flags.DEFINE_string("plot", None, "File to draw a plot into: png, svg or pdf.")


def main() -> None:
    workdir = command.required("workdir", WORKDIR.value)
    from sigmarep.diagnostics import plots, stable_rates

    ladder, start = stable_rates.read_ladder(workdir, METRIC.value)
    print("\n\n".join(stable_rates.tables(ladder, start)))
    if PLOT.value:
        plots.save(lambda: stable_rates.draw(ladder, start), PLOT.value)
        print(f"\nplot: {PLOT.value}")


if __name__ == "__main__":
    command.run(main)
