"""The report of runs: reads them, judges them, and writes the page and, on request, static pictures."""

import concurrent.futures
import contextlib
import functools
import multiprocessing
import os
import re
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

from sigmarep.diagnostics import panels, plots, runs, sensitivity
from sigmarep.diagnostics.findings import Facts, Sentence, facts, overview, sentences
from sigmarep.diagnostics.page import Detail, Sweep, render
from sigmarep.diagnostics.panels import Panel
from sigmarep.diagnostics.runs import Place, Run
from sigmarep.errors import BadInput, one_line

# Bytes of metrics per process. A new process needs up to 0.8 s to start; in that time another one reads and judges 130 MB.
WORTH_A_PROCESS = 64 * 2**20
# Bytes of a run's name in those of its pictures; file systems take 255 in all.
MOST_BYTES = 200
Made = TypeVar("Made")

PICTURES: tuple[tuple[str, Callable[[Run, Facts], Any]], ...] = (
    ("entropy", plots.entropy),
    ("spectra", plots.spectra),
    ("updates", plots.updates),
    ("sharpness", plots.sharpness),
)


class Picture(NamedTuple):
    """A static picture: the name of its file, without ending, and the file's bytes."""

    name: str
    content: bytes


class Drawn(NamedTuple):
    """Drawings of one run.

    Attributes:
      panels: its plots.
      pictures: its static pictures, if asked for.
      failures: words for those that could not be drawn.
    """

    panels: list[Panel]
    pictures: list[Picture]
    failures: list[str]


class Judged(NamedTuple):
    """A run as far as the comparison of all runs needs it, small enough to hold hundreds in memory.

    Attributes:
      run: the run with only the metrics of `panels.ALL`.
      facts: its facts.
      sentences: the findings about it in words.
      outcome: its outcome as a run of a sweep.
    """

    run: Run
    facts: Facts
    sentences: list[Sentence]
    outcome: sensitivity.RunOutcome


def write(folders: Sequence[str], output: str, *, most: int, jobs: int = 1, static: str | None = None) -> list[str]:
    """Writes the report of the runs in `folders` to `output`.

    Args:
      folders: runs, sweeps, or folders of runs.
      output: path of the page, FILE.html.
      most: largest number of runs that are drawn one by one.
      jobs: number of processes that may read and draw. Like all of `multiprocessing` they import the main module.
      static: "png", "svg" or "pdf" also writes static pictures of this kind into a folder FILE_plots.

    Returns:
      Paths of the files, the page first.

    Raises:
      BadInput: no folder has a run, the page cannot be written, or static pictures are asked for without matplotlib.
    """
    if static:
        plots.load()
    places, notes = runs.find(folders)
    with _processes(places, jobs) as each:
        judged = list(each(_judge, places))
        chosen = select(judged, most)
        drawing = each(functools.partial(_draw, most=len(chosen), static=static), *_columns(places, judged, chosen))
        sweeps, pictures, failures = _sweeps(judged, static)
        together, failure = _guarded("all", lambda: panels.together([one.run for one in judged], arm))
        drawn = list(drawing)
    notes += [*_damage(judged), *failures, *([failure] if failure else [])]
    if static and len(judged) > 1:
        picture, failure = _picture("all", functools.partial(plots.together, [one.run for one in judged], arm), static)
        pictures[:0] = [picture] if picture else []
        notes += [failure] if failure else []
    all_facts = [one.facts for one in judged]
    all_runs = [one.run for one in judged]
    told = overview(all_runs, all_facts) if len(judged) > 1 else []
    notes += [f"{all_runs[i].name}: {text}" for i, one in zip(chosen, drawn, strict=True) for text in one.failures]
    page = render(
        runs=all_runs,
        facts=all_facts,
        findings=[*told, *(text for sweep in sweeps for text in _sweep_findings(sweep))],
        notes=notes,
        sweeps=sweeps,
        together=together or [],
        details=[Detail(all_runs[i], judged[i].sentences, one.panels) for i, one in zip(chosen, drawn, strict=True)]
        or [Detail(one.run, one.sentences, []) for one in judged[:1] if len(judged) == 1],
    )
    return _save(output, page, [*pictures, *(picture for one in drawn for picture in one.pictures)], static)


