"""Rendering of a report as one self-contained HTML page: text, tables, and plots that a script draws from inert data."""

import base64
import hashlib
import html
import json
import math
import os
import re
import shlex
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any, NamedTuple

from sigmarep.diagnostics import sensitivity
from sigmarep.diagnostics.figures import Figure
from sigmarep.diagnostics.findings import Facts, Sentence, differences
from sigmarep.diagnostics.glossary import WORDS
from sigmarep.diagnostics.runs import Run

# Largest number of runs whose configurations are compared in a table with one column per run.
MOST_COLUMNS = 8

# Characters that no text shows.
CONTROL = re.compile(r"[\x00-\x1f\x7f]")
# Characters of a field's value that are shown.
MOST_CHARACTERS = 200
# Stands below each command.
RUN_IT = (
    '<span class="quiet">Run it in the folder that has scripts/train.py. To see what comes of it, make this report again '
    "and name the folder after --workdir too.</span>"
)
# Fewer fields that differ are shown at once.
FEW_FIELDS = 8
# Content of the page in order of use; the library's license goes wherever its code goes.
STYLES = ("vendor/uplot/uPlot.min.css", "assets/page.css")
LICENSE = "vendor/uplot/LICENSE"
SCRIPTS = ("vendor/uplot/uPlot.iife.min.js", "assets/plot.js", "assets/lines.js", "assets/heat.js", "assets/page.js")
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
        return ['<div class="pictures">', *map(self._figure, figures), "</div>"] if figures else []

    def _figure(self, figure: Figure) -> str:
        number = len(self.placed)
        self.placed.append(figure)
        return (
            f'<figure class="plot{" wide" if figure.wide else ""}" id="plot-{number}" data-panel="{number}" '
            f'data-key="{figure.key}"><figcaption><b>{_text(figure.title)}</b>{_text(figure.caption)}</figcaption><details>'
            f'<summary>In words and numbers</summary><p id="words-{number}">{_text(figure.words)}</p></details></figure>'
        )


class Content(NamedTuple):
    """The contents of a page.

    Attributes:
      runs: all runs, with at least the metrics shown in tables.
      facts: facts of each run.
      findings: findings about all runs together; none for one run, whose own stand in their place.
      notes: problems with the folders, in words.
      sweeps: the sweeps that the runs are part of.
      together: plots of all runs; none for one run.
      details: runs that are shown individually.
    """

    runs: list[Run]
    facts: list[Facts]
    findings: list[Sentence]
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
    runs, facts, findings, notes, sweeps, together, details = content
    title = f"Training stability: {runs[0].name if len(runs) == 1 else _group(runs)}"
    figures = _Figures()
    shared = _topics(
        [*(together if len(runs) > 1 else []), *(figure for sweep in sweeps for figure in sweep.figures)], 0
    )
    parts = [
        f"<h1>{_text(title)}</h1>",
        f'<p class="quiet">Made on {time.strftime("%Y-%m-%d at %H:%M")}. Entropies are in nats, steps are updates, '
        "of which only those that were logged are known.</p>",
        *[f'<p class="note">{_text(note)}</p>' for note in notes],
        "<h2>Findings</h2>",
        _told(findings, shared) if findings else "",
    ]
    if len(runs) > 1:
        parts.append(_words())
    if len(runs) > 1 and together:
        parts += ["<h2>All runs</h2>", *figures.place(together)]
    for sweep in sweeps:
        parts += _sweep(sweep, figures)
    if len(runs) > 1:
        parts += ["<h2>Runs</h2>", _runs_table(runs, facts)]
        parts += _differences(runs)
        if details:
            parts.append("<h2>Run by run</h2>")
        if len(details) < len(runs):
            parts.append(
                f'<p class="quiet">{len(details)} of {len(runs)} runs are drawn: of each arm the best, the lowest entropy, '
                "then those that diverged. For others give their folders to scripts/report.py, or a larger --plots.</p>"
            )
    for detail in details:
        parts += _detail(detail, figures, shared, alone=len(runs) == 1)
    return Body(title, "\n".join(parts), figures.placed)


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
<title>{_text(made.title)}</title>
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
        f'<!doctype html><html><head><meta charset="utf-8"><title>{_text(made.title)}</title></head><body><main>\n'
        f'{made.main}\n</main><script type="application/json" id="data">{data}</script></body></html>'
    )


