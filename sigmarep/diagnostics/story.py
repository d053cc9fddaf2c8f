"""The story around a run's own facts: what changed before a layer fell, and which run kept its attention."""

import collections
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sigmarep.diagnostics import sensitivity
from sigmarep.diagnostics.findings import SHARPNESS, Facts, Sentence, around, intervention
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
# More arms are spoken of together.
MOST_ARMS = 12
# A layer of so many nats is near to a collapse.
SHARP = 5 * COLLAPSED
RATE, LOSS = "optimizer.learning_rate", "train/loss"
# Of the process of an unfinished run (`Run.process`).
PROCESS_WORDS = {"running": "still going on", "ended": "stopped", "killed": "ended without a word"}
# Values of fields in which arms differ, for readers who have not met them.
MEANINGS = {
    ("model.norm", "pre"): "LayerNorm before each branch",
    ("model.norm", "post"): "LayerNorm after each branch",
    ("model.norm", "none"): "no LayerNorm",
    ("model.reparam", "none"): "plain kernels",
    ("model.reparam", "sigma"): "σReparam: kernels divided by their spectral norm, times a learned γ",
}


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
        """A layer came near to a collapse."""
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
    """The run most like this one that trained where this one did not; nothing without one."""
    if told.trained or not told.run.rows:
        return []
    candidates = []
    for place, other in enumerate(others):
        if not other.trained or other.run.config.get("task") != told.run.config.get("task"):
            continue
        fields = differing(told.run.config, other.run.config)
        if 0 < len(fields) <= MOST_DIFFERENCES:
            same_seed = other.run.config.get("seed") == told.run.config.get("seed")
            candidates.append((len(fields), not same_seed, place, other, fields))
    if not candidates:
        return []
    *_, other, fields = min(candidates, key=lambda each: each[:3])
    changes = listed([f"{name} {_shown(new)} instead of {_shown(old)}" for name, (old, new) in fields.items()])
    return [
        Sentence(
            f"{other.run.name} {_spared(told, other)}: it has {changes}. {_result(other, told)}".strip(),
            "all entropies",
        )
    ]


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


def arms(told: Sequence[Told], arm: Mapping[str, Sequence[int]]) -> list[Sentence]:
    """A sentence on each arm: how many of its runs collapsed or diverged, which layer fell first, and its results.

    Args:
      arm: places in `told` of the runs of each arm.
    """
    texts = []
    for name, places in arm.items():
        members = [told[i] for i in places if told[i].run.rows]
        if not members:
            continue
        words = [*_fallen(members), *_diverged(members)]
        change = intervention(members[0].run) if len(members) == 1 else None
        if change and (changes := around(members[0].run, change[0])):
            words.append(f"at the change on purpose {changes}")
        results = [each.facts.final for each in members if each.facts.final]
        if results and len({metric for metric, _ in results}) == 1:
            words.append(f"{results[0][0]} {_span([value for _, value in results])}")
        texts.append((-sum(each.trained for each in members) / len(members), f"{name}: {'; '.join(words)}."))
    return [Sentence(text, "all entropies") for _, text in sorted(texts, key=lambda each: each[0])]


def _fallen(members: Sequence[Told]) -> list[str]:
    recorded = [each for each in members if each.facts.lowest]
    fallen = [each for each in recorded if each.collapsed]
    if not recorded:
        return ["no attention entropy recorded"]
    lowest = _span([each.facts.lowest[0] for each in recorded if each.facts.lowest], 3)
    if not fallen:
        return [f"no layer collapsed, lowest entropy {lowest} nats", *_rose(members)]
    first: dict[str, list[Told]] = {}
    for each in fallen:
        first.setdefault(each.facts.fell[0][0], []).append(each)
    layers = [
        f"{layer} first by step {_span([each.facts.fell[0][1] for each in those])}"
        + (_at_rates(members, those) if len(first) > 1 else "")
        for layer, those in first.items()
    ]
    count = f"{len(fallen)} of {len(members)} runs" if len(members) > 1 else "attention"
    return [f"{count} collapsed{_at_rates(members, fallen)}, {listed(layers)}, lowest entropy {lowest} nats"]


def _rose(members: Sequence[Told]) -> list[str]:
    steps = [step for each in members if (step := each.facts.rose) is not None and each.facts.diverged is None]
    if not steps:
        return []
    return [
        f"the loss rose at step {_span(steps)}"
        + (f" in {len(steps)} of {len(members)} runs" if len(members) > 1 else "")
    ]


def _at_rates(members: Sequence[Told], those: Sequence[Told]) -> str:
    """At which learning rates of a sweep the runs of `those` were made; "" where all runs have one rate."""
    rates = {place[1] for each in members if (place := sensitivity.place(each.run.point))}
    chosen = sorted({place[1] for each in those if (place := sensitivity.place(each.run.point))})
    if len(rates) < 2:
        return ""
    return f" (at learning rate{'' if len(chosen) == 1 else 's'} {listed([f'{rate:g}' for rate in chosen])})"


def _diverged(members: Sequence[Told]) -> list[str]:
    lost = [each for each in members if each.facts.diverged is not None]
    steps = [step for each in lost if (step := each.facts.diverged) is not None]
    if not steps:
        return []
    count = f"{len(steps)} of {len(members)} runs " if len(members) > 1 else ""
    return [f"{count}diverged{_at_rates(members, lost)} at step {_span(steps)}"]


