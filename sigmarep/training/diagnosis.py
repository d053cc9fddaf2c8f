"""Diagnosis of a run from its metrics: when it diverged, what broke first, and which layers' attention collapsed.

`diagnose` is the only judge: the message of a run that diverged, its `diagnosis.json`, `summary` and the report read it.
A row of metrics describes the parameters before its update, in the order in which a step computes: batch, attention, loss,
gradient. The cause is the first of these that broke after the last step at which all of them were healthy.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sigmarep.training.metrics import metric_names

LOSS, GRADIENT = "train/loss", "train/gradient_norm"
ENTROPY, LOWEST_ENTROPY = "attention/entropy/", "attention/entropy_min"
MAX_LOGIT, BOUND = "attention/max_logit/", "attention/bound/"
NONFINITE = "data/nonfinite/"
# A layer counts as collapsed below this many nats; the paper's own figures show collapsed layers at 0.02 to 0.1.
COLLAPSED = 0.1
# Causes of a divergence.
CAUSES = {
    "data": "the batch had values that are not finite",
    "initial values": "loss or attention was not finite before the first update",
    "entropy collapse": "a layer's attention had collapsed while loss and statistics were finite",
    "logits": "attention logits overflowed",
    "loss": "the loss overflowed; the attention statistics of its step are finite",
    "gradient": "the gradient was not finite where the loss still was",
    "learning rate": "updates took a model with healthy attention past the accepted loss, or out of range at once",
    "unknown": "the metrics do not say what broke first",
}

# The metrics that a diagnosis reads, the last ones by layer or array.
EVIDENCE = (LOSS, GRADIENT, LOWEST_ENTROPY, ENTROPY, MAX_LOGIT, BOUND, NONFINITE)

Row = Mapping[str, Any]


class LayerEntropy(NamedTuple):
    """Attention entropy of a layer over the steps whose loss and statistics are finite.

    Attributes:
      lowest: in nats.
      lowest_step: the step of it.
      collapsed_step: the first step below `COLLAPSED`, None without one.
    """

    lowest: float
    lowest_step: int
    collapsed_step: int | None


class Diagnosis(NamedTuple):
    """Facts about a run, as far as its metrics go.

    Attributes:
      layers: by name, without those that were never finite.
      nonfinite: the first step at which a layer's attention statistics were not finite, and the layer; None without one.
      diverged_step: the step at which the loss became non-finite or rose past the accepted multiple of its start.
      reason: what the loss did.
      cause: one of `CAUSES`.
      healthy_step: the last step before the divergence at which everything recorded was healthy; None without one.
      broken_step: the first recorded step after it, from which the cause is read.
      explanation: the cause in a clause, with its evidence.

    The last five are None, and the explanation is empty, for a run that has not diverged.
    """

    layers: dict[str, LayerEntropy]
    nonfinite: tuple[int, str] | None
    diverged_step: int | None = None
    reason: str | None = None
    cause: str | None = None
    healthy_step: int | None = None
    broken_step: int | None = None
    explanation: str = ""

    @property
    def collapsed(self) -> list[tuple[str, int]]:
        """Layers that fell below `COLLAPSED` and the steps at which they did, the first one first."""
        steps = [(name, step) for name, layer in self.layers.items() if (step := layer.collapsed_step) is not None]
        return sorted(steps, key=lambda pair: pair[1])

    @property
    def lowest(self) -> tuple[float, str, int] | None:
        """Lowest entropy of any layer in nats, the layer and the step; None if none was recorded."""
        if not self.layers:
            return None
        name = min(self.layers, key=lambda each: self.layers[each].lowest)
        return self.layers[name].lowest, name, self.layers[name].lowest_step


def divergence_reason(loss: float, first_loss: float | None, factor: float) -> str | None:
    """Reason for which a loss means divergence, None if it does not.

    Args:
      first_loss: the first logged loss of the run.
      factor: the accepted multiple of it; 0 looks at non-finite losses only.
    """
    if not math.isfinite(loss):
        return f"the loss became {loss}"
    if factor and first_loss is not None and loss > factor * abs(first_loss):
        return f"the loss rose to {loss:.4g}, more than {factor:g} times its start of {first_loss:.4g}"
    return None


def is_evidence(name: str) -> bool:
    """True for a metric that `diagnose` reads."""
    return name.startswith(EVIDENCE)


def lowest_entropy(rows: Sequence[Row]) -> float:
    """Lowest attention entropy of any layer in nats over the steps at which it and the loss are finite; else NaN."""
    entropies = [row[LOWEST_ENTROPY] for row in rows if LOWEST_ENTROPY in row and math.isfinite(row.get(LOSS, 0.0))]
    return min(filter(math.isfinite, entropies), default=math.nan)


def diagnose(rows: Sequence[Row], *, factor: float = 0.0) -> Diagnosis:
    """Diagnosis of a run.

    Args:
      rows: its metrics, in order.
      factor: `config.divergence_factor`, see `divergence_reason`.
    """
    layers, steps = _evidence(rows, factor)
    unreadable = next((step for step in steps if step.broken_layers), None)
    facts = Diagnosis(
        layers=_entropies(layers, steps),
        nonfinite=(unreadable.number, unreadable.broken_layers[0]) if unreadable else None,
    )
    end = next((i for i, step in enumerate(steps) if step.reason), None)
    if end is None:
        return facts
    last_healthy = next((i for i in range(end, -1, -1) if steps[i].healthy), None)
    broken = steps[0 if last_healthy is None else last_healthy + 1]
    healthy = None if last_healthy is None else steps[last_healthy]
    cause, explanation = _cause(facts, healthy, broken)
    return facts._replace(
        diverged_step=steps[end].number,
        reason=steps[end].reason,
        cause=cause,
        healthy_step=healthy.number if healthy else None,
        broken_step=broken.number,
        explanation=explanation,
    )


def _evidence(rows: Sequence[Row], factor: float) -> tuple[list[str], list["_Step"]]:
    """The layers whose entropy was recorded, and the steps at which it or the loss was."""
    names = metric_names(rows)
    layers = [name.removeprefix(ENTROPY) for name in names if name.startswith(ENTROPY)]
    arrays = [name.removeprefix(NONFINITE) for name in names if name.startswith(NONFINITE)]
    first_loss = next((row[LOSS] for row in rows if LOSS in row), None)
    steps = [
        _Step(row, layers, arrays, divergence_reason(row.get(LOSS, 0.0), first_loss, factor))
        for row in rows
        if LOSS in row or any(ENTROPY + layer in row for layer in layers)
    ]
    return layers, steps


class _Step:
    """Evidence of one row.

    Attributes:
      number: the step.
      loss: NaN if it was not recorded.
      reason: for which its loss means divergence.
      entropies: by layer, those that are finite.
      broken_layers: whose statistics are not finite.
      bad_inputs: number of values that are not finite, by array of the batch. They may be meant, as padding is.
    """

    def __init__(self, row: Row, layers: Sequence[str], arrays: Sequence[str], reason: str | None):
        self._row, self.reason = row, reason
        self.number: int = row["step"]
        self.loss: float = row.get(LOSS, math.nan)
        self.gradient: float = row.get(GRADIENT, 0.0)
        self.entropies: dict[str, float] = {}
        self.broken_layers: list[str] = []
        for layer in layers:
            entropy = row.get(ENTROPY + layer)
            if entropy is None:
                continue
            finite = math.isfinite(entropy)
            if finite:
                self.entropies[layer] = entropy
            if not finite or _overflowed(row.get(MAX_LOGIT + layer, 0.0)):
                self.broken_layers.append(layer)
        self.broken_layers.sort(key=_by_depth)
        self.bad_inputs = {name: row[NONFINITE + name] for name in arrays if row.get(NONFINITE + name)}

    @property
    def forward_finite(self) -> bool:
        """Attention and loss are finite."""
        return not self.broken_layers and math.isfinite(self._row.get(LOSS, 0.0))

    @property
    def healthy(self) -> bool:
        return self.forward_finite and self.reason is None and math.isfinite(self.gradient)

    @property
    def collapsed(self) -> bool:
        return any(entropy < COLLAPSED for entropy in self.entropies.values())

    @property
    def overflowing_layers(self) -> list[str]:
        """Broken layers whose logits left the range, not the inputs that these are made of.

        The bound of Theorem 3.1 is read from the inputs, and NaN where these are not finite.
        """
        return [
            layer
            for layer in self.broken_layers
            if self._row.get(MAX_LOGIT + layer) == math.inf or math.isfinite(self._row.get(BOUND + layer, 0.0))
        ]

    def measured(self) -> str:
        """Loss and lowest entropy in words."""
        words = [] if math.isnan(self.loss) else [f"loss {self.loss:.4g}"]
        if self.entropies:
            layer = min(self.entropies, key=lambda name: self.entropies[name])
            words.append(f"lowest entropy {self.entropies[layer]:.3g} nats in {layer}")
        return ", ".join(words)


def _overflowed(max_logit: float) -> bool:
    # −inf is the largest logit of a layer without queries.
    return math.isnan(max_logit) or max_logit == math.inf


def _by_depth(layer: str) -> list[tuple[int, str]]:
    """Sorting key by which block_2 comes before block_10."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in layer.replace("_", "/").split("/")]


