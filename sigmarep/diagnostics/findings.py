"""The story of a run, as facts and in plain words."""

import json
import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from sigmarep.diagnostics import curves
from sigmarep.diagnostics.changes import LOSS, aftermath, intervention
from sigmarep.diagnostics.files import number
from sigmarep.diagnostics.runs import Run
from sigmarep.training.diagnosis import COLLAPSED, ENTROPY, diagnose, is_evidence

# A layer that comes so near to a collapse has no fall of its own, and is named.
NEAR = 2 * COLLAPSED
NOT_DEFINED = "attention entropy is not defined for layers without attention weights"
# Layers that fell at one step are named up to this number.
MOST_NAMED = 3
SHARPNESS = {
    "sharpness/preconditioned": "sharpness/preconditioned_threshold",
    "sharpness/hessian": "sharpness/threshold",
}
# On the process of an unfinished run, by `Run.process`.
PROCESSES = {
    "running": " It is still going on.",
    "ended": " It is not running: it was stopped, as by Ctrl-C or SIGTERM, or ended with an error.",
    "killed": " It is not running: it ended without a word, as a process that is killed or loses its machine.",
}


class Sentence(NamedTuple):
    """A sentence for the reader.

    Attributes:
      text: plain words.
      topic: of the plot that shows it (`figures.Panel`); None where no plot does.
      command: a command that it recommends; "" for none.
      more: topics of further plots that show it.
    """

    text: str
    topic: str | None = None
    command: str = ""
    more: tuple[str, ...] = ()


