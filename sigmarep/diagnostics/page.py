"""Rendering of a report as one self-contained HTML page: text, tables and embedded pictures, without scripts."""

import base64
import html
import json
import math
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sigmarep.diagnostics import sensitivity
from sigmarep.diagnostics.findings import Facts, differences
from sigmarep.diagnostics.runs import Run

# Largest number of runs whose configurations are compared in a table with one column per run.
MOST_COLUMNS = 8

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1240px; padding: 0 16px 48px; color: #1b1b1b; background: #fff;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.5rem; margin: 24px 0 4px; overflow-wrap: anywhere; }
h2 { overflow-wrap: anywhere; font-size: 1.2rem; margin: 40px 0 8px; padding-top: 12px; border-top: 1px solid #ccc; }
h3 { font-size: 1rem; margin: 28px 0 4px; overflow-wrap: anywhere; }
p, ul { margin: 6px 0; max-width: 80ch; }
ul { padding-left: 22px; }
li { margin: 3px 0; overflow-wrap: anywhere; }
.quiet { color: #595959; font-size: 0.875rem; overflow-wrap: anywhere; }
.note { border-left: 4px solid #d55e00; padding: 4px 12px; background: #fdf3ec; }
.table { overflow-x: auto; border: 1px solid #ccc; border-radius: 4px; margin: 10px 0; max-height: 80vh; }
table { border-collapse: separate; border-spacing: 0; font-size: 0.8125rem; line-height: 1.35; width: 100%; }
th, td { padding: 5px 10px; text-align: left; vertical-align: top; border-bottom: 1px solid #e3e3e3; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
thead th { position: sticky; top: 0; background: #f1f1f1; z-index: 1; white-space: nowrap; }
tbody th { position: sticky; left: 0; background: #fff; font-weight: 600; min-width: 120px; max-width: 260px;
  overflow-wrap: anywhere; }
thead th:first-child { left: 0; z-index: 2; }
tr:last-child > * { border-bottom: 0; }
.state { white-space: nowrap; padding: 1px 7px; border-radius: 9px; background: #e9e9e9; }
.state.diverged, .state.failed, .state.bad, .state.unreadable { background: #f9d9c3; }
.state.done { background: #d3ece3; }
.pictures { display: grid; gap: 16px; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 380px), 1fr)); }
figure { margin: 8px 0; }
figure img { width: 100%; max-width: 720px; height: auto; display: block; }
figcaption { font-size: 0.8125rem; color: #595959; }
@media (max-width: 480px) {
  body { padding: 0 12px 32px; }
  tbody th { min-width: 104px; max-width: 150px; }
  th, td { padding: 5px 7px; }
}
"""
# Characters that no text shows.
CONTROL = re.compile(r"[\x00-\x1f\x7f]")
# Characters of a field's value that are shown.
MOST_CHARACTERS = 200
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


class Picture(NamedTuple):
    """A picture: the name of its file, its caption, and the PNG file's bytes."""

    name: str
    caption: str
    png: bytes


class Sweep(NamedTuple):
    """A sweep of learning rates.

    Attributes:
      folder: folder of the sweep.
      table: outcomes of its runs.
      missing: number of its runs that are not in the table.
      picture: the table as a picture.
    """

    folder: str
    table: sensitivity.Table
    missing: int
    picture: Picture


class Detail(NamedTuple):
    """A run that is shown individually, with findings in words and pictures."""

    run: Run
    sentences: list[str]
    pictures: list[Picture]


def render(
    *,
    runs: Sequence[Run],
    facts: Sequence[Facts],
    findings: Sequence[str],
    notes: Sequence[str],
    sweeps: Sequence[Sweep],
    together: Picture | None,
    details: Sequence[Detail],
) -> str:
    """Renders the page.

    Args:
      runs: all runs, with at least the metrics shown in tables.
      facts: facts of each run.
      findings: findings about all runs together, in words.
      notes: problems with the folders, in words.
      sweeps: the sweeps that the runs are part of.
      together: picture of all runs; None for one run.
      details: runs that are shown individually.
    """
    title = f"Training stability: {runs[0].name}" if len(runs) == 1 else f"Training stability: {len(runs)} runs"
    parts = [
        f"<h1>{_text(title)}</h1>",
        f'<p class="quiet">Read on {time.strftime("%Y-%m-%d at %H:%M")}. Entropies are in nats, steps are updates.</p>',
        *[f'<p class="note">{_text(note)}</p>' for note in notes],
        "<h2>Findings</h2>",
        _list(findings),
    ]
    if len(runs) > 1 and together:
        parts += ["<h2>All runs</h2>", '<div class="pictures">', _figure(together), "</div>"]
    for sweep in sweeps:
        parts += _sweep(sweep)
    if len(runs) > 1:
        parts += ["<h2>Runs</h2>", _runs_table(runs, facts)]
        parts += _differences(runs)
        if details:
            parts.append("<h2>Run by run</h2>")
        if len(details) < len(runs):
            parts.append(
                f'<p class="quiet">{len(details)} of {len(runs)} runs are drawn: of each arm the best, the lowest entropy, '
                "then those that diverged. For others give their folders, or a larger --plots.</p>"
            )
    for detail in details:
        parts += _detail(detail, alone=len(runs) == 1)
    body = "\n".join(parts)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{_text(title)}</title>
<style>{STYLE}</style>
</head>
<body>
{body}
</body>
</html>
"""


def _text(value: Any) -> str:
    return html.escape(CONTROL.sub(" ", str(value)))


def _name(name: str) -> str:
    """A run's name as HTML that may be wrapped after commas."""
    return _text(name).replace(",", ",<wbr>")


def _list(items: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{_text(item)}</li>" for item in items) + "</ul>"


def _figure(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode()
    return (
        f'<figure><img alt="{_text(picture.caption)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{_text(picture.caption)}</figcaption></figure>"
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str, *, numbers: bool = True) -> str:
    """Renders a table of HTML cells; `numbers` aligns single words that begin with a digit or a sign to the right."""

    def cell(content: str) -> str:
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
    if not fields:
        return [*parts, "<p>Nothing: all runs have the same configuration.</p>"]
    if len(runs) <= MOST_COLUMNS:
        rows = [[_text(name), *(_text(_value(each)) for each in values)] for name, values in fields.items()]
        return [
            *parts,
            _table(["field", *(run.name for run in runs)], rows, "Fields that differ, by run", numbers=False),
        ]
    rows = []
    for name, values in fields.items():
        counts = Counter(_value(value) for value in values)
        most = [f"{_text(value)} <span class='quiet'>({count} runs)</span>" for value, count in counts.most_common(12)]
        rest = len(counts) - len(most)
        rows.append([_text(name), ", ".join(most) + (f" and {rest} more" if rest else "")])
    return [*parts, _table(["field", "values"], rows, "Fields that differ", numbers=False)]


def _value(value: Any) -> str:
    if value is None:
        return "not set"
    text = f"{value:g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}…"


def _sweep(sweep: Sweep) -> list[str]:
    rows = []
    for row in sensitivity.findings(sweep.table):
        loss = f"{row['loss']:.4g}" if math.isfinite(row["loss"]) else "diverged"
        rows.append(
            [
                _text(row["arm"]),
                loss,
                f"{row['rate']:g}",
                sensitivity.in_words(row["range"]),
                sensitivity.in_words(row["own"]),
                _number(row["sensitivity"], 3),
                _number(row["entropy"], 3),
            ]
        )
    seeds = sorted({len(each) for by_rate in sweep.table.values() for each in by_rate.values()})
    words = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    missing = f" {sweep.missing} of its runs have not ended, or failed, and are left out." if sweep.missing else ""
    return [
        f"<h2>Learning rates: {_text(sweep.folder)}</h2>",
        "<p>Loss is the mean of the last tenth of the logged training losses, and of these the median over seeds "
        f"({words} per rate). An arm trains where its loss is within {sensitivity.WITHIN:.0%} of the best of any arm. "
        "Sensitivity is the mean over rates of the loss, capped at the first loss, minus the arm's best loss (Wortsman et "
        f"al., 2023).{missing}</p>",
        '<div class="pictures">',
        _figure(sweep.picture),
        "<div>",
        _table(
            ("arm", "best loss", "at rate", "trains at", "of its own best", "sensitivity", "lowest entropy"),
            rows,
            "Arms of the sweep",
        ),
        "</div></div>",
    ]


def _section(environment: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = environment.get(name)
    return section if isinstance(section, dict) else {}


def _detail(detail: Detail, *, alone: bool) -> list[str]:
    run = detail.run
    versions, devices = (_section(run.environment, name) for name in ("packages", "devices"))
    facts = [run.folder, run.config.get("task")]
    if devices:
        facts.append(f"{devices.get('count')} x {devices.get('kind')}")
    if versions.get("jax"):
        facts.append(f"jax {versions['jax']}")
    if run.environment.get("git_revision"):
        facts.append(f"revision {str(run.environment['git_revision'])[:12]}")
    return [
        "" if alone else f"<h3>{_text(run.name)} {_state(run)}</h3>",
        f'<p class="quiet">{_text(" · ".join(str(fact) for fact in facts if fact))}</p>',
        "" if alone else _list(detail.sentences),
        '<div class="pictures">',
        *map(_figure, detail.pictures),
        "</div>",
    ]
