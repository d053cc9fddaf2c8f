"""Random changes of single fields over all configuration files: refused in one line that names the field, or sensible.

`SENSE` says by a field's meaning which values make sense. It is written from the fields' documentation, not from the checks
of the code, and holds for every value of every configuration file as it stands.
"""

import collections
import dataclasses
import functools
import itertools
import math
import random
import re

import jax
import pytest

from sigmarep import tasks
from sigmarep.configuration import flatten
from sigmarep.errors import BadInput
from sigmarep.training import durations
from sigmarep.training.config import default_config, validate
from sigmarep.training.mesh import create_mesh
from sigmarep.training.optimizers import create_optimizer
from sigmarep.training.schedules import create_schedule
from tests.configs.test_configs import CASES, load

SEED = 19
# Of each field, drawn from those of its type.
MUTATIONS = 2
UNITS = ("_steps", "_epochs", "_examples")
# Beginnings of the names of fields that decide what is built before there are data.
BUILT = (
    "mesh.",
    "model.",
    "optimizer.",
    "projector.",
    "predictor.",
    "method",
    "data.vocabulary.",
    "data.labels.",
    "data.mean",
)


@dataclasses.dataclass(frozen=True)
class Numbers:
    """Numbers between two bounds; `open_low` and `open_high` leave the bound itself out."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value):
        if isinstance(value, bool) or not isinstance(value, int | float) or not -1e300 < value < 1e300:
            return False
        return (self.low < value or (value == self.low and not self.open_low)) and (
            value < self.high or (value == self.high and not self.open_high)
        )


def each(numbers, *, lengths=range(1, 1000)):
    return lambda value: len(value) in lengths and all(element in numbers for element in value)


def rising(numbers, *, lengths=range(1, 1000), equal=False):
    def test(value):
        pairs = itertools.pairwise(value)
        return each(numbers, lengths=lengths)(value) and all(a < b or (equal and a == b) for a, b in pairs)

    return test


def patterns(value):
    try:
        return all(isinstance(rule, str) and re.compile(rule) for rule in value)
    except re.error:
        return False


def distinct_words(value):
    return all(isinstance(word, str) and word for word in value) and len(set(value)) == len(value)


FRACTION, BELOW_ONE, SIZE = Numbers(0, 1), Numbers(0, 1, open_high=True), Numbers(1, 2**31)
POSITIVE, NOT_NEGATIVE = Numbers(0, open_low=True), Numbers(0)
# Full names of fields, as regular expressions, and the values that make sense; the first that matches counts.
SENSE = {
    r"seed": Numbers(0, 2**32, open_high=True),
    r"keep_checkpoints": Numbers(0, 2**31),
    r"batch_size|accumulation|sharpness\.iterations|probe\.batch_size|knn\.neighbours": SIZE,
    r"ema_decay|optimizer\.(momentum|beta1|beta2)|model\.(dropout|attention_dropout|drop_path|layer_drop)": BELOW_ONE,
    r"label_smoothing|momentum|model\.entropy_target|decoding\.prune|data\.spec_augment\.time_fraction": FRACTION,
    r"data\.augment\.(erasing|randaugment_probability|mix_probability)|data\.views\.(flip|jitter|greyscale)": FRACTION,
    r"data\.views\.hue": Numbers(0, 0.5),
    r"data\.views\.(brightness|contrast|saturation)|data\.augment\.(pad|mixup|cutmix|color_jitter)": NOT_NEGATIVE,
    r"data\.augment\.randaugment_(layers|magnitude|std)": NOT_NEGATIVE,
    r"data\.views\.(blur|solarise)": each(FRACTION, lengths=(2,)),
    r"data\.views\.blur_sigma": rising(POSITIVE, lengths=(2,), equal=True),
    r"data\.(views|augment)\.crop_scale": rising(Numbers(0, 1, open_low=True), lengths=(2,), equal=True),
    r"data\.eval_crop": Numbers(0, 1, open_low=True),
    r"data\.mean": each(Numbers(), lengths=(1, 3)),
    r"data\.std": each(POSITIVE, lengths=(1, 3)),
    r"data\.(image_size|sequence_length|max_source_length|max_target_length|rows_multiple|num_filters)": SIZE,
    r"data\.(sample_rate|(vocabulary|labels)\.size)": SIZE,
    r"data\.(window|hop)_seconds": POSITIVE,
    r"data\.(eval_stride|num_workers|num_threads|spec_augment\.\w+)": NOT_NEGATIVE,
    r"data\.buckets": rising(POSITIVE),
    r"data\.eval_splits": distinct_words,
    r"model\.(depth|width|num_heads|mlp_dim|power_vectors|power_steps|patch_size|conv_kernel|conv_stride)": SIZE,
    r"model\.(init_std|common_std|patch_gain|attention_temperature)": POSITIVE,
    r"model\.(norm_epsilon|logit_cap|output_logit_cap|num_kv_heads|seq_vcr|decoder_depth|logit_chunk)|z_loss": NOT_NEGATIVE,
    r"model\.(freq_scale|max_global_shift|max_local_shift)": NOT_NEGATIVE,
    r"model\.max_scale": Numbers(1),
    r"model\.adaptive_cutoffs": rising(POSITIVE, lengths=range(1000)),
    r"(projector|predictor)\.(layers|hidden|width)": SIZE,
    r"probe\.learning_rates|probe\.weight_decays": each(NOT_NEGATIVE),
    r"probe\.epochs|decoding\.(beam_size|length_extra|length_factor)": NOT_NEGATIVE,
    r"(knn\.)?temperature|intervention\.attention_temperature": POSITIVE,
    r"decoding\.ngram_order": SIZE,
    r"divergence_factor|intervention\.learning_rate_factor": NOT_NEGATIVE,
    r"mesh\.(data|fsdp|tensor)": lambda value: value == -1 or value in SIZE,
    r"optimizer\.step_at": rising(FRACTION, lengths=range(1000), equal=True),
    r"optimizer\.(no_decay|scale_parameters|non_matrices)|init_from\.skip": patterns,
    r"optimizer\.layer_decay": Numbers(0, 1, open_low=True),
    r"optimizer\.(?!warmup)\w+": NOT_NEGATIVE,
    r"(.+_)?(steps|epochs|examples)": Numbers(0, 1e18),
}
# Fields whose values are words of a list.
WORDS = re.compile(
    r"compute_dtype|init_from\.names|parallel|method|writers\.progress|optimizer\.(name|schedule)|decoding\.language_model"
    r"|data\.(packing|interpolation|augment\.crop|(vocabulary|labels)\.(kind|model))|(projector|predictor)\.(norm|reparam)"
    r"|model\.(norm|norm_type|reparam|qkv|qk_norm|branch_scale|attention_weights|attention_implementation|activation|remat"
    r"|kernel_init|positions|pool|gamma_init)"
)
# What the fields of a type are changed to.
VALUES = {
    bool: (1, "yes", None, 0.0),
    int: (-1, -7, 0, 2**63, 10**400, True, 1.5, "three", None, float("nan")),
    float: (-1.0, -0.02, 1.5, 0.0, 1e30, float("nan"), float("inf"), -float("inf"), "much", None),
    str: ("no such word", "", 3, None, 1.5, True, ("a",)),
    tuple: (
        *((), (None,), ("(",), (9, 3, 1), (0.9, 0.1), (float("nan"),), (-1.0,), ("gama$", "bias$"), "text", 3, None),
        *(("test", "test"), (0.5, 0.5, 0.5), (True, "a"), ([],), (1e300, 1e301), (0.0,)),
    ),
}


def is_sensible(name, value, original):
    """True if a value makes sense for a field; `original` is one that does."""
    if name.endswith(UNITS):
        whole = value is None or not name.endswith("_steps") or (value in Numbers() and value == int(value))
        return value is None or (value in Numbers(0, 1e18) and whole)
    if name == "data.data_dir":
        return isinstance(value, str | None)
    if name == "model.activation_dropout" and value is None:
        # As model.dropout.
        return True
    if name == "model.gamma_init" and not isinstance(value, str):
        return value in Numbers()
    kinds = {float: (int, float), tuple: (tuple, list)}.get(type(original), (type(original),))
    if not isinstance(value, kinds) or isinstance(value, bool) != isinstance(original, bool):
        return False
    if isinstance(original, str):
        return not (WORDS.fullmatch(name) and value in ("no such word", ""))
    if isinstance(original, bool):
        return True
    rule = next((SENSE[pattern] for pattern in SENSE if re.fullmatch(pattern, name)), None)
    if isinstance(original, tuple):
        return rule(value) if rule else all(isinstance(word, str) for word in value)
    if rule is None:
        return value in Numbers()
    return rule(value) if callable(rule) else value in rule


def changed(config, name, value):
    copy = config.copy_and_resolve_references().unlock()
    *blocks, leaf = name.split(".")
    block = copy
    for each_block in blocks:
        block = block[each_block]
    with block.ignore_type():
        block[leaf] = value
    return copy


def build(config):
    """The state of a run, abstractly, as far as it follows from the configuration alone."""
    create_mesh(config.mesh)
    model = tasks.get(config.task).create_model(config, tasks.planned_files(config))
    described = tasks.describe_layers(model)
    params = described.variables["params"]
    to_steps = functools.partial(durations.steps, batch_size=config.batch_size, num_examples=10**6)
    warmup = to_steps(config.optimizer, "warmup", prefix="config.optimizer.") or 0
    schedule = create_schedule(config.optimizer, total_steps=10**6, warmup_steps=warmup)
    optimizer = create_optimizer(config.optimizer, schedule=schedule, params=params, layers=described)
    jax.eval_shape(optimizer.init, params)


def loaded():
    return {case: load(case[0]).get_config(case[1]) for case in CASES}


def mutations():
    """Triples of a case, a field's name and its new value: of every field some, each in a configuration drawn anew of the
    files that were drawn least."""
    draw, uses = random.Random(SEED), collections.Counter()
    configs = loaded()
    cases_of = {}
    for case, config in configs.items():
        for name in flatten(config):
            cases_of.setdefault(name, []).append(case)
    for name, cases in cases_of.items():
        kinds = {type(flatten(configs[case])[name]) for case in cases} - {type(None)}
        kind = float if name.endswith(UNITS) else (kinds or {str}).pop()
        for value in draw.sample(VALUES[kind], min(MUTATIONS, len(VALUES[kind]))):
            if name != "task":
                case = min(draw.sample(cases, len(cases)), key=lambda each: uses[each[0]])
                uses[case[0]] += 1
                yield case, configs[case], name, value


def outcome(config, name, value):
    """An empty text for a change that ends well; else what is wrong with its end."""
    original = flatten(config)[name]
    original = 1.0 if original is None else original
    try:
        new = changed(config, name, value)
        # ml_collections makes floats of whole numbers.
        sensible = is_sensible(name, flatten(new)[name], original)
        accepted = validate(new)
        if name.startswith(BUILT):
            build(accepted)
    except BadInput as error:
        text = str(error)
        if "\n" in text or len(text) > 500:
            return f"refused in more than a line: {text}"
        return "" if name.rsplit(".", 1)[-1] in text else f"refused without the field's name: {text}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "" if sensible else "accepted"


@pytest.mark.parametrize("case", CASES)
def test_every_value_of_a_configuration_file_makes_sense(case):
    config = load(case[0]).get_config(case[1])
    assert not [
        (name, value)
        for name, value in flatten(config).items()
        if value is not None and not is_sensible(name, value, value)
    ]


@pytest.mark.parametrize(
    ("task", "name", "value"),
    [
        ("image_classification", "model.init_std", -0.02),
        ("image_classification", "model.init_std", 0.0),
        ("image_classification", "model.norm_epsilon", -1.0),
        ("image_classification", "model.patch_gain", 0.0),
        ("image_classification", "model.width", 2**63),
        ("image_classification", "label_smoothing", 1.5),
        ("image_classification", "optimizer.end_factor", -2.0),
        ("image_classification", "optimizer.step_at", (0.9, 0.1)),
        ("image_classification", "optimizer.trust_coefficient", -1.0),
        ("image_classification", "optimizer.no_decay", ("(",)),
        ("image_classification", "optimizer.scale_parameters", ("gama$",)),
        ("image_classification", "data.std", (None,)),
        ("image_classification", "data.eval_splits", (9, 3, 1)),
        ("image_classification", "data.eval_splits", ("test", "test")),
        ("image_classification", "total_steps", 1e30),
        ("image_classification", "log_every_steps", 1.5),
        ("image_classification", "mesh.data", 0),
        ("image_classification", "seed", 2**32),
        ("image_classification", "seed", 2**63),
        ("image_classification", "batch_size", 10**400),
        ("translation", "data.buckets", (9, 3, 1)),
        ("speech_recognition", "data.buckets", (2.0, float("nan"))),
    ],
)
def test_a_value_once_accepted_or_answered_with_a_traceback_is_refused(task, name, value):
    with pytest.raises(BadInput, match=rf"^config\.({name}|mesh) = ") as refusal:
        build(validate(changed(default_config(task), name, value)))
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 500


def test_no_change_of_a_field_gives_a_traceback_or_is_accepted_though_it_makes_no_sense():
    drawn = list(mutations())
    assert len(drawn) >= 300
    assert {case[0] for case, *_ in drawn} == {name for name, _ in CASES}
    faults = {}
    for case, config, name, value in drawn:
        problem = outcome(config, name, value)
        if problem:
            shown = repr(value) if len(repr(value)) < 40 else f"{repr(value)[:30]}…"
            faults[f"configs/{case[0]}:{case[1]} --config.{name}={shown}"] = problem
    assert not faults
