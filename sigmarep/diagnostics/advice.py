"""Advice: how an unfinished run goes on, and the change that speaks for itself, each as a command."""

import math
import os
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sigmarep.diagnostics.changes import LOSS, intervention
from sigmarep.diagnostics.files import number
from sigmarep.diagnostics.findings import Sentence
from sigmarep.diagnostics.runs import CONFIG
from sigmarep.diagnostics.story import MOST_NAMED, RATE, Told, differing, distance, listed
from sigmarep.remedies import ARMS, SIGMA

# Fields in which arms often differ together, so that neither tells of its own part.
PAIR = ("model.norm", "model.reparam")
# Fields of a change on purpose, each 1 for none.
FACTORS = ("attention_temperature", "learning_rate_factor")
# A learning rate is changed by this factor.
RATE_FACTOR = 3.0
# Kinds of advice, that which tells most first, as words for what has been tried.
WORDS = {
    "sigma": "the arm sigma (σReparam and post-LN)",
    "seed": "another seed",
    "clipped": "clipped gradients",
    "slower": f"a learning rate {RATE_FACTOR:g} times lower",
    "control": "a control without the change on purpose",
    "longer": "a longer run",
    "faster": f"a learning rate {RATE_FACTOR:g} times higher",
}
# So many pieces of advice are given on several runs together.
MOST_ADVICE = 3


class Remedy(NamedTuple):
    """A change that speaks for itself.

    Attributes:
      kind: of `WORDS`; "" for a remedy that is no change of settings.
      what: the change and the reason for it, in words.
      changes: values of the fields to change.
    """

    kind: str
    what: str
    changes: dict[str, Any]


class Proposal(NamedTuple):
    """What to try next, as `Remedy` has it, and the command that does; "" without one."""

    kind: str
    what: str
    command: str


def next_step(told: Told, others: Sequence[Told]) -> list[Sentence]:
    """The next thing to try, as a command that makes a new run in a folder of its own.

    Where one of the others has tried it, the command repeats that one with another seed.
    """
    going_on = unfinished(told) if told.run.state == "unfinished" else []
    proposal = _proposal(told, others)
    if isinstance(proposal, Proposal):
        return [*going_on, Sentence(f"To try next: {proposal.what}.", command=proposal.command)]
    return [*going_on, *([Sentence(proposal)] if proposal else [])]


def ranked(told: Sequence[Told]) -> list[Sentence]:
    """Advice on several runs together, that which tells most first: `separate`, then one command of each kind."""
    sentences = separate(told)
    kinds: dict[str, list[tuple[Told, Proposal]]] = {}
    for each in told:
        proposal = _proposal(each, told)
        if isinstance(proposal, Proposal) and proposal.command:
            kinds.setdefault(proposal.kind, []).append((each, proposal))
    for kind in sorted(kinds, key=list(WORDS).index):
        members = kinds[kind]
        run, proposal = members[0][0].run, members[0][1]
        more = f" and {len(members) - 1} more" if len(members) > 1 else ""
        text = f"For {run.name}{more}: {proposal.what}."
        sentences.append(Sentence(text, command=proposal.command))
    return sentences[:MOST_ADVICE]


def unfinished(told: Told) -> list[Sentence]:
    """The state of an unfinished run in words, and how it goes on."""
    run, facts = told.run, told.facts
    losses = [value for value in run.series(LOSS).values if math.isfinite(value)]
    if not losses:
        so_far = ""
    elif facts.short:
        so_far = f"So far {len(losses)} losses are logged, too few to tell. "
    else:
        troubles = [
            *(["a layer fell"] if told.collapsed else []),
            *(["the loss rose"] if facts.rose is not None else []),
        ]
        calm = "no layer fell and the loss had no lasting rise" if facts.lowest else "the loss had no lasting rise"
        so_far = f"So far the loss went from {losses[0]:.3g} to {losses[-1]:.3g}; {listed(troubles) or calm}. "
    trouble = told.collapsed or facts.rose is not None
    if run.process == "running":
        advice = (
            "It may as well be stopped, Ctrl-C or SIGTERM saves its state; a change is told of below."
            if trouble
            else "Nothing is to be done; scripts/watch.py shows this page while it goes on."
        )
        return [Sentence(so_far + advice, "loss")]
    words = ["python", "scripts/train.py", "--config", os.path.join(run.folder, CONFIG), "--workdir", run.folder]
    command = shlex.join(words) if run.folder.isprintable() and run.config else ""
    advice = "It goes on from its last checkpoint by the command that began it"
    if run.process is None:
        advice = f"If it is not running any more: {advice[0].lower()}{advice[1:]}"
    return [Sentence(f"{so_far}{advice}{', or by this one' if command else ''}.", "loss", command)]


def _proposal(told: Told, others: Sequence[Told]) -> Proposal | str:
    """What to try next on one run; a sentence that says why nothing is proposed, "" where another one does."""
    remedy = _remedy(told)
    if remedy is None:
        return _why_not(told)
    name, what, changes = remedy
    wanted = {**told.run.config, **changes}
    tried = [
        each
        for each in others
        if changes
        and each.run.rows
        and not differing(each.run.config, wanted)
        and all(each.run.config.get(field) == value for field, value in changes.items())
    ]
    if not tried:
        return Proposal(name, what, _command(told.run.folder, name, changes) if changes else "")
    names = listed([each.run.name for each in tried[:MOST_NAMED]]) + (", …" if len(tried) > MOST_NAMED else "")
    trained = [each.run for each in tried if each.trained]
    if not trained:
        return f"What would be tried next, {WORDS[name]}, has been, and {_failed(tried)}: {names}."
    seeds = [seed for each in tried if type(seed := each.run.config.get("seed")) is int]
    if len(trained) > 1 or not seeds:
        agree = f"trained in {len(trained)} of {len(tried)} runs"
        return f"What would be tried next, {WORDS[name]}, has been, and {agree}: {names}."
    what = f"{trained[0].name} with another seed; one seed that trains may be luck"
    seed = max(seeds) + 1
    return Proposal("seed", what, _command(trained[0].folder, f"seed_{seed}", {"seed": seed}))


