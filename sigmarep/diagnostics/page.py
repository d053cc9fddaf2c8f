"""Rendering of a report as one self-contained HTML page: text, tables, and plots that a script draws from inert data."""

import base64
import hashlib
import math
import os
import shlex
import time
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any, NamedTuple

from sigmarep.diagnostics import sensitivity, story, tables
from sigmarep.diagnostics.figures import Figure
from sigmarep.diagnostics.findings import Facts, Sentence
from sigmarep.diagnostics.glossary import WORDS
from sigmarep.diagnostics.runs import Run
from sigmarep.diagnostics.tables import escaped

# Stands below the commands of a list.
RUN_IT = (
    '<p class="quiet">Commands run in the folder that has scripts/train.py. To see what comes of one, make this report '
    "again and name the folder after its --workdir too.</p>"
)
# Content of the page in order of use; the library's license goes wherever its code goes.
STYLES = ("vendor/uplot/uPlot.min.css", "assets/page.css")
LICENSE = "vendor/uplot/LICENSE"
SCRIPTS = (
    "vendor/uplot/uPlot.iife.min.js",
    *(f"assets/{name}.js" for name in ("plot", "axes", "lines", "heat", "page")),
)
# The one script and the one style of the page are named by their hashes: nothing else runs, and nothing is fetched.
POLICY = (
    "default-src 'none'; script-src '{script}'; style-src '{style}'; base-uri 'none'; form-action 'none'; "
    "require-trusted-types-for 'script'"
)


class Sweep(NamedTuple):
    """A sweep of learning rates.

    Attributes:
      folder: folder of the sweep.
      table: outcomes of its runs.
      missing: number of its runs that are not in the table.
      figures: the table as plots.
    """

    folder: str
    table: sensitivity.Table
    missing: int
    figures: list[Figure]


class Detail(NamedTuple):
    """A run that is shown individually, with findings in words and plots."""

    run: Run
    sentences: list[Sentence]
    figures: list[Figure]


class _Figures:
    """The plots of the page, numbered as they are placed in it."""

    def __init__(self) -> None:
        self.placed: list[Figure] = []

    def place(self, figures: Sequence[Figure]) -> list[str]:
        """HTML of places for the plots; the script draws into them."""
        return ['<div class="pictures" data-key="pictures">', *map(self._figure, figures), "</div>"] if figures else []

    def _figure(self, figure: Figure) -> str:
        number = len(self.placed)
        self.placed.append(figure)
        return (
            f'<figure class="plot{" wide" if figure.wide else ""}" id="plot-{number}" data-panel="{number}" '
            f'data-key="{figure.key}"><figcaption><b>{escaped(figure.title)}</b>{escaped(figure.caption)}</figcaption><details>'
            f'<summary>In words and numbers</summary><p id="words-{number}">{escaped(figure.words)}</p></details></figure>'
        )


class Content(NamedTuple):
    """The contents of a page.

    Attributes:
      runs: all runs, with at least the metrics shown in tables.
      facts: facts of each run.
      findings: findings about all runs together; none for one run, whose own stand in their place.
      advice: what to try next, the most telling first; none for one run.
      notes: problems with the folders, in words.
      sweeps: the sweeps that the runs are part of.
      together: plots of all runs; none for one run.
      details: runs that are shown individually.
    """

    runs: list[Run]
    facts: list[Facts]
    findings: list[Sentence]
    advice: list[Sentence]
    notes: list[str]
    sweeps: list[Sweep]
    together: list[Figure]
    details: list[Detail]


class Body(NamedTuple):
    """The text of a page, and the plots that are drawn into it."""

    title: str
    main: str
    figures: list[Figure]


def render(content: Content) -> str:
    """Renders the page as a file that opens offline."""
    made = body(content)
    data = f'{{"panels":[{",".join(figure.data for figure in made.figures)}]}}'
    return document(made, data, SCRIPTS, POLICY)


