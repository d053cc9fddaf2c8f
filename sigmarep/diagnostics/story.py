"""The story around a run's own facts: what changed before a layer fell, and which run most like it kept its attention."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sigmarep.diagnostics.changes import intervention
from sigmarep.diagnostics.findings import SHARPNESS, Facts, Sentence
from sigmarep.diagnostics.names import kind_and_stack
from sigmarep.diagnostics.runs import Run
from sigmarep.training.diagnosis import COLLAPSED, ENTROPY

# A layer's entropy begins to fall when it leaves this share of its highest value.
LEFT = 0.9
# Quantities that grew by this factor while it fell are named, at most so many.
GREW, MOST_NAMED = 1.5, 3
# Of the plots that show them.
TOPICS = ("attention/max_logit/", "spectral/sigma/", *SHARPNESS)
# Runs that differ in more fields are no comparison of these.
MOST_DIFFERENCES = 6
# Fields that tell of where and how long a run ran, not of what it is.
ASIDE = ("seed", "total_", "log_every", "eval_every", "checkpoint_every", "writers.", "keep_checkpoints", "data.num_")
# A layer of so many nats has sharp attention.
SHARP = 5 * COLLAPSED
RATE = "optimizer.learning_rate"


class Told(NamedTuple):
    """A run and its facts."""

    run: Run
    facts: Facts

    @property
    def collapsed(self) -> bool:
        return bool(self.facts.fell)

    @property
    def trained(self) -> bool:
        """It ended, or goes on, without a collapse, a divergence or a loss that rose."""
        return bool(self.run.rows) and not self.collapsed and self.facts.diverged is None and self.facts.rose is None

    @property
    def sharp(self) -> bool:
        """A layer's attention was sharp."""
        return self.facts.lowest is not None and self.facts.lowest[0] < SHARP


def before(run: Run, facts: Facts) -> list[Sentence]:
    """Changes while the first layer fell: its logits, its kernels, gradients; and where the learning rate was."""
    if not facts.fell:
        return []
    layer, fallen = facts.fell[0]
    steps, values = run.series(ENTROPY + layer)
    earlier = [(step, value) for step, value in zip(steps, values, strict=True) if step <= fallen]
    highest = max((value for _, value in earlier if math.isfinite(value)), default=math.nan)
    begins = [step for step, value in earlier if value >= LEFT * highest]
    if not begins or begins[-1] == fallen:
        return []
    start = begins[-1]
    names = {f"attention/max_logit/{layer}": f"the largest logit of {layer}"}
    names |= {
        name: f"σ of {name.removeprefix('spectral/sigma/')}"
        for name in run.names
        if name.startswith(f"spectral/sigma/{layer}/") and kind_and_stack(name)[0] in ("query", "key", "qkv")
    }
    names |= {"train/gradient_norm": "the gradient norm"} | {name: "sharpness" for name in SHARPNESS}
    grown = []
    for name, words in names.items():
        ends = (_at(run, name, start), _at(run, name, fallen))
        if ends[0] is not None and ends[1] is not None and ends[1] >= GREW * ends[0] > 0:
            grown.append((ends[1] / ends[0], words, f"from {ends[0]:.3g} to {ends[1]:.3g}", name))
    grown.sort(reverse=True)
    told = [
        f"{words} {'' if i else 'grew '}{ends}" for i, (_, words, ends, _) in enumerate(grown[:MOST_NAMED])
    ]  # "a grew from 1 to 9, b from 2 to 8"
    what = listed(told) or f"none of the recorded logits, norms and gradients grew by a factor of {GREW:g}"
    text = f"Before that, between steps {start} and {fallen}, {what}."
    named = [name for *_, name in grown[:MOST_NAMED]]
    topics = [prefix for name in named for prefix in TOPICS if name.startswith(prefix)]
    return [Sentence(text, next(iter(topics), None), more=tuple(topics[1:])), *_rate(run, fallen)]


def _rate(run: Run, step: int) -> list[Sentence]:
    """The place of the learning rate in its schedule at a step."""
    rates = [value for value in run.series("train/learning_rate").values if math.isfinite(value)]
    rate = _at(run, "train/learning_rate", step)
    if rate is None or not rates or not rate > 0:
        return []
    place = "its highest" if rate >= 0.99 * max(rates) else f"{rate / max(rates):.0%} of its highest, {max(rates):.3g}"
    return [Sentence(f"The learning rate was then {rate:.3g}, {place}.", "train/learning_rate")]


