"""Optimizers by name, with weight decay and trust ratios masked by readable rules.

Where weight decay λ enters, with learning rate η:

    adamw, lamb, lion, muon   decoupled: added to the update, W ← W − η·(update + λW)
    sgd, lars, adam, adagrad  coupled: added to the gradient, before momentum or second moments

Other optimizers are optax's, or anyone's: `sigmarep.training.external`.

LARS is You et al.'s, as optax's: the learning rate multiplies the update before momentum, which keeps steps of the old rate
for some ten updates after a step schedule has lowered it. timm's multiplies after momentum, and takes the new rate at once.
What has no trust ratio moves by the raw gradient at the full rate.

`no_decay` names the parameters left out of it, and of the trust ratios of LARS and LAMB: γ, biases, norms' scales,
positions and the class token, unless configured otherwise.

A hidden matrix is a kernel that `sigmarep.nn.layers` describes, whose module does not say that it reads the model's input,
makes its output, projects for pre-training or holds positions (`role`), and that `non_matrices` does not find. Muon,
`spectral_sphere`, `spectral_bound`, `spectral_clip`, `hyperball` and `magnitude_learning_rate` work on these; under
the first two all other parameters are Adam's. spectral_sphere decays none but those.

Under σReparam kernels are scale-invariant: a large learning rate makes them grow, and their steps relatively smaller. γ,
biases, the scales of norms and embeddings are not. `scale_parameters_factor` multiplies the learning rate of
`scale_parameters`; `non_matrix_learning_rate` is that of all but the hidden matrices; `relative_gradients` keeps the
moments of kernels that grow from remembering how small they were. docs/results.md shows what they change.
`layer_decay` lowers the rate from block to block, for fine-tuning.
"""

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from sigmarep import doors
from sigmarep.errors import BadInput
from sigmarep.fields import Free, field
from sigmarep.nn.layers import Layer, Layers
from sigmarep.training import external
from sigmarep.training.layer_decay import distances
from sigmarep.training.magnitudes import decouple_magnitudes
from sigmarep.training.mesh import path_name
from sigmarep.training.relative_steps import (
    frobenius_norm,
    hyperball,
    scale_by_trust_ratio,
    scale_queries_and_keys,
    unit_kernels,
)
from sigmarep.training.spectral_steps import bound_spectral_norm, softly_clip, spectral_sphere