def body(content: Content) -> Body:
    """Renders the text of the page."""
    runs, facts, findings, advice, notes, sweeps, together, details = content
    title = f"Training stability: {runs[0].name if len(runs) == 1 else _group(runs)}"
    figures = _Figures()
    shared = _topics(
        [*(together if len(runs) > 1 else []), *(figure for sweep in sweeps for figure in sweep.figures)], 0
    )
    parts = [
        f"<h1>{escaped(title)}</h1>",
        f'<p class="quiet">Made on {time.strftime("%Y-%m-%d at %H:%M")}. Entropies are in nats, steps are updates, '
        "of which only those that were logged are known.</p>",
        *[f'<p class="note">{escaped(note)}</p>' for note in notes],
    ]
    if len(runs) == 1:
        parts.append("<h2>Findings</h2>")
    else:
        told = [_told(findings, shared)] if findings else []
        parts += _keyed("findings", ["<h2>Findings</h2>", *told, _words()])
        if together:
            parts += _keyed("together", ["<h2>All runs</h2>", *figures.place(together)])
    for sweep in sweeps:
        parts += _keyed(f"rates {sweep.folder}", _sweep(sweep, figures))
    if advice:
        parts += _keyed("advice", ["<h2>To try next</h2>", _told(advice, shared, ordered=True)])
    if len(runs) > 1:
        quiet = f'<p class="quiet">{tables.LOSS_WORDS}</p>'
        parts += _keyed("runs", ["<h2>Runs</h2>", quiet, tables.of_runs(runs, facts)])
        parts += _keyed("differences", tables.of_differences(runs))
        if details:
            parts.append("<h2>Run by run</h2>")
        if len(details) < len(runs):
            parts.append(
                f'<p class="quiet">{len(details)} of {len(runs)} runs are drawn: of each arm the one with the lowest loss '
                "at the end and the one with the lowest entropy, then those that diverged. For others give their folders "
                "to scripts/report.py, or a larger --plots.</p>"
            )
    for detail in details:
        parts += _keyed(f"run {detail.run.folder}", _detail(detail, figures, shared, alone=len(runs) == 1))
    return Body(title, "\n".join(parts), figures.placed)


def _keyed(key: str, parts: Sequence[str]) -> list[str]:
    """A section of the page, which a live page knows again by its key."""
    return [f'<section data-key="{escaped(key)}">', *parts, "</section>"]


def _group(runs: Sequence[Run]) -> str:
    """Name of the folder of a sweep, where all runs are of one, and their number."""
    sweeps = {run.sweep for run in runs}
    folder = sweeps.pop() if len(sweeps) == 1 else None
    return f"{f'{os.path.basename(os.path.abspath(folder))}, ' if folder else ''}{len(runs)} runs"


def document(made: Body, data: str, scripts: Sequence[str], policy: str) -> str:
    """The page around its text.

    Args:
      data: for the script, JSON as of `lines.inert`.
      scripts: paths of the scripts, in order.
      policy: of the page's contents, with places for the hashes of its script and its style.
    """
    style, script = _joined(STYLES), f"/*\n{_asset(LICENSE)}*/\n{_joined(scripts)}"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy.format(script=_hash(script), style=_hash(style))}">