def _at(run: Run, name: str, step: int) -> float | None:
    """The last finite value of a metric up to a step."""
    steps, values = run.series(name)
    known = [value for at, value in zip(steps, values, strict=True) if at <= step and math.isfinite(value)]
    return known[-1] if known else None


def elsewhere(told: Told, others: Sequence[Told]) -> list[Sentence]:
    """The run most like this one that trained where this one did not; nothing without one.

    Where that one differs in the learning rate alone, the nearest one of this rate follows: another arm's.
    """
    if told.trained or not told.run.rows:
        return []
    candidates = []
    for place, other in enumerate(others):
        if not other.trained or other.run.config.get("task") != told.run.config.get("task"):
            continue
        fields = differing(told.run.config, other.run.config)
        if 0 < len(fields) <= MOST_DIFFERENCES:
            candidates.append((*distance(told, other, fields), place, other, fields))
    if not candidates:
        return []
    candidates.sort(key=lambda each: each[:4])
    *_, other, fields = candidates[0]
    one = "setting" if len(fields) == 1 else "settings"
    texts = [_compared(told, other, fields, f"nearest of the runs that trained, {len(fields)} {one} away")]
    same_rate = [each for each in candidates if RATE not in each[-1]]
    if list(fields) == [RATE] and same_rate:
        texts.append(_compared(told, same_rate[0][-2], same_rate[0][-1], "nearest at the same learning rate"))
    return [Sentence(text, "all entropies") for text in texts]


def distance(told: Told, other: Told, fields: Mapping[str, tuple[Any, Any]]) -> tuple[int, float, bool]:
    """Key that sorts other runs by their likeness to this one: fewest fields, nearest numbers, same seed.

    Args:
      fields: those that differ (`differing`).
    """
    apart = sum(
        abs(math.log(new / old)) if all(type(each) in (int, float) and each > 0 for each in (new, old)) else 1.0
        for old, new in fields.values()
    )
    return len(fields), apart, other.run.config.get("seed") != told.run.config.get("seed")


def _compared(told: Told, other: Told, fields: Mapping[str, tuple[Any, Any]], why: str) -> str:
    """A sentence on the settings that another run has in place of this one's, and on its results."""
    changes = listed([f"{name} {shown(new)} instead of {shown(old)}" for name, (old, new) in fields.items()])
    words = f"Compare {other.run.name} ({why}): it has {changes}. It {_spared(told, other)}."
    if len(fields) > 1:
        words += " These settings changed together: which of them did it, the two runs do not tell."
    return f"{words} {_result(other, told)}".strip()


def _spared(told: Told, other: Told) -> str:
    """The difference of this run from the other, in words."""
    words = []
    if told.collapsed:
        words.append("no collapse")
    if told.facts.diverged is not None:
        words.append("no divergence")
    elif told.facts.rose is not None:
        words.append("no lasting rise of its loss")
    changed = intervention(told.run)
    same = " after the same change on purpose" if changed and changed == intervention(other.run) else ""
    return f"had {listed(words)}{same}"


def _result(other: Told, than: Told) -> str:
    """The lowest entropy and the result of a run, beside the result of another."""
    results = []
    if other.facts.lowest:
        results.append(f"lowest entropy is {other.facts.lowest[0]:.3g} nats")
    ours, theirs = than.facts.final, other.facts.final
    if theirs:
        name, value = theirs
        compared = f" (here {ours[1]:.4g})" if ours and ours[0] == name else ""
        results.append(f"{name} is {value:.4g}{compared}")
    return f"Its {', its '.join(results)}." if results else ""


def differing(config: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Fields that make runs of two configurations different experiments, with both values."""
    names = dict.fromkeys([*config, *other])
    pairs = {name: (config.get(name), other.get(name)) for name in names if not name.startswith(ASIDE)}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def shown(value: Any) -> str:
    return "not set" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def listed(items: Sequence[str]) -> str:
    return f"{', '.join(items[:-1])} and {items[-1]}" if len(items) > 1 else "".join(items)
