"""The report of runs: read, judged, drawn and written."""

import os
import re
from collections.abc import Callable, Sequence
from typing import Any

from sigmarep.diagnostics import plots, runs, sensitivity
from sigmarep.diagnostics.findings import Facts, facts, overview, sentences
from sigmarep.diagnostics.page import Detail, Picture, Sweep, render
from sigmarep.diagnostics.runs import Run
from sigmarep.errors import BadInput

PICTURES: tuple[tuple[str, str, Callable[[Run, Facts], Any]], ...] = (
    (
        "entropy",
        "Training loss, and attention entropy of every layer and head. Dashed: 0.1 nats. Dotted: the least that Theorem "
        "3.1 allows, and upright where the loss rose.",
        plots.entropy,
    ),
    (
        "spectra",
        "Spectral norms, γ, stable ranks and largest attention logits; dashes tell stacks apart.",
        plots.spectra,
    ),
    ("updates", "Gradient norms and update-to-weight ratios of all layers.", plots.updates),
    ("sharpness", "Sharpness, and the threshold beyond which a step no longer descends.", plots.sharpness),
)


def write(folders: Sequence[str], output: str, *, most: int) -> list[str]:
    """Writes the report of the runs in `folders` to `output`, and its pictures into a folder beside it.

    Args:
      most: runs that are drawn one by one.

    Returns:
      The files, the page first.

    Raises:
      BadInput: no folder holds a run, or the page cannot be written.
    """
    found = runs.find(folders)
    known = [facts(run) for run in found.runs]
    sweeps = _sweeps(found.runs)
    together = None
    if len(found.runs) > 1 and (figure := plots.together(found.runs, arm)):
        together = Picture("all", "Training loss and lowest layer's entropy of all runs.", plots.png(figure))
    details = []
    for i in select(found.runs, known, most):
        run = found.runs[i]
        drawn = [
            Picture(f"{_slug(run.name)}-{name}", caption, plots.png(figure))
            for name, caption, draw in PICTURES
            if (figure := draw(run, known[i])) is not None
        ]
        details.append(Detail(run, sentences(run, known[i]), drawn))
    page = render(
        runs=found.runs,
        facts=known,
        said=[*overview(found.runs, known), *(text for sweep in sweeps for text in _sweep_findings(sweep))],
        notes=found.notes,
        sweeps=sweeps,
        together=together,
        details=details,
    )
    pictures = [*([together] if together else []), *(sweep.picture for sweep in sweeps)]
    return _save(output, page, [*pictures, *(picture for detail in details for picture in detail.pictures)])


def arm(run: Run) -> str:
    """What a run has in common with those that differ by learning rate and seed alone; its name outside sweeps."""
    place = sensitivity.place(run.point)
    return place[0] if place else run.name


def select(found: Sequence[Run], known: Sequence[Facts], most: int) -> list[int]:
    """Which runs are drawn: of each arm in turn the best and the one with the lowest entropy, then those that diverged,
    then the others; at most `most`, in the order of the runs."""
    logged = [i for i, run in enumerate(found) if run.rows]
    arms: dict[str, list[int]] = {}
    for i in logged:
        arms.setdefault(arm(found[i]), []).append(i)

    def loss(i):
        return sensitivity.outcome(found[i].rows, diverged=found[i].state == "diverged").loss

    def lowest(i):
        each = known[i].lowest
        return each[0] if each else float("inf")

    order = [min(members, key=loss) for members in arms.values()]
    order += [min(members, key=lowest) for members in arms.values()]
    order += [i for i in logged if found[i].state == "diverged"] + logged
    return sorted(list(dict.fromkeys(order))[:most])


def _sweeps(found: Sequence[Run]) -> list[Sweep]:
    sweeps = []
    for folder in dict.fromkeys(run.sweep for run in found if run.sweep):
        members = [run for run in found if run.sweep == folder]
        ended = [run for run in members if run.state in ("done", "diverged") and run.point]
        table = sensitivity.tabulate(
            [(run.point, sensitivity.outcome(run.rows, diverged=run.state == "diverged")) for run in ended]
        )
        if not table:
            continue
        counted = sum(len(each) for by_rate in table.values() for each in by_rate.values())
        caption = "Training loss at the end against the learning rate, median and spread over seeds; crosses diverged. "
        caption += "Below, the lowest entropy."
        picture = Picture(f"{_slug(os.path.basename(folder))}-rates", caption, plots.png(plots.rates(table)))
        sweeps.append(Sweep(folder, table, len(members) - counted, picture))
    return sweeps


def _sweep_findings(sweep: Sweep) -> list[str]:
    name = os.path.basename(os.path.abspath(sweep.folder))
    return [
        f"{name}: {row['arm']} trains at {_rates(row['range'])}; its best loss is "
        f"{row['loss']:.4g} at {row['rate']:g}, its sensitivity {row['sensitivity']:.3g}."
        for row in sensitivity.findings(sweep.table)
    ]


def _rates(found: sensitivity.Range | None) -> str:
    if found is None:
        return "no learning rate"
    return f"learning rate{'s' if found.ratio > 1 else ''} {sensitivity.said(found)}"


def _slug(name: str) -> str:
    return re.sub(r"[^\w.=+-]+", "_", name)


def _save(output: str, page: str, pictures: Sequence[Picture]) -> list[str]:
    folder = f"{os.path.splitext(output)[0]}_plots"
    files = [output, *(os.path.join(folder, f"{picture.name}.png") for picture in pictures)]
    try:
        os.makedirs(folder, exist_ok=True)
        for path, picture in zip(files[1:], pictures, strict=True):
            with open(path, "wb") as file:
                file.write(picture.png)
        with open(output, "w") as page_file:
            page_file.write(page)
    except OSError as error:
        raise BadInput(f"--output {output}: cannot be written ({error.strerror})") from error
    return files
