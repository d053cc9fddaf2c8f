"""The report of runs: reads them, judges them, and writes the page and, on request, static pictures."""

import concurrent.futures
import contextlib
import functools
import multiprocessing
import os
import re
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from sigmarep.diagnostics import plots, runs
from sigmarep.diagnostics.composition import Drawn, Judged, arm, compose, draw, guarded, is_judged, judge, select
from sigmarep.diagnostics.findings import Facts
from sigmarep.diagnostics.page import Content, render
from sigmarep.diagnostics.runs import Place
from sigmarep.errors import BadInput

# Bytes of metrics per process. A new process needs up to 0.8 s to start; in that time another one reads and judges 130 MB.
WORTH_A_PROCESS = 64 * 2**20
# Bytes of a run's name in those of its pictures; file systems take 255 in all.
MOST_BYTES = 200

PICTURES: tuple[tuple[str, Callable[..., Any]], ...] = (
    ("entropy", plots.entropy),
    ("spectra", plots.spectra),
    ("updates", plots.updates),
    ("sharpness", plots.sharpness),
)


class Picture(NamedTuple):
    """A static picture: the name of its file, without ending, and the file's bytes."""

    name: str
    content: bytes


def write(
    folders: Sequence[str],
    output: str,
    *,
    most: int,
    jobs: int = 1,
    static: str | None = None,
    column: str = "single",
) -> list[str]:
    """Writes the report of the runs in `folders` to `output`.

    Args:
      folders: runs, sweeps, or folders of runs.
      output: path of the page, FILE.html.
      most: largest number of runs that are drawn one by one.
      jobs: number of processes that may read and draw. Like all of `multiprocessing` they import the main module.
      static: "png", "svg" or "pdf" also writes static pictures of this kind into a folder FILE_plots.
      column: of `plots.WIDTHS`, for which the static pictures are sized.

    Returns:
      Paths of the files, the page first.

    Raises:
      BadInput: no folder has a run, the page cannot be written, or static pictures are asked for without matplotlib.
    """
    if static:
        plots.load()
    judged, drawn, content = _read(folders, most=most, jobs=jobs, static=static, width=plots.WIDTHS[column])
    pictures, failures = _shared_pictures(judged, content, static, plots.WIDTHS[column]) if static else ([], [])
    content.notes.extend([*failures, *(text for each in drawn for text in each.failures)])
    pictures += [picture for each in drawn for picture in each.pictures]
    return _save(output, render(content), pictures, static)


def page(folders: Sequence[str], *, most: int) -> str:
    """The page of the runs in `folders`, see `write`."""
    return render(_read(folders, most=most, jobs=1, static=None, width=0.0)[2])


def _read(
    folders: Sequence[str], *, most: int, jobs: int, static: str | None, width: float
) -> tuple[list[Judged], list["_Drawing"], Content]:
    places, notes = runs.find(folders)
    with _processes(places, jobs) as each:
        judged = list(each(_judge, places))
        # One run alone is told of even where nothing of it is drawn.
        chosen = select(judged, most) or ([0] if len(judged) == 1 else [])
        make = functools.partial(_draw, most=len(chosen), static=static, width=width)
        drawing = each(make, [places[i] for i in chosen], [judged[i].facts for i in chosen])
        drawn = list(drawing)
    if not most:
        drawn = [each._replace(drawn=each.drawn._replace(figures=[])) for each in drawn]
    content = compose(judged, {i: each.drawn for i, each in zip(chosen, drawn, strict=True)}, notes)
    return judged, drawn, content


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
        return judge(runs.read(place, runs.metrics_file(place, is_judged)))
    except Exception as error:
        # Files may be anybody's: a run that breaks the report costs its own row alone.
        return judge(runs.unreadable(place, error))


class _Drawing(NamedTuple):
    """A run as the page and the static pictures show it; `failures` are words for pictures that could not be drawn."""

    drawn: Drawn
    pictures: list[Picture]
    failures: list[str]


def _draw(place: Place, run_facts: Facts, *, most: int, static: str | None, width: float) -> _Drawing:
    """Draws one of `most` runs.

    Reads it again, because only a few of possibly hundreds of runs are drawn.
    """
    try:
        run = runs.read(place)
    except Exception as error:
        run = runs.unreadable(place, error)
    made = _Drawing(draw(run, run_facts, most=most), [], [])
    for name, draw_picture in PICTURES if static else ():
        figure = functools.partial(draw_picture, run, run_facts, width)
        picture, failure = _picture(f"{_slug(run.name)}-{name}", figure, static)
        made.pictures.extend([picture] if picture else [])
        made.failures.extend([f"{run.name}: {failure}"] if failure else [])
    return made


def _shared_pictures(
    judged: Sequence[Judged], content: Content, static: str | None, width: float
) -> tuple[list[Picture], list[str]]:
    """Static pictures of all runs together and of sweeps, and words for those that could not be drawn."""
    wanted: dict[str, Callable[[], Any]] = {}
    if len(judged) > 1:
        wanted["all"] = functools.partial(plots.together, [each.run for each in judged], arm, width)
    pairs = [(f"{_slug(os.path.basename(sweep.folder))}-rates", sweep.table) for sweep in content.sweeps]
    for name, (_, table) in zip(_distinct([name for name, _ in pairs]), pairs, strict=True):
        wanted[name] = functools.partial(plots.rates, table, width)
    made = [_picture(name, make, static) for name, make in wanted.items()]
    return [picture for picture, _ in made if picture], [failure for _, failure in made if failure]


def _picture(name: str, draw: Callable[[], Any], static: str | None) -> tuple[Picture | None, str | None]:
    """The picture of what `draw` returns, None for None; and words for what kept it from being drawn."""

    def make() -> Picture | None:
        figure = draw()
        return None if figure is None else Picture(name, plots.rendered(figure, static or "png"))

    return guarded(name, make)


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
