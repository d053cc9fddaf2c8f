"""Tables of a page as HTML: of runs, of fields that differ, of settings."""

import html
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from sigmarep.diagnostics.findings import Facts, differences
from sigmarep.diagnostics.runs import Run

# Largest number of runs whose configurations are compared in a table with one column per run.
MOST_COLUMNS = 8
# Characters that no text shows.
CONTROL = re.compile(r"[\x00-\x1f\x7f]")
# Characters of a field's value that are shown.
MOST_CHARACTERS = 200
# Fewer fields that differ are shown at once.
FEW_FIELDS = 8
LOSS_WORDS = (
    "The loss at the end, by which runs are judged, is the mean of the last tenth of their logged training losses."
)


def escaped(value: Any) -> str:
    """The value as HTML that is nothing but text, without control characters."""
    return html.escape(CONTROL.sub(" ", str(value)))


def name_of(name: str) -> str:
    """A run's name as HTML that may be wrapped after commas."""
    return escaped(name).replace(",", ",<wbr>")


def table(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str, *, numbers: bool = True) -> str:
    """Renders a table of HTML cells; `numbers` aligns single words that begin with a digit or a sign to the right."""

    def cell(content: str) -> str:
        content = content or "–"
        number = numbers and content[:1] in tuple("-0123456789") and " " not in content
        return f'<td class="number">{content}</td>' if number else f"<td>{content}</td>"

    head = "".join(f'<th scope="col">{escaped(name)}</th>' for name in header)
    body = "\n".join(f'<tr><th scope="row">{row[0]}</th>{"".join(map(cell, row[1:]))}</tr>' for row in rows)
    return (
        f'<p class="hint"></p><div class="table" tabindex="0" role="region" aria-label="{escaped(caption)}"><table>'
        f"<thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def state(run: Run) -> str:
    """The state of a run, colored."""
    return f'<span class="state {run.state.split()[0]}">{escaped(run.state)}</span>'


def _step(step: int | None) -> str:
    return "" if step is None else str(step)


def _lowest(entropy: float, layer: str, step: int) -> str:
    return f"<b>{entropy:.3g}</b> in {escaped(layer)} at step {step}"


def loss(value: float) -> str:
    """A loss at the end; that of a diverged run is ∞."""
    return f"{value:.4g}" if math.isfinite(value) else "diverged"


def number(value: float, digits: int = 4) -> str:
    """The number in so many digits; "" for NaN."""
    return "" if math.isnan(value) else f"{value:.{digits}g}"


def of_runs(runs: Sequence[Run], facts: Sequence[Facts]) -> str:
    """A row for each run."""
    header = (
        "run",
        "state",
        "steps",
        "last evaluation",
        "loss at the end (mean of the last tenth)",
        "lowest entropy, nats",
        "earliest collapse",
        "loss rose at step",
        "diverged at step",
        "spikes",
    )
    rows = []
    for run, each in zip(runs, facts, strict=True):
        steps = f"{run.last_step}/{run.total_steps}" if run.total_steps else str(run.last_step)
        rows.append(
            [
                name_of(run.name),
                state(run),
                steps,
                escaped(f"{each.final[0]} {each.final[1]:.4g}") if each.final else "",
                "" if each.loss is None else loss(each.loss),
                _lowest(*each.lowest) if each.lowest else "" if run.attends else "not defined",
                escaped(f"{each.earliest} at step {each.fell[0][1]}") if each.fell else "",
                _step(each.rose),
                _step(each.diverged) + (f", {escaped(each.cause)}" if each.cause else ""),
                "" if math.isnan(each.spikes) else f"{each.spikes:.3g}%",
            ]
        )
    return table(header, rows, "All runs")


def of_differences(runs: Sequence[Run]) -> list[str]:
    """Fields in which the configurations differ."""
    fields = differences(runs)
    parts = ["<h2>What differs between the configurations</h2>"]
    if not fields:
        return [*parts, "<p>Nothing: all runs have the same configuration.</p>"]
    if len(runs) <= MOST_COLUMNS:
        rows = [[escaped(name), *(escaped(_value(each)) for each in values)] for name, values in fields.items()]
        content = table(["field", *(run.name for run in runs)], rows, "Fields that differ, by run", numbers=False)
    else:
        rows = []
        for name, values in fields.items():
            counts = Counter(_value(value) for value in values)
            most = [
                f"{escaped(value)} <span class='quiet'>({_runs(count)})</span>"
                for value, count in counts.most_common(12)
            ]
            rest = len(counts) - len(most)
            rows.append([escaped(name), ", ".join(most) + (f" and {rest} more" if rest else "")])
        content = table(["field", "values"], rows, "Fields that differ", numbers=False)
    names = ", ".join(list(fields)[:FEW_FIELDS]) + (", …" if len(fields) > FEW_FIELDS else "")
    return [*parts, _folded(f"{_count(len(fields))}: {names}", content, shown=len(fields) <= FEW_FIELDS)]


def _folded(summary: str, content: str, *, shown: bool = False) -> str:
    return (
        f'<details class="settings"{" open" if shown else ""}><summary>{escaped(summary)}</summary>{content}</details>'
    )


def _runs(count: int) -> str:
    return f"{count} run{'' if count == 1 else 's'}"


def _count(fields: int) -> str:
    return f"{fields} field{'' if fields == 1 else 's'}"


def settings(run: Run) -> str:
    """All fields of a run, folded away; "" without any."""
    rows = [[escaped(name), escaped(_value(value))] for name, value in run.config.items()]
    content = table(["field", "value"], rows, "Settings", numbers=False)
    return _folded(f"Settings: {_count(len(rows))}", content) if rows else ""


def _value(value: Any) -> str:
    if value is None:
        return "not set"
    text = f"{value:g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}…"