class Facts(NamedTuple):
    """Facts of a run, None where nothing is known.

    Attributes:
      final: name and value of the last evaluation.
      loss: the training loss at the end, by which runs are judged (`curves.at_end`); ∞ if it diverged.
      short: fewer losses are logged than tell whether they rise.
      diverged: the step at which the run diverged, with its `cause` and `explanation` (`sigmarep.training.diagnosis`).
      rose: the step at which the loss rose (`curves.rise`).
      lowest: the lowest layer's entropy in nats, the layer and the step.
      fell: layers that fell below `COLLAPSED`, with the step, the earliest one first.
      layers: the number of layers with a finite entropy.
      nonfinite: the first step at which attention statistics were not finite, and a layer.
      spikes: spike score of the loss in per cent, and of the gradient norm in `gradient_spikes`; NaN for short runs.
    """

    final: tuple[str, float] | None
    loss: float | None
    short: bool
    diverged: int | None
    cause: str | None
    explanation: str
    rose: int | None
    lowest: tuple[float, str, int] | None
    fell: list[tuple[str, int]]
    layers: int
    nonfinite: tuple[int, str] | None
    spikes: float
    gradient_spikes: float

    @property
    def earliest(self) -> str:
        """The layers that fell earliest, in words: several where they fell at one logged step; "" for none."""
        layers = [layer for layer, step in self.fell if step == self.fell[0][1]]
        if len(layers) == self.layers > MOST_NAMED:
            return f"all {self.layers} layers"
        more = len(layers) - MOST_NAMED
        return ", ".join(layers[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def facts(run: Run) -> Facts:
    """See `Facts`."""
    losses = run.series(LOSS)
    # As a list: it is gone through more than once.
    diagnosis = diagnose(list(run.rows.only(is_evidence)), factor=number(run.config.get("divergence_factor")) or 0.0)
    # Whether a run diverged is for its files to say; a run of an earlier version may lack the row.
    diverged = None
    if run.state == "diverged":
        diverged = run.last_step if diagnosis.diverged_step is None else diagnosis.diverged_step
    rose = curves.rise(*losses)
    return Facts(
        final=_final(run),
        loss=None if not losses.values else math.inf if diverged is not None else curves.at_end(losses.values),
        short=len(losses.values) < curves.WINDOW,
        diverged=diverged,
        cause=None if diverged is None else diagnosis.cause,
        explanation=diagnosis.explanation,
        rose=diverged if rose is None else rose,
        lowest=diagnosis.lowest,
        fell=diagnosis.collapsed,
        layers=len(diagnosis.layers),
        nonfinite=diagnosis.nonfinite,
        spikes=curves.spike_score(losses.values),
        gradient_spikes=curves.spike_score(run.series("train/gradient_norm").values),
    )


def _final(run: Run) -> tuple[str, float] | None:
    """Name and last value of the task's primary metric; where that is not known, of another metric, the loss last."""
    evaluated = [name for name in run.names if name.startswith("eval/")]
    primary = [name for name in evaluated if name.rsplit("/", 1)[-1] == run.environment.get("primary_metric")]
    others = [name for name in evaluated if not name.endswith("/loss")]
    for name in (primary or others or evaluated)[:1]:
        return name.removeprefix("eval/"), run.series(name).values[-1]
    return None


def sentences(run: Run, known: Facts, before: Sequence[Sentence] = ()) -> list[Sentence]:
    """Sentences that tell a reader about one run, most important first; those of `before` follow that on its entropy."""
    texts = [Sentence(outcome(run, known), "loss")]
    if not run.rows:
        return texts
    if known.cause is not None:
        texts.append(Sentence(f"Cause: {known.cause}; {known.explanation}.", "loss"))
    texts += [Sentence(_entropy(run, known), "entropy"), *before]
    if known.nonfinite:
        step, layer = known.nonfinite
        words = f"The earliest attention statistics that were not finite are those of {layer} at step {step}."
        texts.append(Sentence(words, "entropy"))
    optional = {
        "loss": (_intervention(run),),
        **{name: (_sharpness(run, name, limit),) for name, limit in SHARPNESS.items()},
        "spectral/gamma/": (_negative_gammas(run),),
    }
    texts += [Sentence(text, topic) for topic, each in optional.items() for text in each if text]
    # The topic of a metric without a plot leads nowhere.
    spikes = _spikes(known)
    return [*texts, Sentence(spikes, "loss", more=("train/gradient_norm",))] if spikes else texts


def _intervention(run: Run) -> str | None:
    if (change := intervention(run)) is None:
        return None
    step, words = change
    return f"After step {step} the run was changed on purpose: {words}. {aftermath(run, step)}".strip()


def _spikes(known: Facts) -> str | None:
    if not (known.spikes > 0 or known.gradient_spikes > 0):
        return None
    return (
        f"Spike score (share of logged values 7 standard deviations off the running mean): {known.spikes:.3g} % of the "
        f"loss, {known.gradient_spikes:.3g} % of the gradient norm."
    )


def _negative_gammas(run: Run) -> str | None:
    gammas = [name for name in run.names if name.startswith("spectral/gamma/")]
    negative = [name for name in gammas if any(value < 0 for value in run.series(name).values)]
    if not negative:
        return None
    names = ", ".join(name.removeprefix("spectral/gamma/") for name in negative[:3])
    return f"γ became negative in {len(negative)} layers, {names} among them."


def outcome(run: Run, known: Facts) -> str:
    """A sentence on the end of a run, or on its progress."""
    of_total = f" of {run.total_steps}" if run.total_steps else ""
    why = f": {run.reason}" if run.reason else ""
    if run.state == "diverged":
        return f"Diverged at step {known.diverged}{of_total}{why}."
    if run.state == "unreadable":
        return f"Cannot be read{why}."
    if run.state in ("failed", "bad input"):
        return f"Ended as {run.state} after step {run.last_step}{why}."
    if not run.rows:
        return f"Nothing is logged yet{why}.{PROCESSES.get(run.process or '', '')}"
    rose = f" The loss rose at step {known.rose}." if known.rose is not None else ""
    if run.state == "unfinished":
        when = time.strftime("on %Y-%m-%d at %H:%M:%S", time.localtime(run.written))
        state = PROCESSES.get(run.process or "", "")
        return f"Unfinished, at step {run.last_step}{of_total}; the last line was written {when}.{state}{rose}"
    if run.state == "stopped early":
        return f"Stopped early after step {run.last_step}{of_total}{why}.{rose}"
    words = f" with {known.final[0]} {known.final[1]:.4g}" if known.final else ""
    never = " The run is too short to tell whether the loss rises." if known.short else " No lasting rise of the loss."
    return f"Done after {run.last_step} steps{words}.{rose or never}"


def _entropy(run: Run, facts: Facts) -> str:
    if facts.lowest is None:
        return "No attention entropy was recorded." if run.attends else f"{NOT_DEFINED.capitalize()}."
    value, layer, step = facts.lowest
    if not facts.fell:
        if value < NEAR:
            return f"No layer collapsed, but {layer} came near: {value:.3g} nats at step {step}, against {COLLAPSED}."
        return (
            f"No layer's attention entropy fell below {COLLAPSED} nats: the lowest was {value:.3g} in {layer} "
            f"at step {step}."
        )
    since = facts.fell[0][1]
    together = [layer for layer, step in facts.fell if step == since]
    above = [at for at, entropy in zip(*run.series(ENTROPY + together[0]), strict=True) if at < since and entropy > 0]
    still = f" (still above it at step {above[-1]})" if above else ""
    if facts.rose is None:
        when = (
            "; the run is too short to tell whether the loss rises" if facts.short else "; the loss had no lasting rise"
        )
    elif facts.rose == since:
        when = ", the step at which the loss rose"
    else:
        steps = abs(facts.rose - since)
        when = f", {steps} steps {'before' if since < facts.rose else 'after'} the loss rose"
    others = len(facts.fell) - len(together)
    also = f" {others} more of {facts.layers} layers followed." if others else ""
    if len(together) > 1:
        also = f" Which of these was earlier, the logged steps do not tell.{also}"
    return (
        f"{facts.earliest} fell below {COLLAPSED} nats at step {since}{still}{when}.{also} The lowest was "
        f"{value:.3g} nats in {layer} at step {step}."
    )


def _sharpness(run: Run, name: str, limit: str) -> str | None:
    pairs = [
        (row["step"], row[name], row[limit]) for row in run.only((name, limit)).rows if name in row and limit in row
    ]
    if not pairs:
        return None
    word = "Preconditioned sharpness" if name.endswith("preconditioned") else "Sharpness"
    above = [step for step, value, threshold in pairs if value > threshold]
    unknown = [step for step, value, threshold in pairs if math.isnan(value) or math.isnan(threshold)]
    nan = f" It was NaN at {len(unknown)}, earliest at step {unknown[0]}." if unknown else ""
    if not above:
        known = len(pairs) - len(unknown)
        return f"{word} stayed below its threshold at {'' if unknown else 'all '}{known} measurements.{nan}"
    return f"{word} was above its threshold at {len(above)} of {len(pairs)} measurements, earliest at step {above[0]}.{nan}"


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Fields of the configurations that are not the same in all runs, with the value of every run; None where missing."""
    configs = [run.config for run in runs]
    names = dict.fromkeys(name for config in configs for name in config)
    values = {name: [config.get(name) for config in configs] for name in names}
    return {name: each for name, each in values.items() if len({json.dumps(value) for value in each}) > 1}