OPTIMIZERS = ("adamw", "adam", "sgd", "lars", "lamb", "adagrad", "lion", "muon", "spectral_sphere")
# Those whose directions `spectral_clip` may clip.
CLIPPED = tuple(name for name in OPTIMIZERS if name not in ("lars", "spectral_sphere"))
FIELDS: dict[str, Any] = {
    "name": field(
        "adamw",
        "Optimizer.",
        choices=OPTIMIZERS,
        also=lambda word: doors.is_dotted(word) or external.is_optimizer(word),
        also_doc="an optimizer of optax such as adafactor, or a dotted Python name",
    ),
    "arguments": Free("Arguments of an optimizer of optax or of one's own (sigmarep.training.external)."),
    "weight_decay": field(0.0, "Weight decay λ; decoupled in adamw, lamb, lion and muon.", at_least=0),
    "no_decay": field(
        ("gamma$", "bias$", "scale$", "alpha$", "shift$", "position", "class_token"),
        "Parameter paths left out of weight decay, and of the trust ratios of LARS and LAMB.",
        pattern=True,
    ),
    "scale_parameters": field(
        ("gamma$", "bias$", "scale$", "alpha$", "shift$"),
        "Parameter paths that scale_parameters_factor applies to: γ, biases, scales and offsets of norms.",
        pattern=True,
    ),
    "scale_parameters_factor": field(1.0, "Factor on the learning rate of those.", at_least=0),
    "non_matrices": field(
        (),
        "Paths of kernels that are no hidden matrices, besides those whose module says so by its role: Muon leaves them to "
        "Adam, spectral_bound leaves them alone.",
        pattern=True,
    ),
    "non_matrix_learning_rate": field(
        0.0,
        "Learning rate of all parameters but the hidden matrices, on the same schedule; 0: learning_rate.",
        at_least=0,
    ),
    "magnitude_learning_rate": field(
        0.0,
        "Learning rate, on the same schedule, of the sizes of rows and columns of hidden matrices, which are then learned "
        "apart from their directions (sigmarep.training.magnitudes); 0: off.",
        at_least=0,
    ),
    "layer_decay": field(
        1.0,
        "Factor on the learning rate from each block to the one before it, for fine-tuning: the head and the last norm "
        "have the whole rate, the last block this share of it, and what comes before the first block the least.",
        above=0,
        at_most=1,
    ),
    "rate_inputs": field(
        0,
        "μP's rates for Adam (Yang et al., 2022, table 3): multiplies the learning rate of every hidden and output kernel "
        "by this number over the kernel's inputs; 0: off. Initial values and logits are not scaled.",
        at_least=0,
    ),
    "relative_gradients": field(
        False, "Multiplies the gradient of a reparametrized kernel by the kernel's norm, before any moments."
    ),
    "clip_norm": field(0.0, "Largest global norm of the gradient; 0: no clipping.", at_least=0),
    "momentum": field(0.9, "Momentum of sgd and lars.", at_least=0, below=1),
    "nesterov": field(False, "Nesterov momentum."),
    "beta1": field(0.9, "Decay of the first moment.", at_least=0, below=1),
    "beta2": field(0.999, "Decay of the second moment.", at_least=0, below=1),
    "epsilon": field(1e-8, "Added to the root of the second moment.", at_least=0),
    "trust_coefficient": field(0.001, "Factor on LARS's trust ratio.", above=0),
    "spectral_bound": field(
        0.0,
        "Bounds the spectral norm of a hidden matrix's update by this multiple of the matrix's own (AdamW²); 0: off.",
        at_least=0,
    ),
    "spectral_clip": field(
        0.0,
        "Bends the singular values of the directions of hidden matrices below this number, before the learning rate "
        "(SPECTRA, sigmarep.training.spectral_steps.softly_clip); 0: off.",
        at_least=0,
    ),
    "hyperball": field(
        False,
        "Keeps the Frobenius norm of every hidden matrix as it is, with steps of learning_rate times that norm "
        "(sigmarep.training.relative_steps.hyperball).",
    ),
    "unit_kernels": field(
        False,
        "Keeps hidden matrices at unit vectors along the residual stream, as nGPT does "
        "(sigmarep.training.relative_steps.unit_kernels).",
    ),
    "query_key_rates": field(
        False,
        "Divides the learning rates of query kernels by the norms of the key kernels, and the reverse, relative to the "
        "start (sigmarep.training.relative_steps.scale_queries_and_keys).",
    ),
    "qk_clip": field(
        0.0,
        "Shrinks query and key kernels of heads whose largest logit of a step is above this (QK-clip); 0: off.",
        at_least=0,
    ),
}


class Rates(NamedTuple):
    """Numbers of an optimizer that its program takes as inputs: runs that differ in them alone share the program.

    Numbers, or () float32 arrays; None where the program lacks the part that the number belongs to.

    Attributes:
      learning_rate: the peak.
      weight_decay: of the built-in optimizers.
      clip_norm: largest norm of the gradient.
      non_matrix_factor, magnitude_factor: `non_matrix_learning_rate` and `magnitude_learning_rate` as multiples of
        `learning_rate`.
    """

    learning_rate: Any
    weight_decay: Any = None
    clip_norm: Any = None
    non_matrix_factor: Any = None
    magnitude_factor: Any = None


def read_rates(config: Any) -> Rates:
    """The rates of `config.optimizer`, as numbers."""
    own, magnitudes = config.non_matrix_learning_rate, config.magnitude_learning_rate
    return Rates(
        config.learning_rate,
        (config.weight_decay or None) if config.name in OPTIMIZERS else None,
        config.clip_norm or None,
        own / config.learning_rate if own else None,
        magnitudes / config.learning_rate if magnitudes else None,
    )


