"""The story of several runs together: what was done to them, how arms differ, and what became of each arm."""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

from sigmarep.diagnostics import changes, sensitivity
from sigmarep.diagnostics.changes import LOSS, intervention
from sigmarep.diagnostics.curves import span
from sigmarep.diagnostics.findings import NEAR, NOT_DEFINED, Sentence
from sigmarep.diagnostics.story import ASIDE, MOST_DIFFERENCES, MOST_NAMED, RATE, Told, listed, shown
from sigmarep.training.diagnosis import COLLAPSED

# More layers than these, each the earliest to fall in some run of an arm, are not told one by one.
MOST_LAYERS = 2
# More arms are spoken of together.
MOST_ARMS = 12
# Of the process of an unfinished run (`Run.process`).
PROCESS_WORDS = {"running": "still going on", "ended": "stopped", "killed": "ended without a word"}
# Values of fields in which arms differ, for readers who have not met them.
MEANINGS = {
    ("model.norm", "pre"): "LayerNorm before each branch",
    ("model.norm", "post"): "LayerNorm after each branch",
    ("model.norm", "none"): "no LayerNorm",
    ("model.reparam", "none"): "plain kernels",
    ("model.reparam", "weight"): "weight normalization: a learned gain for each output",
    ("model.reparam", "spectral"): "spectral normalization: kernels of spectral norm 1",
    ("model.reparam", "sigma"): "σReparam: kernels divided by their spectral norm, times a learned γ",
}


def arms(told: Sequence[Told], arm: Mapping[str, Sequence[int]]) -> list[Sentence]:
    """A sentence on each arm: how many of its runs collapsed or diverged, which layer fell earliest, and its results.

    Args:
      arm: places in `told` of the runs of each arm.
    """
    texts = []
    for name, places in arm.items():
        members = [told[i] for i in places if told[i].run.rows]
        if not members:
            continue
        words = [*_fallen(members), *_diverged(members)]
        steps = {change[0] for each in members if (change := intervention(each.run))}
        if len(steps) == 1:
            words += changes.of_members([each.run for each in members], steps.pop())
        results = [each.facts.final for each in members if each.facts.final]
        if results and len({metric for metric, _ in results}) == 1:
            words.append(f"{results[0][0]} {span([value for _, value in results])}")
        texts.append((-sum(each.trained for each in members) / len(members), f"{name}: {'; '.join(words)}."))
    return [Sentence(text, "all entropies") for _, text in sorted(texts, key=lambda each: each[0])]


def _fallen(members: Sequence[Told]) -> list[str]:
    recorded = [each for each in members if each.facts.lowest]
    fallen = [each for each in recorded if each.collapsed]
    if not recorded:
        return ["no attention entropy recorded" if any(each.run.attends for each in members) else NOT_DEFINED]
    lowest = span([each.facts.lowest[0] for each in recorded if each.facts.lowest], 3)
    if not fallen:
        lost = any(each.facts.diverged is not None for each in members)
        words = f"no layer {'was logged as ' if lost else ''}collapsed, lowest entropy {lowest} nats"
        value, layer, step = min(each.facts.lowest for each in recorded if each.facts.lowest)
        if value < NEAR:
            near = f"{layer} came near: {value:.3g} nats at step {step}, against {COLLAPSED}"
            words = f"no layer {'was logged as ' if lost else ''}collapsed, but {near}"
        return [words, *_rose(members)]
    earliest: dict[str, list[Told]] = {}
    for each in fallen:
        earliest.setdefault(each.facts.earliest, []).append(each)
    layers = [
        f"{layer}, by step {span([each.facts.fell[0][1] for each in those])}"
        + (_at_rates(members, those) if len(earliest) > 1 else "")
        for layer, those in earliest.items()
    ]
    if len(earliest) > MOST_LAYERS:
        first, those = max(earliest.items(), key=lambda item: len(item[1]))
        steps = span([each.facts.fell[0][1] for each in those])
        layers = [f"{first}, by step {steps}, in {len(those)} of these, and others elsewhere"]
    count = f"{len(fallen)} of {len(members)} runs" if len(members) > 1 else "attention"
    where = f"earliest to fall: {listed(layers)}"
    return [f"{count} collapsed{_at_rates(members, fallen)}", where, f"lowest entropy {lowest} nats"]


