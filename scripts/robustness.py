"""Prints which settings each arm of a sweep survives: the test accuracy of every seed, and the number of failed runs.

    python scripts/robustness.py --workdir runs/robustness

For the sweep of configs/stability/robustness.py; what counts as failed, and the thresholds, are defined in
docs/experiments.md.
"""

from absl import flags

from sigmarep import command

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the sweep.")
METRIC = flags.DEFINE_string("metric", "eval/test/accuracy", "Accuracy of the last evaluation.")


def main() -> None:
    workdir = command.required("workdir", WORKDIR.value)
    from sigmarep.diagnostics import robustness

    print("\n\n".join(robustness.tables(robustness.read_grid(workdir), METRIC.value)))


if __name__ == "__main__":
    command.run(main)