def without_rates(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `config.optimizer` as its program depends on them: of those in `Rates` only that they are set."""
    switches = {
        name: bool(fields[name]) for name in ("clip_norm", "non_matrix_learning_rate", "magnitude_learning_rate")
    }
    if fields["name"] in OPTIMIZERS:
        switches["weight_decay"] = bool(fields["weight_decay"])
    return {**fields, **switches, "learning_rate": True}


def matching(params: Any, rules: Sequence[str]) -> Any:
    """True for every parameter whose '/'-joined path one of the regular expressions `rules` is found in."""
    matches = _matcher(rules)
    return jax.tree_util.tree_map_with_path(lambda path, _: matches(path_name(path)), params)


def _matcher(rules: Sequence[str]) -> Callable[[str], bool]:
    patterns = [re.compile(rule) for rule in rules]
    return lambda name: any(pattern.search(name) for pattern in patterns)


def _check_matches(field_name: str, rules: Sequence[str], params: Any) -> None:
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for rule in rules:
        if rule not in FIELDS[field_name].default and not any(re.search(rule, name) for name in names):
            raise BadInput(
                f"config.optimizer.{field_name} = {tuple(rules)!r}: {rule!r} finds none of the parameters, which are named "
                f"as {names[0]}"
            )


def hidden_matrices(config: Any, layers: Layers) -> dict[str, Layer]:
    """The hidden matrices of a model (module docstring) by their paths."""
    excluded = _matcher(config.non_matrices)
    return {name: layer for name, layer in layers.items() if layer.role == "hidden" and not excluded(name)}


def decay_mask(params: Any, rules: Sequence[str]) -> Any:
    """True for every parameter that weight decay applies to: none of `rules` (`config.optimizer.no_decay`) finds it."""
    return jax.tree.map(operator.not_, matching(params, rules))


def create_optimizer(
    config: Any, *, schedule: optax.Schedule, params: Any, layers: Layers, rates: Rates | None = None
) -> optax.GradientTransformation:
    """The optimizer of `config.optimizer`.

    Args:
      schedule: learning rate by update.
      params: parameters, or their shapes.
      layers: of the model that has these parameters.
      rates: those of `config` if None.

    Raises:
      BadInput: a regular expression finds no parameter; those of the defaults may, which serve all models.
    """
    _check_alone(config)
    for field_name in ("no_decay", "scale_parameters", "non_matrices"):
        _check_matches(field_name, config[field_name], params)
    rates = rates or read_rates(config)
    mask = decay_mask(params, config.no_decay)
    clip = (optax.clip_by_global_norm(rates.clip_norm),) if rates.clip_norm is not None else ()
    matrices = hidden_matrices(config, layers)
    bound = (bound_spectral_norm(config.spectral_bound, matrices),) if config.spectral_bound else ()
    sphere: tuple[optax.GradientTransformation, ...] = ()
    if config.hyperball:
        sphere = (hyperball(schedule, layers, matrices),)
    elif config.unit_kernels:
        sphere = (unit_kernels(layers, matrices),)
    elif config.name == "spectral_sphere":
        sphere = (spectral_sphere(schedule, matrices),)
    logits = (scale_queries_and_keys(layers),) if config.query_key_rates else ()
    relative = (scale_by_kernel_norm(layers),) if config.relative_gradients else ()
    factors = rate_factors(config, params, layers, rates)
    uniform = all(isinstance(x, float) and x == 1 for x in jax.tree.leaves(factors))
    scaled = () if uniform else (_scaled_by(lambda _: factors),)
    directions = _directions(config, schedule, mask, params, layers, rates)
    if config.magnitude_learning_rate:
        directions = (_decoupled(config, optax.chain(*directions), schedule, matrices, rates),)
    return optax.chain(*clip, *relative, *directions, *bound, *scaled, *logits, *sphere)


def _check_alone(config: Any) -> None:
    """Refuses two of the fields that set the length of hidden matrices' steps, each of which is the last word on it."""
    own = {
        "hyperball = True": config.hyperball,
        "unit_kernels = True": config.unit_kernels,
        f"magnitude_learning_rate = {config.magnitude_learning_rate}": config.magnitude_learning_rate,
        "name = 'spectral_sphere'": config.name == "spectral_sphere",
    }
    chosen = [name for name, value in own.items() if value]
    if len(chosen) > 1:
        raise BadInput(
            f"config.optimizer.{chosen[0]}: expected no {chosen[1]} beside it; each sets the norm of matrices"
        )
    if chosen and (config.layer_decay != 1 or config.query_key_rates or config.rate_inputs or config.spectral_bound):
        raise BadInput(
            f"config.optimizer.{chosen[0]}: expected no layer_decay, query_key_rates, rate_inputs or spectral_bound beside "
            "it; it has the last word on the steps of every matrix"
        )
    if config.spectral_clip and config.name not in CLIPPED:
        raise BadInput(
            f"config.optimizer.spectral_clip = {config.spectral_clip}: expected a name of {', '.join(CLIPPED)}, not "
            f"{config.name!r}; it clips directions before the learning rate"
        )


def _decoupled(
    config: Any,
    base: optax.GradientTransformation,
    schedule: optax.Schedule,
    matrices: Mapping[str, Layer],
    rates: Rates,
) -> optax.GradientTransformation:
    """`base` with magnitudes of their own learning rate, on the schedule of the others."""
    factor = rates.magnitude_factor
    adam = optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)
    return decouple_magnitudes(base, matrices, schedule=lambda step: factor * schedule(step), adam=adam)