def _why_not(told: Told) -> str:
    """The reason why nothing is recommended; "" where another sentence says what to do."""
    run = told.run
    if run.state in ("bad input", "failed", "unreadable"):
        return f"No next step is recommended: the run ended as {run.state}, which no setting of the training mends."
    if run.state == "unfinished":
        return ""
    return "No next step is recommended: too little is known of the run's settings and length."


def _failed(tried: Sequence[Told]) -> str:
    if all(each.collapsed for each in tried):
        return "its attention collapsed"
    if all(each.facts.diverged is not None for each in tried):
        return "it diverged"
    return "it did not train without a collapse or a rise of the loss"


def _remedy(told: Told) -> Remedy | None:
    """The change that most speaks for itself; None where nothing is known to help."""
    run, facts = told.run, told.facts
    rate, total = number(run.config.get(RATE)), number(run.config.get("total_steps"))
    slower = Remedy("slower", WORDS["slower"], {RATE: float(f"{rate / RATE_FACTOR:.2g}")}) if rate else None
    if run.state in ("bad input", "failed", "unreadable"):
        return None
    if facts.cause == "data":
        return Remedy("", "look at the batch of that step; no setting mends values that are not finite", {})
    if (change := intervention(run)) and facts.cause is None and not facts.short:
        control = {f"intervention.{field}": 1.0 for field in FACTORS if run.config.get(f"intervention.{field}") != 1}
        what = f"a control without the change on purpose ({change[1]}), to see what the change alone did"
        return Remedy("control", what, control)
    if told.collapsed or facts.cause in ("entropy collapse", "logits") or (facts.rose is not None and told.sharp):
        fields = {name: value for name, value in SIGMA.items() if name in run.config}
        changed = {name: value for name, value in fields.items() if run.config[name] != value}
        if "model.reparam" in changed:
            norm = ", with the norm after each branch" if "model.norm" in changed else ""
            return Remedy("sigma", f"σReparam, which bounds the logits{norm}, at the same learning rate", changed)
        return slower
    if facts.diverged is not None or facts.rose is not None:
        if facts.cause == "gradient" and run.config.get("optimizer.clip_norm") == 0.0:
            return Remedy("clipped", "gradients clipped to a norm of 1", {"optimizer.clip_norm": 1.0})
        return slower
    if facts.short and run.state == "done" and total:
        longer = {"total_steps": int(max(100 * total, 100))}
        return Remedy("longer", f"a longer run; {run.last_step} steps tell little", longer)
    if run.state == "done" and rate and not facts.short:
        faster = {RATE: float(f"{rate * RATE_FACTOR:.2g}")}
        return Remedy("faster", f"{WORDS['faster']}, to see how far off the edge is", faster)
    return None


def separate(told: Sequence[Told]) -> list[Sentence]:
    """Runs that tell the parts of norm and reparametrization apart, where one run trained with other ones of both.

    Nothing where no pair of runs differs so, or such runs have been made.
    """
    pairs = []
    for i, bad in enumerate(told):
        for j, good in enumerate(told):
            if bad.trained or not bad.run.rows or not good.trained or not _differ_in_both(bad, good):
                continue
            pairs.append((distance(bad, good, differing(bad.run.config, good.run.config)), i, j))
    if not pairs:
        return []
    _, worse, better = min(pairs)
    run, other_run = told[worse].run, told[better].run
    proposed = []
    for field, other in (PAIR, PAIR[::-1]):
        wanted = {**run.config, field: other_run.config[field]}
        mix = {each: wanted[each] for each in PAIR}
        name = next((name for name, arm in ARMS.items() if arm == mix), None)
        if name and all(differing(each.run.config, wanted) for each in told):
            words = (
                f"{name}, with {field} {mix[field]} as in {other_run.name} and {other} {mix[other]} as in {run.name}"
            )
            proposed.append((words, _command(run.folder, name, {field: mix[field]})))
    begin = (
        f"{run.name} and {other_run.name} differ in {listed(PAIR)} at once: which of the two did it, they do not tell. "
    )
    return [
        Sentence(f"{'As well' if i else f'{begin}To tell them apart'}: {words}.", command=command)
        for i, (words, command) in enumerate(proposed)
    ]


def _differ_in_both(one: Told, other: Told) -> bool:
    """True for runs of one task and learning rate whose norms and reparametrizations differ."""
    ours, theirs = one.run.config, other.run.config
    known = all(type(config.get(field)) is str for config in (ours, theirs) for field in PAIR)
    return (
        known
        and all(ours[field] != theirs[field] for field in PAIR)
        and all(ours.get(field) == theirs.get(field) for field in (RATE, "task"))
    )


def _command(folder: str, name: str, changes: Mapping[str, Any]) -> str:
    """The command of a new run; "" for a folder whose name a page cannot show as it is."""
    if not folder.isprintable():
        return ""
    new = start = f"{folder}-{name}"
    count = 1
    while os.path.lexists(new):
        count += 1
        new = f"{start}-{count}"
    words = ["--config", os.path.join(folder, CONFIG), *(f"--config.{key}={value}" for key, value in changes.items())]
    return shlex.join(["python", "scripts/train.py", *words, "--workdir", new])