def _asset(path: str) -> str:
    return resources.files("sigmarep.diagnostics").joinpath(*path.split("/")).read_text(encoding="utf-8")


def _joined(paths: Sequence[str]) -> str:
    return "\n".join(_asset(path).rstrip("\n") for path in paths) + "\n"


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _text(value: Any) -> str:
    return html.escape(CONTROL.sub(" ", str(value)))


def _name(name: str) -> str:
    """A run's name as HTML that may be wrapped after commas."""
    return _text(name).replace(",", ",<wbr>")


def _topics(figures: Sequence[Figure], first: int) -> dict[str, tuple[int, str]]:
    """Numbers and titles of the plots by their topics; the plots are numbered from `first`."""
    topics: dict[str, tuple[int, str]] = {}
    for number, figure in enumerate(figures, first):
        topics.setdefault(figure.topic, (number, figure.title))
    return topics


def _told(sentences: Sequence[Sentence], topics: Mapping[str, tuple[int, str]]) -> str:
    """The sentences as a list, each with a link to the plot that shows it and the command that it recommends."""
    items = []
    for text, topic, command, more in sentences:
        shown = dict.fromkeys(topics[each] for each in (topic, *more) if each and each in topics)
        links = "".join(f' <a href="#plot-{number}">{_text(title)}</a>' for number, title in shown if title)
        code = f'<pre tabindex="0"><code>{_wrapped(command)}</code></pre>{RUN_IT}' if command else ""
        items.append(f"<li>{_text(text)}{links}{code}</li>")
    return f"<ul>{''.join(items)}</ul>"


def _wrapped(command: str) -> str:
    """HTML of the command with a line for each option, so that none is broken within a word."""
    lines: list[list[str]] = [[]]
    for word in map(shlex.quote, shlex.split(command)):
        if word.startswith("--"):
            lines.append([])
        lines[-1].append(word)
    return " \\\n    ".join(_text(" ".join(words)) for words in lines)


def _words() -> str:
    entries = "".join(f"<dt>{_text(word)}</dt><dd>{_text(meaning)}</dd>" for word, meaning in WORDS.items())
    return f'<details class="words"><summary>The words of this page</summary><dl>{entries}</dl></details>'


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str, *, numbers: bool = True) -> str:
    """Renders a table of HTML cells; `numbers` aligns single words that begin with a digit or a sign to the right."""

    def cell(content: str) -> str:
        content = content or "–"
        number = numbers and content[:1] in tuple("-0123456789") and " " not in content
        return f'<td class="number">{content}</td>' if number else f"<td>{content}</td>"

    head = "".join(f'<th scope="col">{_text(name)}</th>' for name in header)
    body = "\n".join(f'<tr><th scope="row">{row[0]}</th>{"".join(map(cell, row[1:]))}</tr>' for row in rows)
    return (
        f'<div class="table" tabindex="0" role="region" aria-label="{_text(caption)}"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _state(run: Run) -> str:
    return f'<span class="state {run.state.split()[0]}">{_text(run.state)}</span>'


def _step(step: int | None) -> str:
    return "" if step is None else str(step)


def _lowest(entropy: float, layer: str, step: int) -> str:
    return f"<b>{entropy:.3g}</b> in {_text(layer)} at {step}"


def _number(value: float, digits: int = 4) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}g}"


def _runs_table(runs: Sequence[Run], facts: Sequence[Facts]) -> str:
    header = ["run", "state", "steps", "last evaluation", "last loss", "lowest entropy", "fell first"]
    header += ["loss rose at", "diverged at", "spikes"]
    rows = []
    for run, each in zip(runs, facts, strict=True):
        steps = f"{run.last_step}/{run.total_steps}" if run.total_steps else str(run.last_step)
        rows.append(
            [
                _name(run.name),
                _state(run),
                steps,
                _text(f"{each.final[0]} {each.final[1]:.4g}") if each.final else "",
                "" if each.loss is None else f"{each.loss:.4g}",
                _lowest(*each.lowest) if each.lowest else "",
                _text("{} at {}".format(*each.fell[0])) if each.fell else "",
                _step(each.rose),
                _step(each.diverged) + (f", {_text(each.cause)}" if each.cause else ""),
                "" if math.isnan(each.spikes) else f"{each.spikes:.2g}%",
            ]
        )
    return _table(header, rows, "All runs")


