"""The contents of a page from the runs that it is about: each judged, a few of them drawn, all of them compared."""

import functools
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple, TypeVar

from sigmarep.diagnostics import advice, overview, panels, sensitivity, story
from sigmarep.diagnostics.figures import Figure, Panel
from sigmarep.diagnostics.findings import Facts, Sentence, facts, sentences
from sigmarep.diagnostics.page import Content, Detail, Sweep
from sigmarep.diagnostics.runs import Run
from sigmarep.errors import BadInput, one_line
from sigmarep.training.diagnosis import is_evidence

Made = TypeVar("Made")


class Judged(NamedTuple):
    """A run as far as the comparison of all runs needs it, small enough to hold hundreds in memory.

    Attributes:
      run: the run with only the metrics of `panels.ALL`.
      facts: its facts.
      outcome: its outcome as a run of a sweep.
    """

    run: Run
    facts: Facts
    outcome: sensitivity.RunOutcome


class Drawn(NamedTuple):
    """The page's part about one run.

    Attributes:
      sentences: the findings about it in words.
      figures: its plots.
      failures: words for those that could not be drawn.
    """

    sentences: list[Sentence]
    figures: list[Figure]
    failures: list[str]


def is_judged(name: str) -> bool:
    """True for a metric that `judge` reads."""
    return is_evidence(name) or name.startswith("eval/")


def judge(run: Run) -> Judged:
    """See `Judged`."""
    known, run = facts(run), run.only(panels.ALL)
    # As a list: it is gone through more than once.
    return Judged(run, known, sensitivity.outcome(list(run.rows), diverged=run.state == "diverged"))


def draw(run: Run, known: Facts, *, most: int) -> Drawn:
    """Draws one of `most` runs."""
    drawn = Drawn(sentences(run, known, story.before(run, known)), [], [])
    for name, make in panels.of_run(run, known, runs=most):
        figures, failure = guarded(name, functools.partial(_figures, make))
        drawn.figures.extend(figures or [])
        drawn.failures.extend([failure] if failure else [])
    return drawn


def _figures(make: Callable[[], Sequence[Panel]]) -> list[Figure]:
    return [panel.figure() for panel in make()]


def guarded(name: str, make: Callable[[], Made]) -> tuple[Made | None, str | None]:
    """The result of `make`, and words for what kept it from one."""
    try:
        return make(), None
    except BadInput:
        raise
    except Exception as error:
        # Files may be anybody's: what breaks a picture costs that picture alone.
        return None, f"The picture {name} could not be drawn ({type(error).__name__}: {one_line(error)})."


def arm(run: Run) -> str:
    """Arm of a run: the values of its sweep's point other than learning rate and seed; its name outside sweeps."""
    return sensitivity.arm(run.point) if run.point else run.name


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


def compose(judged: Sequence[Judged], drawn: Mapping[int, Drawn], notes: Sequence[str]) -> Content:
    """The contents of a page.

    Args:
      judged: all runs.
      drawn: those that are shown one by one, by their places in `judged`.
      notes: problems with the folders, in words.
    """
    told = [story.Told(each.run, each.facts) for each in judged]
    sweeps, failures = _sweeps(judged)
    together, failure = guarded("all", lambda: _figures(lambda: panels.together([each.run for each in judged], arm)))
    failures += [failure] if failure else []
    damage = [f"{each.run.name}: {text}." for each in judged for text in each.run.damage]
    undrawn = [f"{judged[i].run.name}: {text}" for i, each in drawn.items() for text in each.failures]
    arms: dict[str, list[int]] = {}
    for i, each in enumerate(judged):
        arms.setdefault(arm(each.run), []).append(i)
    several = len(judged) > 1
    return Content(
        runs=[each.run for each in judged],
        facts=[each.facts for each in judged],
        findings=[
            *(overview.overview(told, arms) if several else []),
            *(sentence for sweep in sweeps for sentence in _sweep_findings(sweep)),
        ],
        advice=advice.ranked(told) if several else [],
        notes=[*notes, *damage, *failures, *undrawn],
        sweeps=sweeps,
        together=together or [],
        details=[
            Detail(
                judged[i].run,
                [*each.sentences, *story.elsewhere(told[i], told), *advice.next_step(told[i], told)],
                each.figures,
            )
            for i, each in drawn.items()
        ],
    )


def _sweeps(judged: Sequence[Judged]) -> tuple[list[Sweep], list[str]]:
    """The sweeps that the runs are part of, and words for what could not be drawn."""
    sweeps, failures = [], []
    for folder in dict.fromkeys(each.run.sweep for each in judged if each.run.sweep):
        members = [each for each in judged if each.run.sweep == folder]
        ended = [each for each in members if each.run.state in ("done", "diverged") and each.run.point]
        outcomes = [(each.run.point, each.outcome) for each in ended]
        table = sensitivity.tabulate(outcomes)
        if len({rate for by_rate in table.values() for rate in by_rate}) < 2:
            # One rate tells nothing of others; what its runs did stands in the table of all runs.
            continue
        counted = sum(len(each) for by_rate in table.values() for each in by_rate.values())
        make = functools.partial(panels.rates, table, outcomes, folder)
        drawn, failure = guarded(f"{folder}, rates", functools.partial(_figures, make))
        failures += [failure] if failure else []
        sweeps.append(Sweep(folder, table, len(members) - counted, drawn or []))
    return sweeps, failures


def _sweep_findings(sweep: Sweep) -> list[Sentence]:
    name = os.path.basename(os.path.abspath(sweep.folder))
    best = sensitivity.best_loss(sensitivity.medians(sweep.table))
    texts = []
    for row in sensitivity.findings(sweep.table):
        split = [f"{rate:g}" for rate in row["split"]]
        near = f" At {story.listed(split)} some seeds train by that measure and some do not." if split else ""
        texts.append(
            f"{name}: {row['arm']} trains at {_rates(row['range'], sweep.table[row['arm']])}.{near} Its lowest loss at the "
            f"end is {row['loss']:.4g}, at {row['rate']:g}."
        )
    if texts and math.isfinite(best):
        share = f"within {sensitivity.WITHIN:.0%} of the lowest of all, {best:.4g}"
        texts[0] += f" (An arm trains at a rate whose loss at the end, the median of its seeds, is {share}.)"
    return [Sentence(text, f"rates {sweep.folder}") for text in texts]


def _rates(trained: sensitivity.Range | None, tried: Collection[float]) -> str:
    if trained is None:
        return "no learning rate"
    return f"learning rate{'s' if trained.ratio > 1 else ''} {sensitivity.in_words(trained, tried)}"
