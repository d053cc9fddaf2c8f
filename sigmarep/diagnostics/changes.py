"""Changes on purpose in the middle of a run, and what the run did after them."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from sigmarep.diagnostics import curves
from sigmarep.diagnostics.files import number
from sigmarep.diagnostics.runs import Run

LOSS, LOWEST = "train/loss", "attention/entropy_min"
# Verdicts on a run after a change, in words that follow its name.
UNHARMED, RECOVERED, LOST = "was not set back", "recovered", "did not recover"
# The definition of these words, for readers.
DEFINITION = (
    "Recovered: the loss at the end is not above that just before the change, the mean of up to three logged ones"
)
# Losses just before a change that are averaged: one alone is that of a batch.
BEFORE = 3


class Course(NamedTuple):
    """A metric around a change.

    Attributes:
      before: the mean of the last `BEFORE` losses logged before it, or the last entropy.
      worst: the highest loss, or lowest entropy, logged after it, at step `at`.
      end: loss at the end (`curves.at_end`), or the last entropy.
      last: the last step.
      back: the first step from which on every value is as good as `before`; None without one.
    """

    before: float
    worst: float
    at: int
    end: float
    last: int
    back: int | None


def intervention(run: Run) -> tuple[int, str] | None:
    """The step after which the run was changed on purpose, and the change in words; None without a change so far."""
    step = number(run.config.get("intervention.at_steps"))
    if step is None or not math.isfinite(step) or run.last_step <= step:
        return None
    temperature = number(run.config.get("intervention.attention_temperature"))
    sharper = ", which makes attention " + ("sharper" if (temperature or 1) < 1 else "flatter")
    factors = {
        "attention temperature": (temperature, sharper),
        "learning rate": (number(run.config.get("intervention.learning_rate_factor")), ""),
    }
    words = [
        f"{name} times {factor:g}{effect}"
        for name, (factor, effect) in factors.items()
        if factor is not None and factor != 1
    ]
    return (int(step), ", ".join(words)) if words else None


def course(run: Run, name: str, step: int) -> Course | None:
    """The course of the loss, or the lowest entropy, around a change after a step; None where it was not logged."""
    sign = 1 if name == LOSS else -1
    points = [point for point in zip(*run.series(name), strict=True) if math.isfinite(point[1])]
    earlier = [value for at, value in points if at <= step]
    later = [(at, value) for at, value in points if at > step]
    if not earlier or not later:
        return None
    before = sum(earlier[-BEFORE:]) / len(earlier[-BEFORE:]) if name == LOSS else earlier[-1]
    at, worst = max(later, key=lambda point: sign * point[1])
    lasting = itertools.takewhile(lambda point: sign * point[1] <= sign * before, reversed(later))
    back = min((when for when, _ in lasting), default=None)
    values = [value for _, value in later]
    # The loss at the end is that of all logged losses, of which those before the change are none.
    count = min(curves.tenth(len(points)), len(values))
    end = sum(values[-count:]) / count if name == LOSS else values[-1]
    return Course(before, worst, at, end, later[-1][0], back)


def verdict(run: Run, step: int) -> str | None:
    """`UNHARMED`, `RECOVERED` or `LOST`: the loss of a run after a change; None where it was not logged."""
    if run.state == "diverged":
        return LOST
    loss = course(run, LOSS, step)
    if loss is None:
        return None
    return UNHARMED if loss.worst <= loss.before else RECOVERED if loss.end <= loss.before else LOST


def aftermath(run: Run, step: int) -> str:
    """Sentences on what a run did after a change: its loss, its lowest entropy, whether it recovered; "" for nothing."""
    texts = []
    if loss := course(run, LOSS, step):
        texts.append(
            f"Its loss was {loss.before:.3g} just before, {loss.worst:.3g} at its highest after it (at step {loss.at}) and "
            f"{loss.end:.3g} at the end: the run {_ending(run, loss, verdict(run, step))}."
        )
    if entropy := course(run, LOWEST, step):
        # A layer that has most of its entropy back has recovered it.
        regained = entropy.end >= 0.9 * entropy.before
        stayed = "" if regained else ": it stayed lower"
        texts.append(
            f"The lowest entropy of any layer was {entropy.before:.3g} nats just before, {entropy.worst:.3g} at its lowest "
            f"after it (at step {entropy.at}) and {entropy.end:.3g} at the end{stayed}."
        )
    return " ".join(texts)


def _ending(run: Run, loss: Course, judged: str | None) -> str:
    if judged == UNHARMED:
        return f"{UNHARMED}, no loss after it was higher"
    if judged == RECOVERED:
        return RECOVERED if loss.back is None else f"{RECOVERED}, for good from step {loss.back} on"
    if run.state == "diverged":
        return f"{LOST}, it diverged"
    return f"{LOST} by step {loss.last}, {'the last' if run.state == 'done' else 'the last so far'}"


def of_members(runs: Sequence[Run], step: int) -> list[str]:
    """Clauses on several runs of an arm: how many recovered from a change after a step, to which losses and entropies."""
    verdicts = [judged for run in runs if (judged := verdict(run, step))]
    words = []
    for judged in (UNHARMED, RECOVERED, LOST):
        if count := verdicts.count(judged):
            words.append(f"{f'{count} of {len(runs)} runs ' if len(runs) > 1 else 'it '}{judged}")
    if not words:
        return []
    parts = []
    for name, label in ((LOSS, "loss"), (LOWEST, "lowest entropy")):
        courses = [each for run in runs if (each := course(run, name, step))]
        if courses:
            ends = [curves.span([getattr(each, field) for each in courses], 3) for field in ("before", "worst", "end")]
            extreme = "highest" if name == LOSS else "lowest"
            parts.append(f"{label} {ends[0]} just before, {ends[1]} at its {extreme} after it, {ends[2]} at the end")
    values = f" ({'; '.join(parts)})" if parts else ""
    return [f"after the change on purpose {', '.join(words)}{values}"]