def _directions(
    config: Any, schedule: optax.Schedule, mask: Any, params: Any, layers: Layers, rates: Rates
) -> tuple[optax.GradientTransformation, ...]:
    """The built-in optimizer `config.name`: momentum, second moments, weight decay and the learning rate."""
    if config.name not in OPTIMIZERS:
        return (
            external.create_optimizer(
                config.name,
                config.arguments,
                schedule=schedule,
                weight_decay=config.weight_decay,
                mask=mask,
                params=params,
            ),
        )
    if config.arguments:
        raise BadInput(
            f"config.optimizer.arguments: are those of an optimizer of optax, and {config.name!r} is built in; its fields "
            f"are config.optimizer's own, or name it 'optax.{config.name}'"
        )
    matrices = hidden_matrices(config, layers)
    if config.name == "spectral_sphere":
        # The direction of their momentum is all that the sphere takes.
        mask = jax.tree_util.tree_map_with_path(lambda path, each: each and path_name(path) not in matrices, mask)
    decay = optax.identity() if rates.weight_decay is None else optax.add_decayed_weights(rates.weight_decay, mask)
    rate = optax.scale_by_learning_rate(schedule)
    adam = optax.scale_by_adam(config.beta1, config.beta2, config.epsilon, nesterov=config.nesterov)
    momentum = optax.trace(config.momentum, nesterov=config.nesterov) if config.momentum else optax.identity()
    clip: tuple[optax.GradientTransformation, ...] = ()
    if config.spectral_clip:
        clip = (softly_clip(config.spectral_clip, matrices, schedule=schedule, peak=rates.learning_rate),)
    chains: dict[str, tuple[optax.GradientTransformation, ...]] = {
        "adamw": (adam, *clip, decay, rate),
        "adam": (decay, adam, *clip, rate),
        "sgd": (decay, momentum, *clip, rate),
        "lars": (decay, optax.masked(scale_by_trust_ratio(layers, config.trust_coefficient), mask), rate, momentum),
        "lamb": (adam, *clip, decay, optax.masked(scale_by_trust_ratio(layers), mask), rate),
        "adagrad": (decay, optax.scale_by_rss(initial_accumulator_value=0.0, eps=config.epsilon), *clip, rate),
        "lion": (optax.scale_by_lion(config.beta1, config.beta2), *clip, decay, rate),
        "muon": (_muon(config, matrices), *clip, decay, rate),
        "spectral_sphere": (_momentum_of(matrices, momentum, adam), decay, rate),
    }
    return chains[config.name]


