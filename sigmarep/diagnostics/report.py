"""The report of runs: reads them, judges them, draws their pictures and writes the page."""

import concurrent.futures
import contextlib
import functools
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
from sigmarep.errors import BadInput, one_line

# Bytes of metrics per process. A new process needs 0.8 s to start and load matplotlib; in that time another one reads and
# judges 130 MB.
WORTH_A_PROCESS = 64 * 2**20
# Bytes of a run's name in those of its pictures; file systems take 255 in all.
MOST_BYTES = 200

PICTURES: tuple[tuple[str, str, Callable[[Run, Facts], Any]], ...] = (
    (
        "entropy",
        "Training loss, and attention entropy of every layer and head. Dashed: 0.1 nats. Dotted: the lower bound of "
        "Theorem 3.1, and a vertical line where the loss rose.",
        plots.entropy,
    ),
    (
        "spectra",
        "Spectral norms, γ, stable ranks and largest attention logits; dashes tell stacks apart.",
        plots.spectra,
    ),
    ("updates", "Gradient norms and update-to-weight ratios of all layers.", plots.updates),
    ("sharpness", "Sharpness, and the threshold above which a step no longer descends.", plots.sharpness),
)


class Judged(NamedTuple):
    """A run as far as the comparison of all runs needs it, small enough to hold hundreds in memory.

    Attributes:
      run: the run with only the metrics of `plots.ALL`.
      facts: its facts.
      sentences: the findings about it in words.
      outcome: its outcome as a run of a sweep.
    """

    run: Run
    facts: Facts
    sentences: list[str]
    outcome: sensitivity.RunOutcome


def write(folders: Sequence[str], output: str, *, most: int, jobs: int = 1) -> list[str]:
    """Writes the report of the runs in `folders` to `output`, and its pictures into a folder next to it.

    Args:
      folders: runs, sweeps, or folders of runs.
      output: path of the page, FILE.html; pictures go into FILE_plots.
      most: largest number of runs that are drawn one by one.
      jobs: number of processes that may read and draw. Like all of `multiprocessing` they import the main module.

    Returns:
      Paths of the files, the page first.

    Raises:
      BadInput: no folder has a run, matplotlib is missing, or the page cannot be written.
    """
    places, notes = runs.find(folders)
    with _processes(places, jobs) as each:
        reading = each(_judge, places)
        # Loads matplotlib while the other processes read.
        plots.load()
        judged = list(reading)
        chosen = select(judged, most)
        drawing = each(_draw, [places[i] for i in chosen], [judged[i].facts for i in chosen])
        sweeps, failures = _sweeps(judged)
        together, failure = _together([one.run for one in judged])
        drawn = list(drawing)
    notes += [*_damage(judged), *failures, *([failure] if failure else [])]
    all_facts = [one.facts for one in judged]
    all_runs = [one.run for one in judged]
    findings = judged[0].sentences if len(judged) == 1 else overview(all_runs, all_facts)
    page = render(
        runs=all_runs,
        facts=all_facts,
        findings=[*findings, *(text for sweep in sweeps for text in _sweep_findings(sweep))],
        notes=notes,
        sweeps=sweeps,
        together=together,
        details=[
            Detail(all_runs[i], [*judged[i].sentences, *missing], pictures)
            for i, (pictures, missing) in zip(chosen, drawn, strict=True)
        ],
    )
    pictures = [*([together] if together else []), *(sweep.picture for sweep in sweeps)]
    return _save(output, page, [*pictures, *(picture for each, _ in drawn for picture in each)])


def _damage(judged: Sequence[Judged]) -> list[str]:
    return [f"{one.run.name}: {text}." for one in judged for text in one.run.damage]


