"""Prints the held-out figure of every arm at every learning rate of a sweep, all seeds, and each arm's best rate.

    python scripts/best_rates.py --workdir runs/depth --metric eval/test/loss [--plot depth.svg]
    python scripts/best_rates.py --workdir runs/remedies_lm --reference pre_ln

For the sweeps of configs/stability/claim_a.py, depth.py and remedies.py, whose definitions are in docs/experiments.md. With
--reference a second table has the rates at which each arm is as good as that one at its best, to four shares. A plot
needs matplotlib: pip install "sigmarep[report]".
"""

from absl import flags

from sigmarep import command

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the sweep.")
METRIC = flags.DEFINE_string(
    "metric", "eval/test/loss", "Metric of the last evaluation; more is better of an accuracy or BLEU, else less."
)
REFERENCE = flags.DEFINE_string("reference", None, "Arm that the others are compared with.")
PLOT = flags.DEFINE_string("plot", None, "File to draw a plot into: png, svg or pdf.")


def main() -> None:
    workdir = command.required("workdir", WORKDIR.value)
    from sigmarep.diagnostics import best_rates, plots

    figures = best_rates.read_figures(workdir, METRIC.value)
    print("\n\n".join(best_rates.tables(figures, METRIC.value)))
    if REFERENCE.value:
        print("\n" + "\n\n".join(best_rates.reach(figures, METRIC.value, REFERENCE.value)))
    if PLOT.value:
        plots.save(lambda: best_rates.draw(figures, METRIC.value), PLOT.value)
        print(f"\nplot: {PLOT.value}")


if __name__ == "__main__":
    command.run(main)