def rate_factors(config: Any, params: Any, layers: Layers, rates: Rates) -> Any:
    """Learning rate of every parameter as a multiple of `learning_rate`: a tree of numbers, or of arrays where
    `rates.non_matrix_factor` is one, or that broadcast to the parameter where stacked layers differ."""
    scales = matching(params, config.scale_parameters)
    matrices = hidden_matrices(config, layers)

    depths = {} if config.layer_decay == 1 else distances(params, layers)

    def factor(path, _, gain):
        own = rates.non_matrix_factor is not None and path_name(path) not in matrices
        base = rates.non_matrix_factor if own else 1.0
        base = base * config.scale_parameters_factor if gain else base
        layer = layers.get(path_name(path))
        if config.rate_inputs and layer is not None and layer.role in ("hidden", "output"):
            base = base * config.rate_inputs / math.prod(layer.shape[axis] for axis in layer.inputs)
        return base * config.layer_decay ** depths[path_name(path)] if depths else base

    return jax.tree_util.tree_map_with_path(factor, params, scales)


def kernel_norms(params: Any, layers: Layers) -> Any:
    """‖W‖_F of every kernel that has a γ, each layer of a stack by its own and broadcastable to it; 1 for a zero kernel and
    for all else.

    Under σReparam the loss depends on W's direction alone, so its gradient falls as 1/‖W‖ while W grows. Momentum and
    second moments then remember the large gradients of a small W: after steps as long as W itself they hold nothing else.
    ‖W‖·∂L/∂W does not depend on ‖W‖, and steps that outgrow the start leave it behind.
    """

    def norm(path, w):
        layer = layers.get(path_name(path))
        if layer is None or layer.reparam not in ("sigma", "weight"):
            return 1.0
        length = frobenius_norm(layers, path, w)
        # A zero kernel has no direction: its gradient is left as it is, or it would never learn.
        return jnp.where(length > 0, length, 1.0)

    return jax.tree_util.tree_map_with_path(norm, params)


def scale_by_kernel_norm(layers: Layers) -> optax.GradientTransformation:
    """Multiplies the gradient in every reparametrised kernel by the kernel's norm (`kernel_norms` says why); to be put
    before whatever keeps moments: `optax.chain(scale_by_kernel_norm(layers), optax.adam(1e-3))`.

    Args:
      layers: of the model, `sigmarep.nn.layers.describe(model.init, key, x)`.
    """
    return _scaled_by(lambda params: kernel_norms(params, layers))


def _scaled_by(factors: Callable[[Any], Any]) -> optax.GradientTransformation:
    """Multiplies updates by a tree that depends on the parameters."""
    return optax.stateless(
        lambda updates, params: jax.tree.map(lambda x, f: (x * f).astype(x.dtype), updates, factors(params))
    )


def _momentum_of(
    matrices: Mapping[str, Layer], momentum: optax.GradientTransformation, adam: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Momentum on `matrices`, Adam on everything else."""

    def kinds(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "momentum" if path_name(path) in matrices else "adam", params
        )

    return optax.partition({"momentum": momentum, "adam": adam}, kinds)


def _muon(config: Any, matrices: Mapping[str, Layer]) -> optax.GradientTransformation:
    """Muon (Jordan et al., 2024) on `matrices`, Adam on everything else.

    Updates are scaled by 0.2·√max(inputs, outputs) (Liu et al., 2025), which brings them to the size of Adam's, so that one
    learning rate serves both.
    """

    def dimension_numbers(params):
        def axes(path, _):
            layer = matrices.get(path_name(path))
            return None if layer is None else optax.contrib.MuonDimensionNumbers(layer.inputs, layer.outputs)

        return jax.tree_util.tree_map_with_path(axes, params)

    directions = optax.contrib.muon(
        1.0,
        beta=config.momentum,
        adam_b1=config.beta1,
        adam_b2=config.beta2,
        eps=config.epsilon,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=dimension_numbers,
    )
    return optax.chain(directions, optax.scale(-1.0))