<title>{escaped(made.title)}</title>
<style>{style}</style>
</head>
<body>
<main>
{made.main}
</main>
<noscript><p class="note">The plots need JavaScript; their contents in words are below each.</p></noscript>
<script type="application/json" id="data">{data}</script>
<script>{script}</script>
</body>
</html>
"""


def change(made: Body, data: str) -> str:
    """The page without its script and its style, for a browser that has them."""
    return (
        f'<!doctype html><html><head><meta charset="utf-8"><title>{escaped(made.title)}</title></head><body><main>\n'
        f'{made.main}\n</main><script type="application/json" id="data">{data}</script></body></html>'
    )


def _asset(path: str) -> str:
    return resources.files("sigmarep.diagnostics").joinpath(*path.split("/")).read_text(encoding="utf-8")


def _joined(paths: Sequence[str]) -> str:
    return "\n".join(_asset(path).rstrip("\n") for path in paths) + "\n"


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _topics(figures: Sequence[Figure], first: int) -> dict[str, tuple[int, str]]:
    """Numbers and titles of the plots by their topics; the plots are numbered from `first`."""
    topics: dict[str, tuple[int, str]] = {}
    for number, figure in enumerate(figures, first):
        topics.setdefault(figure.topic, (number, figure.title))
    return topics


def _told(sentences: Sequence[Sentence], topics: Mapping[str, tuple[int, str]], *, ordered: bool = False) -> str:
    """The sentences as a list, each with a link to the plot that shows it and the command that it recommends."""
    kind = "ol" if ordered else "ul"
    items = []
    for text, topic, command, more in sentences:
        shown = dict.fromkeys(topics[each] for each in (topic, *more) if each and each in topics)
        links = "".join(f' <a href="#plot-{number}">{escaped(title)}</a>' for number, title in shown if title)
        code = f'<p class="hint"></p><pre tabindex="0"><code>{_wrapped(command)}</code></pre>' if command else ""
        items.append(f"<li>{escaped(text)}{links}{code}</li>")
    run_it = RUN_IT if any(each.command for each in sentences) else ""
    return f'<div data-key="told"><{kind}>{"".join(items)}</{kind}>{run_it}</div>'


def _wrapped(command: str) -> str:
    """HTML of the command: a line for each option, and an element for each word, within which no line is broken."""
    lines: list[list[str]] = [[]]
    for word in map(shlex.quote, shlex.split(command)):
        if word.startswith("--"):
            lines.append([])
        lines[-1].append(word)
    # The backslash at the end of a line stays with the word before it.
    for words in lines[:-1]:
        words[-1] += " \\"
    return "\n    ".join(" ".join(f"<span>{escaped(word)}</span>" for word in words) for words in lines)


def _words() -> str:
    entries = "".join(f"<dt>{escaped(word)}</dt><dd>{escaped(meaning)}</dd>" for word, meaning in WORDS.items())
    return f'<details class="words"><summary>The words of this page</summary><dl>{entries}</dl></details>'


def _sweep(sweep: Sweep, figures: _Figures) -> list[str]:
    rows = []
    for row in sensitivity.findings(sweep.table):
        rates = sweep.table[row["arm"]]
        lowest = [each.lowest for outcomes in rates.values() for each in outcomes]
        rows.append(
            [
                escaped(row["arm"]),
                tables.loss(row["loss"]),
                f"{row['rate']:g}",
                sensitivity.in_words(row["range"], rates),
                story.listed([f"{rate:g}" for rate in row["split"]]),
                sensitivity.in_words(row["own"], rates),
                tables.number(row["sensitivity"], 3),
                tables.number(row["entropy"], 3),
                tables.number(min(filter(math.isfinite, lowest), default=math.nan), 3),
            ]
        )
    share = f"{sensitivity.WITHIN:.0%}"
    seeds = sorted({len(each) for by_rate in sweep.table.values() for each in by_rate.values()})
    words = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    missing = f" {sweep.missing} of its runs have not ended, or failed, and are left out." if sweep.missing else ""
    return [
        f"<h2>Learning rates: {escaped(sweep.folder)}</h2>",
        "<p>The loss at the end is the mean of the last tenth of the logged training losses, and of these the median over "
        f"seeds ({words} per rate). An arm trains at a rate where it is within {share} of the lowest of any arm. "
        "Sensitivity is the mean over rates of the loss at the end, capped at the one logged at the start, minus the arm's "
        f"lowest (Wortsman et al., 2023); lower is better.{missing}</p>",
        *figures.place(sweep.figures),
        tables.table(
            (
                *("arm", "lowest loss at the end, median of seeds", "at rate"),
                *(f"trains (within {share} of the lowest of all) at", "some seeds train, some do not, at"),
                f"within {share} of its own lowest at",
                *("sensitivity (lower is better)", "lowest entropy where it trains", "lowest entropy of all rates"),
            ),
            rows,
            "Arms of the sweep",
        ),
    ]


def _section(environment: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = environment.get(name)
    return section if isinstance(section, dict) else {}


def _detail(detail: Detail, figures: _Figures, shared: Mapping[str, tuple[int, str]], *, alone: bool) -> list[str]:
    run = detail.run
    versions, devices = (_section(run.environment, name) for name in ("packages", "devices"))
    facts = [run.folder, run.config.get("task")]
    if devices:
        facts.append(f"{devices.get('count')} x {devices.get('kind')}")
    if versions.get("jax"):
        facts.append(f"jax {versions['jax']}")
    if run.environment.get("git_revision"):
        facts.append(f"revision {str(run.environment['git_revision'])[:12]}")
    told = _told(detail.sentences, {**shared, **_topics(detail.figures, len(figures.placed))})
    about = f'<p class="quiet">{escaped(" · ".join(str(fact) for fact in facts if fact))}</p>'
    return [
        *([told, _words(), about] if alone else [f"<h3>{escaped(run.name)} {tables.state(run)}</h3>", about, told]),
        *figures.place(detail.figures),
        tables.settings(run),
    ]