def _columns(
    places: Sequence[Place], judged: Sequence[Judged], chosen: Sequence[int]
) -> tuple[list[Place], list[Facts]]:
    return [places[i] for i in chosen], [judged[i].facts for i in chosen]


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
    return Judged(run.only(panels.ALL), run_facts, sentences(run, run_facts), outcome)


def _draw(place: Place, run_facts: Facts, *, most: int, static: str | None) -> Drawn:
    """Draws one of `most` runs.

    Reads it again, because only a few of possibly hundreds of runs are drawn.
    """
    run = runs.read(place)
    drawn = Drawn([], [], [])
    for name, make in panels.of_run(run, run_facts, runs=most):
        made, failure = _guarded(name, make)
        drawn.panels.extend(made or [])
        drawn.failures.extend([failure] if failure else [])
    for name, draw in PICTURES if static else ():
        picture, failure = _picture(f"{_slug(run.name)}-{name}", functools.partial(draw, run, run_facts), static)
        drawn.pictures.extend([picture] if picture else [])
        drawn.failures.extend([failure] if failure else [])
    return drawn


def _picture(name: str, draw: Callable[[], Any], static: str | None) -> tuple[Picture | None, str | None]:
    """The picture of what `draw` returns, None for None; and words for what kept it from being drawn."""

    def make() -> Picture | None:
        figure = draw()
        return None if figure is None else Picture(name, plots.rendered(figure, static or "png"))

    return _guarded(name, make)


def _guarded(name: str, make: Callable[[], Made]) -> tuple[Made | None, str | None]:
    """What `make` returns, and words for what kept it from that."""
    try:
        return make(), None
    except BadInput:
        raise
    except Exception as error:
        # As in `_judge`.
        return None, f"The picture {name} could not be drawn ({type(error).__name__}: {one_line(error)})."


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


def _sweeps(judged: Sequence[Judged], static: str | None) -> tuple[list[Sweep], list[Picture], list[str]]:
    """The sweeps that the runs are part of, their static pictures, and words for what could not be drawn."""
    sweeps, pictures, failures = [], [], []
    for folder in dict.fromkeys(each.run.sweep for each in judged if each.run.sweep):
        members = [each for each in judged if each.run.sweep == folder]
        ended = [each for each in members if each.run.state in ("done", "diverged") and each.run.point]
        outcomes = [(each.run.point, each.outcome) for each in ended]
        table = sensitivity.tabulate(outcomes)
        if not table:
            continue
        counted = sum(len(each) for by_rate in table.values() for each in by_rate.values())
        name = f"{_slug(os.path.basename(folder))}-rates"
        drawn, failure = _guarded(name, functools.partial(panels.rates, table, outcomes, folder))
        failures += [failure] if failure else []
        sweeps.append(Sweep(folder, table, len(members) - counted, drawn or []))
        if static:
            picture, failure = _picture(name, functools.partial(plots.rates, table), static)
            pictures += [picture] if picture else []
            failures += [failure] if failure else []
    return sweeps, pictures, failures


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


def _save(output: str, page: str, pictures: Sequence[Picture], static: str | None) -> list[str]:
    folder = f"{os.path.splitext(output)[0]}_plots"
    names = _distinct([each.name for each in pictures])
    files = [output, *(os.path.join(folder, f"{name}.{static}") for name in names)]
    try:
        os.makedirs(folder if pictures else os.path.dirname(os.path.abspath(output)), exist_ok=True)
        for path, picture in zip(files[1:], pictures, strict=True):
            with open(path, "wb") as file:
                file.write(picture.content)
        with open(output, "wb") as file:
            # Names of files need not be text; what is none becomes "?".
            file.write(page.encode("utf-8", "replace"))
    except OSError as error:
        raise BadInput(f"--output {output}: cannot be written ({error.strerror})") from error
    return files
