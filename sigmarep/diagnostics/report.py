"""The report of runs: read, judged, drawn and written."""

import concurrent.futures
import contextlib
import multiprocessing
import os
import re
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from sigmarep.diagnostics import plots, runs, sensitivity
from sigmarep.diagnostics.findings import Facts, facts, overview, sentences
from sigmarep.diagnostics.page import Detail, Picture, Sweep, render
from sigmarep.diagnostics.runs import Place, Run
from sigmarep.errors import BadInput

# A process starts in 0.2 seconds and loads what draws in 0.6: in that time another one reads and judges 130 megabytes.
WORTH_A_PROCESS = 64 * 2**20

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


class Judged(NamedTuple):
    """What all runs are shown with: the `run` with the metrics of `plots.ALL` alone, its `facts`, what there is to be
    `said` of it, and its `outcome`. Hundreds of these are small where hundreds of runs are not."""

    run: Run
    facts: Facts
    said: list[str]
    outcome: sensitivity.Outcome


def write(folders: Sequence[str], output: str, *, most: int, jobs: int = 1) -> list[str]:
    """Writes the report of the runs in `folders` to `output`, and its pictures into a folder beside it.

    Args:
      most: runs that are drawn one by one.
      jobs: processes that may read and draw. They import the main module, as `multiprocessing` does.

    Returns:
      The files, the page first.

    Raises:
      BadInput: no folder holds a run, matplotlib is missing, or the page cannot be written.
    """
    places, notes = runs.find(folders)
    with _processes(places, jobs) as each:
        reading = each(_judge, places)
        # While the others read.
        plots.load()
        judged = list(reading)
        chosen = select(judged, most)
        drawing = each(_draw, [places[i] for i in chosen], [judged[i].facts for i in chosen])
        sweeps = _sweeps(judged)
        together = _together([one.run for one in judged])
        drawn = list(drawing)
    known = [one.facts for one in judged]
    found = [one.run for one in judged]
    said = judged[0].said if len(judged) == 1 else overview(found, known)
    page = render(
        runs=found,
        facts=known,
        said=[*said, *(text for sweep in sweeps for text in _sweep_findings(sweep))],
        notes=notes,
        sweeps=sweeps,
        together=together,
        details=[Detail(found[i], judged[i].said, pictures) for i, pictures in zip(chosen, drawn, strict=True)],
    )
    pictures = [*([together] if together else []), *(sweep.picture for sweep in sweeps)]
    return _save(output, page, [*pictures, *(picture for each in drawn for picture in each)])


@contextlib.contextmanager
def _processes(places: Sequence[Place], jobs: int) -> Iterator[Callable[..., Iterable[Any]]]:
    """A `map`, in up to `jobs` processes of their own if there is so much to read that they pay."""
    size = sum(runs.size(place) for place in places)
    if (jobs := min(jobs, size // WORTH_A_PROCESS)) < 2:
        yield map
        return
    # Not forked: the caller may be a process of many threads, as JAX makes it. Interrupts are the caller's.
    new = multiprocessing.get_context("spawn")
    quiet = (signal.SIGINT, signal.SIG_IGN)
    with concurrent.futures.ProcessPoolExecutor(jobs, new, signal.signal, quiet) as pool:
        yield pool.map


def _judge(place: Place) -> Judged:
    run = runs.read(place)
    found = facts(run)
    ended = sensitivity.outcome(run.rows, diverged=run.state == "diverged")
    return Judged(run.only(plots.ALL), found, sentences(run, found), ended)


def _draw(place: Place, found: Facts) -> list[Picture]:
    """The pictures of one run, which is read again: of hundreds a few are drawn."""
    run = runs.read(place)
    return [
        Picture(f"{_slug(run.name)}-{name}", caption, plots.png(figure))
        for name, caption, draw in PICTURES
        if (figure := draw(run, found)) is not None
    ]


def _together(found: Sequence[Run]) -> Picture | None:
    if len(found) > 1 and (figure := plots.together(found, arm)):
        return Picture("all", "Training loss and lowest layer's entropy of all runs.", plots.png(figure))
    return None


def arm(run: Run) -> str:
    """What a run has in common with those that differ by learning rate and seed alone; its name outside sweeps."""
    place = sensitivity.place(run.point)
    return place[0] if place else run.name


def select(judged: Sequence[Judged], most: int) -> list[int]:
    """Which runs are drawn: of each arm in turn the best and the one with the lowest entropy, then those that diverged,
    then the others; at most `most`, in the order of the runs."""
    logged = [i for i, each in enumerate(judged) if each.run.rows]
    arms: dict[str, list[int]] = {}
    for i in logged:
        arms.setdefault(arm(judged[i].run), []).append(i)

    def lowest(i):
        each = judged[i].facts.lowest
        return each[0] if each else float("inf")

    order = [min(members, key=lambda i: judged[i].outcome.loss) for members in arms.values()]
    order += [min(members, key=lowest) for members in arms.values()]
    order += [i for i in logged if judged[i].run.state == "diverged"] + logged
    return sorted(list(dict.fromkeys(order))[:most])


def _sweeps(judged: Sequence[Judged]) -> list[Sweep]:
    sweeps = []
    for folder in dict.fromkeys(each.run.sweep for each in judged if each.run.sweep):
        members = [each for each in judged if each.run.sweep == folder]
        ended = [each for each in members if each.run.state in ("done", "diverged") and each.run.point]
        table = sensitivity.tabulate([(each.run.point, each.outcome) for each in ended])
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
