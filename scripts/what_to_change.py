"""Makes the runs of configs/guide/what_to_change.py and prints the tables of docs/switching_on.md.

    python scripts/what_to_change.py --workdir runs/what_to_change [--jobs 1] [--page docs/switching_on.md]

The runs are an ordinary sweep: finished ones are not repeated, and scripts/report.py reads the folder. Each cell is the
lowest to the highest of three seeds; the entropy is that of the lowest layer at the last step. The averaged weights are
evaluated as the trainer does, with a σ of their own, and with the σ of the training.
"""

import os
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from absl import flags

from sigmarep import command

if TYPE_CHECKING:
    from sigmarep.sweeps import Outcome

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of all runs.")
PAGE = flags.DEFINE_string("page", None, "Page whose tables are replaced: docs/switching_on.md.")
JOBS = flags.DEFINE_integer("jobs", None, "Number of runs at a time; half the cores by default.", lower_bound=1)
HERE = os.path.dirname(__file__)
CONFIG = os.path.join(HERE, "..", "configs", "guide", "what_to_change.py")


def main() -> None:
    workdir = command.required("workdir", WORKDIR.value)
    from sigmarep import sweeps

    module = command.load_config_file(CONFIG)
    points = module.sweep()
    command.stop_with_runs()
    outcomes = sweeps.compare(CONFIG, points, workdir, os.path.join(HERE, "train.py"), jobs=JOBS.value)
    rows: dict[tuple[str, float], list[sweeps.Outcome]] = {}
    for outcome in outcomes:
        rows.setdefault((outcome.point["change"], outcome.point["learning_rate"]), []).append(outcome)
    tables = {}
    for question, compared in module.QUESTIONS.items():
        tables[question] = [
            "| | rate | test accuracy | test loss | entropy at the end, nats |",
            "|---|---|---|---|---|",
        ]
        for change, rate in compared:
            words = module.CHANGES[change][0]
            tables[question].append(f"| {words} | {rate:g} | {' | '.join(cells(rows[change, rate]))} |")
    of_averages = ["| σ | test accuracy | test loss | least ‖Ŵ‖/γ |", "|---|---|---|---|"]
    folders = [os.path.join(workdir, sweeps.run_name(point)) for point in points if point["change"] == "averaged"]
    for words, stored in (("of one power step on the averages", False), ("of the training", True)):
        accuracy, loss, norm = zip(*(averaged(folder, stored_sigma=stored) for folder in folders), strict=True)
        of_averages.append(f"| {words} | {span(accuracy, '.1%')} | {span(loss, '.3f')} | {span(norm, '.3f')} |")
    tables["σ of averaged weights"] = of_averages
    for title, lines in tables.items():
        print("", title, "", *lines, sep="\n")
    if PAGE.value:
        with open(PAGE.value, encoding="utf-8") as file:
            text = file.read()
        with open(PAGE.value, "w", encoding="utf-8") as file:
            file.write(with_tables(text, tables))


def with_tables(text: str, tables: Mapping[str, Sequence[str]]) -> str:
    """The text with each table between its marks, `<!-- table: TITLE -->` and `<!-- end -->`."""

    def filled(match: re.Match[str]) -> str:
        lines = tables.get(match[1])
        return match[0] if lines is None else "\n".join((f"<!-- table: {match[1]} -->\n", *lines, "\n<!-- end -->"))

    return re.sub(r"<!-- table: (.*?) -->.*?<!-- end -->", filled, text, flags=re.S)


def cells(outcomes: "list[Outcome]") -> list[str]:
    """Accuracy, loss and entropy of the runs of one row; runs that diverged are counted in the first."""
    ended = [each for each in outcomes if each.evaluation]
    lost = len(outcomes) - len(ended)
    if not ended:
        return [f"{lost} diverged", "", ""]
    accuracies = [each.evaluation["eval/test/accuracy"] for each in ended if "eval/test/accuracy" in each.evaluation]
    accuracy = span(accuracies, ".1%") if accuracies else "–"
    return [
        accuracy + f", {lost} diverged" * bool(lost),
        span([each.evaluation["eval/test/loss"] for each in ended], ".3f"),
        span([min(each.entropies().values()) for each in ended], ".2f"),
    ]


def span(values: Sequence[float], format_spec: str) -> str:
    """Lowest to highest."""
    return f"{min(values):{format_spec}} to {max(values):{format_spec}}"


def averaged(folder: str, *, stored_sigma: bool) -> tuple[float, float, float]:
    """Test accuracy and loss of a run's averaged weights, and the least ‖Ŵ‖/γ of a layer, by a σ of their own or the stored
    one."""
    import jax
    import jax.numpy as jnp
    from flax.traverse_util import flatten_dict

    from sigmarep import tasks
    from sigmarep.inference import open_run
    from sigmarep.nn import fold
    from sigmarep.training.evaluation import Evaluator

    run = open_run(folder)
    task = run.task
    task.model = run.plain().module
    own = fold(run.variables)
    weights = fold(run.variables, stored_sigma=True) if stored_sigma else own
    evaluations = tasks.get(run.config.task).open_data(run.config, run.files).evaluations(task)
    metrics = Evaluator(run.mesh, evaluations)({"params": weights})
    # With a σ of its own a kernel's norm is γ, and the two kernels differ in σ alone.
    used, reference = flatten_dict(weights), flatten_dict(own)
    norms = [
        jnp.min(jnp.linalg.norm(used[path], axis=-1) / jnp.linalg.norm(reference[path], axis=-1))
        for path in used
        if path[-1] == "kernel"
    ]
    return metrics["eval/test/accuracy"], metrics["eval/test/loss"], float(min(jax.device_get(norms)))


if __name__ == "__main__":
    command.run(main)