def _entropies(layers: Sequence[str], steps: Sequence[_Step]) -> dict[str, LayerEntropy]:
    sound = [step for step in steps if step.forward_finite]
    entropies = {}
    for layer in layers:
        values = [(step.entropies[layer], step.number) for step in sound if layer in step.entropies]
        if values:
            lowest, number = min(values)
            collapsed = next((number for value, number in values if value < COLLAPSED), None)
            entropies[layer] = LayerEntropy(lowest, number, collapsed)
    return entropies


def _cause(facts: Diagnosis, healthy: _Step | None, broken: _Step) -> tuple[str, str]:
    """Cause and explanation of a divergence.

    Args:
      healthy: the last healthy step before it.
      broken: the first recorded step after that.
    """
    at = f"at step {broken.number}"
    before = "no step before was healthy"
    if healthy is not None:
        before = f"step {healthy.number}, the last one recorded before, was healthy ({healthy.measured()})"
    # With the gradient alone broken, the attention of its step is evidence as well.
    gradient_alone = broken.forward_finite and broken.reason is None
    if broken.bad_inputs and not (healthy and healthy.bad_inputs):
        counts = " and ".join(f"{count:g} of {name}" for name, count in broken.bad_inputs.items())
        return "data", f"values of the batch were not finite {at} ({counts}): check the data; {before}"
    if not broken.forward_finite and broken.number <= 1:
        return "initial values", "this was before the first update: check the data and the initial values"
    if (healthy is not None and healthy.collapsed) or (gradient_alone and broken.collapsed):
        return "entropy collapse", collapse_in_words(facts)
    if gradient_alone:
        finite = "the loss and the attention of its step were" if broken.entropies else "the loss of its step was"
        measured = f"{finite} finite ({broken.measured()})"
        return "gradient", f"the gradient's norm was {broken.gradient} {at}; {measured}"
    if healthy is None:
        return "unknown", f"what broke first is not known: {before}"
    return _forward_cause(healthy, broken, at, before)