def _rose(members: Sequence[Told]) -> list[str]:
    steps = [step for each in members if (step := each.facts.rose) is not None and each.facts.diverged is None]
    if not steps:
        return []
    return [
        f"the loss rose at step {span(steps)}"
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
    return [f"{count}diverged{_at_rates(members, lost)} at step {span(steps)}"]


def overview(told: Sequence[Told], arm: Mapping[str, Sequence[int]]) -> list[Sentence]:
    """Sentences that tell a reader about several runs together.

    Args:
      arm: places in `told` of the runs of each arm.
    """
    states = collections.Counter(each.run.state for each in told)
    texts = [Sentence(f"{len(told)} runs: {', '.join(f'{count} {state}' for state, count in states.most_common())}.")]
    revisions = collections.Counter(str(each.run.environment.get("git_revision") or "unknown") for each in told)
    if len(revisions) > 1:
        shares = ", ".join(f"{revision[:12]} ({count})" for revision, count in revisions.most_common(MOST_NAMED))
        more = ", …" if len(revisions) > MOST_NAMED else ""
        texts.append(Sentence(f"They were made by {len(revisions)} revisions of the code: {shares}{more}."))
    processes = collections.Counter(PROCESS_WORDS[each.run.process] for each in told if each.run.process)
    if processes:
        counts = ", ".join(f"{count} {words}" for words, count in processes.most_common())
        texts.append(Sentence(f"Unfinished: {counts}. The command that began a run continues it."))
    diverged = [(each.facts.diverged, each.run.name) for each in told if each.facts.diverged is not None]
    if diverged:
        step, name = min(diverged)
        ties = sum(at == step for at, _ in diverged) - 1
        also = f" and {ties} more" if ties else ""
        causes = collections.Counter(each.facts.cause for each in told if each.facts.cause is not None)
        words = f" Causes: {', '.join(f'{count} {cause}' for cause, count in causes.most_common())}." if causes else ""
        count = f"{len(diverged)} run{'' if len(diverged) == 1 else 's'}"
        texts.append(Sentence(f"{count} diverged, the earliest at step {step}: {name}{also}.{words}", "all losses"))
    texts += _changed(told)
    if len(arm) > MOST_ARMS:
        return texts + _entropies_of_many(told)
    return [*texts, *_contents(told, arm), *arms(told, arm)]


def _changed(told: Sequence[Told]) -> list[Sentence]:
    """The change on purpose of the runs, which of them was ahead before it, and which recovered."""
    changed: dict[tuple[int, str], list[Told]] = {}
    for each in told:
        if change := intervention(each.run):
            changed.setdefault(change, []).append(each)
    texts = []
    for (step, words), members in list(changed.items())[:MOST_NAMED]:
        which = f"{len(members)} of {len(told)}" if len(members) < len(told) else "All"
        text = f"{which} runs were changed on purpose after step {step}: {words}."
        before = [(each.run.name, changes.course(each.run, LOSS, step)) for each in members]
        losses = sorted((course.before, name) for name, course in before if course)
        if len(losses) > 1:
            (best, name), (worst, last) = losses[0], losses[-1]
            text += f" Before it the loss was lowest in {name}, {best:.3g}, and highest in {last}, {worst:.3g}."
        texts.append(Sentence(text, "all losses"))
        by_verdict: dict[str, list[str]] = {}
        for each in members:
            if verdict := changes.verdict(each.run, step):
                by_verdict.setdefault(verdict, []).append(each.run.name)
        clauses = [
            f"{listed(names) if len(names) <= MOST_NAMED else f'{len(names)} runs'} {verdict}"
            for verdict in (changes.UNHARMED, changes.RECOVERED, changes.LOST)
            if (names := by_verdict.get(verdict))
        ]
        if clauses:
            text = f"After it, up to the last step, {listed(clauses)}. {changes.DEFINITION}."
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
    # A list says little in a sentence; the table of fields that differ has it.
    lists = [field for field, column in values.items() if any(isinstance(value, list) for value in column)]
    for field in lists:
        every = dict.fromkeys(str(item) for value in values[field] if isinstance(value, list) for item in value)
        values[field] = [_without(value, every) if isinstance(value, list) else value for value in values[field]]
    texts = []
    for field, column in values.items():
        by_value: dict[str, list[str]] = {}
        for name, value in zip(configs, column, strict=True):
            by_value.setdefault(_meaning(field, value), []).append(name)
        texts.append(f"{field} is {'; '.join(f'{value} in {listed(names)}' for value, names in by_value.items())}")
    return [Sentence(f"What the arms differ in: {'. '.join(texts)}.")]


def _without(items: Sequence[Any], every: Mapping[str, None]) -> str:
    """A list in words, by what it lacks of all that any arm's has."""
    lacking = [item for item in every if item not in map(str, items)]
    return f"without {listed(lacking)}" if lacking else f"with all {len(every)}"


def _meaning(field: str, value: Any) -> str:
    words = MEANINGS.get((field, str(value)))
    return f"{shown(value)} ({words})" if words else shown(value)


def _entropies_of_many(told: Sequence[Told]) -> list[Sentence]:
    texts = []
    recorded = [each for each in told if each.facts.lowest]
    fallen = [each for each in recorded if each.collapsed]
    if fallen:
        firsts = collections.Counter(each.facts.earliest for each in fallen)
        layer, count = firsts.most_common(1)[0]
        before = sum(each.facts.rose is not None and each.facts.fell[0][1] < each.facts.rose for each in fallen)
        never = sum(each.facts.rose is None for each in fallen)
        texts.append(
            f"In {len(fallen)} of {len(recorded)} runs with a record, a layer's attention entropy fell below {COLLAPSED} "
            f"nats, most often {layer} earliest ({count} of {len(fallen)}). It fell before the loss rose in {before} of "
            f"these; in {never} the loss had no lasting rise."
        )
    elif recorded:
        texts.append(f"No layer's attention entropy fell below {COLLAPSED} nats in any run.")
    lowest = [(each.facts.lowest, each.run.name) for each in told if each.facts.lowest]
    if lowest:
        (value, layer, step), name = min(lowest)
        texts.append(f"The lowest entropy of all was {value:.3g} nats in {layer} at step {step} of {name}.")
    return [Sentence(text, "all entropies") for text in texts]