def _differences(runs: Sequence[Run]) -> list[str]:
    fields = differences(runs)
    parts = ["<h2>What differs between the configurations</h2>"]
    revisions = Counter(str(run.environment.get("git_revision") or "unknown")[:12] for run in runs)
    if len(revisions) > 1:
        made_by = ", ".join(f"{revision} ({_runs(count)})" for revision, count in revisions.most_common(FEW_FIELDS))
        more = ", …" if len(revisions) > FEW_FIELDS else ""
        parts.append(
            f'<p class="note">The runs were made by different revisions of the code: {_text(made_by)}{more}.</p>'
        )
    if not fields:
        return [*parts, "<p>Nothing: all runs have the same configuration.</p>"]
    if len(runs) <= MOST_COLUMNS:
        rows = [[_text(name), *(_text(_value(each)) for each in values)] for name, values in fields.items()]
        table = _table(["field", *(run.name for run in runs)], rows, "Fields that differ, by run", numbers=False)
    else:
        rows = []
        for name, values in fields.items():
            counts = Counter(_value(value) for value in values)
            most = [
                f"{_text(value)} <span class='quiet'>({_runs(count)})</span>" for value, count in counts.most_common(12)
            ]
            rest = len(counts) - len(most)
            rows.append([_text(name), ", ".join(most) + (f" and {rest} more" if rest else "")])
        table = _table(["field", "values"], rows, "Fields that differ", numbers=False)
    names = ", ".join(list(fields)[:FEW_FIELDS]) + (", …" if len(fields) > FEW_FIELDS else "")
    return [*parts, _folded(f"{_count(len(fields))}: {names}", table, shown=len(fields) <= FEW_FIELDS)]


def _folded(summary: str, content: str, *, shown: bool = False) -> str:
    return f'<details class="settings"{" open" if shown else ""}><summary>{_text(summary)}</summary>{content}</details>'


def _runs(count: int) -> str:
    return f"{count} run{'' if count == 1 else 's'}"


def _count(fields: int) -> str:
    return f"{fields} field{'' if fields == 1 else 's'}"


def _settings(run: Run) -> str:
    rows = [[_text(name), _text(_value(value))] for name, value in run.config.items()]
    table = _table(["field", "value"], rows, "Settings", numbers=False)
    return _folded(f"Settings: {_count(len(rows))}", table) if rows else ""


def _value(value: Any) -> str:
    if value is None:
        return "not set"
    text = f"{value:g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}…"


def _sweep(sweep: Sweep, figures: _Figures) -> list[str]:
    rows = []
    for row in sensitivity.findings(sweep.table):
        rates = sweep.table[row["arm"]]
        lowest = [each.lowest for outcomes in rates.values() for each in outcomes]
        loss = f"{row['loss']:.4g}" if math.isfinite(row["loss"]) else "diverged"
        rows.append(
            [
                _text(row["arm"]),
                loss,
                f"{row['rate']:g}",
                sensitivity.in_words(row["range"], rates),
                sensitivity.in_words(row["own"], rates),
                _number(row["sensitivity"], 3),
                _number(row["entropy"], 3),
                _number(min(filter(math.isfinite, lowest), default=math.nan), 3),
            ]
        )
    share = f"{sensitivity.WITHIN:.0%}"
    seeds = sorted({len(each) for by_rate in sweep.table.values() for each in by_rate.values()})
    words = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    missing = f" {sweep.missing} of its runs have not ended, or failed, and are left out." if sweep.missing else ""
    return [
        f"<h2>Learning rates: {_text(sweep.folder)}</h2>",
        "<p>Loss is the mean of the last tenth of the logged training losses, and of these the median over seeds "
        f"({words} per rate). An arm trains where its loss is within {sensitivity.WITHIN:.0%} of the best of any arm. "
        "Sensitivity is the mean over rates of the loss, capped at the first loss, minus the arm's best loss (Wortsman et "
        f"al., 2023); lower is better.{missing}</p>",
        *figures.place(sweep.figures),
        _table(
            (
                *("arm", "best loss", "at rate", f"within {share} of the best of all at"),
                f"within {share} of its own best at",
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
    about = f'<p class="quiet">{_text(" · ".join(str(fact) for fact in facts if fact))}</p>'
    return [
        *([told, _words(), about] if alone else [f"<h3>{_text(run.name)} {_state(run)}</h3>", about, told]),
        *figures.place(detail.figures),
        _settings(run),
    ]