def _forward_cause(healthy: _Step, broken: _Step, at: str, before: str) -> tuple[str, str]:
    """`_cause` where attention or loss broke, after a step with healthy attention."""
    one_update = broken.number == healthy.number + 1
    between = f"nothing was recorded after step {healthy.number}, so what broke first is not known"
    if broken.overflowing_layers:
        return "logits", f"the attention logits of {broken.overflowing_layers[0]} were out of range {at}; {before}"
    if broken.broken_layers and one_update:
        layer = broken.broken_layers[0]
        return "learning rate", f"inputs or weights of {layer} were out of range {at}, after a single update; {before}"
    if broken.broken_layers:
        return "unknown", f"{between}; {before}"
    if not broken.entropies:
        return "unknown", f"no attention was recorded {at}, so what broke first is not known; {before}"
    if not math.isfinite(broken.loss):
        return "loss", f"the attention statistics were finite {at} ({broken.measured()}); {before}"
    if not broken.collapsed:
        return "learning rate", f"the attention was healthy {at} ({broken.measured()}); {before}"
    together = f"{at} the loss had risen and the attention was sharp ({broken.measured()})"
    if one_update:
        return "learning rate", f"{together}, after a single update; {before}"
    return "unknown", f"{together}; {between}; {before}"


def collapse_in_words(facts: Diagnosis) -> str:
    """The layers that fell, and the lowest entropy; a clause."""
    if facts.lowest is None:
        return "no attention entropy was recorded"
    value, layer, step = facts.lowest
    if not facts.collapsed:
        return f"no attention entropy fell below {COLLAPSED} nats: the lowest was {value:.3g} in {layer} at step {step}"
    first, first_step = facts.collapsed[0]
    return (
        f"the attention entropy of {first} fell first, below {COLLAPSED} nats by step {first_step}; "
        f"{len(facts.collapsed)} of {len(facts.layers)} layers did; "
        f"the lowest was {value:.3g} nats in {layer} at step {step}"
    )