def _span(values: Sequence[float], digits: int = 4) -> str:
    low, high = f"{min(values):.{digits}g}", f"{max(values):.{digits}g}"
    return low if low == high else f"{low} to {high}"


def _shown(value: Any) -> str:
    return "not set" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def listed(items: Sequence[str]) -> str:
    return f"{', '.join(items[:-1])} and {items[-1]}" if len(items) > 1 else "".join(items)


def overview(told: Sequence[Told], arm: Mapping[str, Sequence[int]]) -> list[Sentence]:
    """Sentences that tell a reader about several runs together.

    Args:
      arm: places in `told` of the runs of each arm.
    """
    states = collections.Counter(each.run.state for each in told)
    texts = [Sentence(f"{len(told)} runs: {', '.join(f'{count} {state}' for state, count in states.most_common())}.")]
    processes = collections.Counter(PROCESS_WORDS[each.run.process] for each in told if each.run.process)
    if processes:
        counts = ", ".join(f"{count} {words}" for words, count in processes.most_common())
        texts.append(Sentence(f"Of the unfinished: {counts}. The command that began a run goes on with it."))
    diverged = [(each.facts.diverged, each.run.name) for each in told if each.facts.diverged is not None]
    if diverged:
        step, name = min(diverged)
        causes = collections.Counter(each.facts.cause for each in told if each.facts.cause is not None)
        words = f" Causes: {', '.join(f'{count} {cause}' for cause, count in causes.most_common())}." if causes else ""
        count = f"{len(diverged)} run{'' if len(diverged) == 1 else 's'}"
        texts.append(Sentence(f"{count} diverged, {name} earliest, at step {step}.{words}", "all losses"))
    texts += _changed(told)
    if len(arm) > MOST_ARMS:
        return texts + _entropies_of_many(told)
    return [*texts, *_contents(told, arm), *arms(told, arm)]


def _changed(told: Sequence[Told]) -> list[Sentence]:
    """The change on purpose of the runs, and which of them was ahead before it."""
    changes: dict[tuple[int, str], list[Told]] = {}
    for each in told:
        if change := intervention(each.run):
            changes.setdefault(change, []).append(each)
    texts = []
    for (step, words), members in list(changes.items())[:MOST_NAMED]:
        which = f"{len(members)} of {len(told)}" if len(members) < len(told) else "All"
        text = f"{which} runs were changed on purpose after step {step}: {words}."
        losses = sorted((loss, each.run.name) for each in members if (loss := _at(each.run, LOSS, step)) is not None)
        if len(losses) > 1:
            (best, name), (worst, last) = losses[0], losses[-1]
            text += f" Before it the loss was lowest in {name}, {best:.3g}, and highest in {last}, {worst:.3g}."
        texts.append(Sentence(text, "all losses"))
    return texts


def _contents(told: Sequence[Told], arm: Mapping[str, Sequence[int]]) -> list[Sentence]:
    """The fields in which the arms differ, with the values of each; nothing where these are too many, or names alone."""
    configs = {name: [told[i].run.config for i in places if told[i].run.config] for name, places in arm.items()}
    if len(arm) < 2 or not all(configs.values()):
        return []
    values: dict[str, list[Any]] = {}
    for field in configs[next(iter(configs))][0]:
        each = [[config.get(field) for config in members] for members in configs.values()]
        constant = all(value == members[0] for members in each for value in members)
        firsts = [members[0] for members in each]
        if constant and not field.startswith((*ASIDE, RATE)) and any(value != firsts[0] for value in firsts):
            values[field] = firsts
    if not 0 < len(values) <= MOST_DIFFERENCES:
        return []
    texts = []
    for i, name in enumerate(configs):
        fields = [f"{field} {_meaning(field, column[i])}" for field, column in values.items()]
        texts.append(f"{name} has {listed(fields)}")
    return [Sentence(f"The arms differ in {listed(list(values))}: {'; '.join(texts)}.")]


def _meaning(field: str, value: Any) -> str:
    words = MEANINGS.get((field, str(value)))
    return f"{_shown(value)} ({words})" if words else _shown(value)


def _entropies_of_many(told: Sequence[Told]) -> list[Sentence]:
    texts = []
    recorded = [each for each in told if each.facts.lowest]
    fallen = [each for each in recorded if each.collapsed]
    if fallen:
        firsts = collections.Counter(each.facts.fell[0][0] for each in fallen)
        layer, count = firsts.most_common(1)[0]
        before = sum(each.facts.rose is not None and each.facts.fell[0][1] < each.facts.rose for each in fallen)
        never = sum(each.facts.rose is None for each in fallen)
        texts.append(
            f"In {len(fallen)} of {len(recorded)} runs with a record, a layer's attention entropy fell below {COLLAPSED} "
            f"nats, most often {layer} first ({count} of {len(fallen)}). It fell before the loss rose in {before} of "
            f"these; in {never} the loss had no lasting rise."
        )
    elif recorded:
        texts.append(f"No layer's attention entropy fell below {COLLAPSED} nats in any run.")
    lowest = [(each.facts.lowest, each.run.name) for each in told if each.facts.lowest]
    if lowest:
        (value, layer, step), name = min(lowest)
        texts.append(f"The lowest entropy of all was {value:.3g} nats in {layer} at step {step} of {name}.")
    return [Sentence(text, "all entropies") for text in texts]