@contextlib.contextmanager
def _processes(places: Sequence[Place], jobs: int) -> Iterator[Callable[..., Iterable[Any]]]:
    """Yields a `map` that runs in up to `jobs` new processes if there is enough to read to make up for their start."""
    size = sum(runs.size(place) for place in places)
    if (jobs := min(jobs, size // WORTH_A_PROCESS)) < 2:
        yield map
        return
    # Spawned, because forking a process with JAX's threads is unsafe. Interrupts are left to the caller.
    new = multiprocessing.get_context("spawn")
    quiet = (signal.SIGINT, signal.SIG_IGN)
    with concurrent.futures.ProcessPoolExecutor(jobs, new, signal.signal, quiet) as pool:
        yield pool.map


def _judge(place: Place) -> Judged:
    try:
        return _judged(runs.read(place))
    except Exception as error:
        # Files may be anybody's: a run that breaks the report costs its own row alone.
        return _judged(runs.unreadable(place, error))


def _judged(run: Run) -> Judged:
    run_facts = facts(run)
    outcome = sensitivity.outcome(run.rows, diverged=run.state == "diverged")
    return Judged(run.only(plots.ALL), run_facts, sentences(run, run_facts), outcome)


def _draw(place: Place, run_facts: Facts) -> tuple[list[Picture], list[str]]:
    """Draws the pictures of one run, and says which could not be drawn.

    Reads it again, because only a few of possibly hundreds of runs are drawn.
    """
    run = runs.read(place)
    pictures, failures = [], []
    for name, caption, draw in PICTURES:
        picture, failure = _picture(f"{_slug(run.name)}-{name}", caption, functools.partial(draw, run, run_facts))
        pictures += [picture] if picture else []
        failures += [failure] if failure else []
    return pictures, failures


def _picture(name: str, caption: str, draw: Callable[[], Any]) -> tuple[Picture | None, str | None]:
    """The picture of what `draw` returns, None for None; and words for what kept it from being drawn."""
    try:
        figure = draw()
        return (None, None) if figure is None else (Picture(name, caption, plots.png(figure)), None)
    except BadInput:
        raise
    except Exception as error:
        # As in `_judge`.
        return None, f"The picture {name} could not be drawn ({type(error).__name__}: {one_line(error)})."


def _together(all_runs: Sequence[Run]) -> tuple[Picture | None, str | None]:
    if len(all_runs) < 2:
        return None, None
    caption = "Training loss and lowest layer's entropy of all runs."
    return _picture("all", caption, functools.partial(plots.together, all_runs, arm))


def arm(run: Run) -> str:
    """Arm of a run: the values of its sweep's point other than learning rate and seed; its name outside sweeps."""
    place = sensitivity.place(run.point)
    return place[0] if place else run.name


def select(judged: Sequence[Judged], most: int) -> list[int]:
    """Indices of the runs to draw, at most `most`, in the order of the runs.

    Chosen are first the best run of each arm, then the run with the lowest entropy of each arm, then diverged runs, then
    the others.
    """
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


def _sweeps(judged: Sequence[Judged]) -> tuple[list[Sweep], list[str]]:
    """The sweeps that the runs are part of, and words for those that could not be drawn."""
    sweeps, failures = [], []
    for folder in dict.fromkeys(each.run.sweep for each in judged if each.run.sweep):
        members = [each for each in judged if each.run.sweep == folder]
        ended = [each for each in members if each.run.state in ("done", "diverged") and each.run.point]
        table = sensitivity.tabulate([(each.run.point, each.outcome) for each in ended])
        if not table:
            continue
        counted = sum(len(each) for by_rate in table.values() for each in by_rate.values())
        caption = "Training loss at the end against the learning rate, median and spread over seeds; crosses diverged. "
        caption += "Below, the lowest entropy."
        name = f"{_slug(os.path.basename(folder))}-rates"
        picture, failure = _picture(name, caption, functools.partial(plots.rates, table))
        failures += [failure] if failure else []
        if picture:
            sweeps.append(Sweep(folder, table, len(members) - counted, picture))
    return sweeps, failures


def _sweep_findings(sweep: Sweep) -> list[str]:
    name = os.path.basename(os.path.abspath(sweep.folder))
    return [
        f"{name}: {row['arm']} trains at {_rates(row['range'])}; its best loss is "
        f"{row['loss']:.4g} at {row['rate']:g}, its sensitivity {row['sensitivity']:.3g}."
        for row in sensitivity.findings(sweep.table)
    ]


def _rates(trained: sensitivity.Range | None) -> str:
    if trained is None:
        return "no learning rate"
    return f"learning rate{'s' if trained.ratio > 1 else ''} {sensitivity.in_words(trained)}"


def _slug(name: str) -> str:
    return re.sub(r"[^\w.=+-]+", "_", name).encode()[:MOST_BYTES].decode(errors="ignore")


def _distinct(names: Sequence[str]) -> list[str]:
    """The names, with numbers behind those that came before."""
    counts: dict[str, int] = {}
    distinct = []
    for name in names:
        counts[name] = counts.get(name, 0) + 1
        distinct.append(name if counts[name] == 1 else f"{name}~{counts[name]}")
    return distinct


def _save(output: str, page: str, pictures: Sequence[Picture]) -> list[str]:
    folder = f"{os.path.splitext(output)[0]}_plots"
    files = [output, *(os.path.join(folder, f"{name}.png") for name in _distinct([each.name for each in pictures]))]
    try:
        os.makedirs(folder, exist_ok=True)
        for path, picture in zip(files[1:], pictures, strict=True):
            with open(path, "wb") as file:
                file.write(picture.png)
        with open(output, "wb") as file:
            # Names of files need not be text; what is none becomes "?".
            file.write(page.encode("utf-8", "replace"))
    except OSError as error:
        raise BadInput(f"--output {output}: cannot be written ({error.strerror})") from error
    return files
