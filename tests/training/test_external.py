"""Optimizers and schedules of optax and of one's own: what they are given, where they stand, what is refused."""

import sys

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from sigmarep.errors import BadInput
from sigmarep.nn.layers import Layers
from sigmarep.training.config import default_config, validate
from sigmarep.training.external import is_optimizer, is_schedule
from sigmarep.training.optimizers import create_optimizer
from sigmarep.training.schedules import create_schedule

pytestmark = pytest.mark.usefixtures("one_device")

PARAMS = {"kernel": jnp.asarray([[1.0, -2.0, 0.5], [0.3, 4.0, -1.0]]), "bias": jnp.asarray([0.1, 0.2, -0.3])}


def gradients(step):
    rng = np.random.default_rng(step)
    return {name: jnp.asarray(rng.normal(size=x.shape), jnp.float32) for name, x in PARAMS.items()}


def config(name="adafactor", arguments=None, **fields):
    changed = {"name": name, "schedule": "constant", "learning_rate": 0.1, "arguments": arguments or {}, **fields}
    optimizer = default_config("image_classification").optimizer
    with optimizer.unlocked():
        optimizer.update(ml_collections.ConfigDict(changed))
    return optimizer


def trained(optimizer, steps=4):
    params, state = PARAMS, optimizer.init(PARAMS)
    for step in range(steps):
        updates, state = optimizer.update(gradients(step), state, params)
        params = optax.apply_updates(params, updates)
    return params


def created(optimizer):
    schedule = create_schedule(optimizer, total_steps=10)
    return create_optimizer(optimizer, schedule=schedule, params=PARAMS, layers=Layers({}, stacked={}))


def rates(step):
    return 0.1 * (1 - step / 10)


MASK = {"kernel": True, "bias": False}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {"name": "adafactor", "arguments": {"decay_rate": 0.6, "min_dim_size_to_factor": 2}},
            optax.adafactor(rates, min_dim_size_to_factor=2, decay_rate=0.6),
        ),
        # Its own mask and decay are given.
        ({"name": "optax.adamw", "weight_decay": 0.3}, optax.adamw(rates, weight_decay=0.3, mask=MASK)),
        # It has no decay: ours follows, decoupled.
        ({"name": "optax.adam", "weight_decay": 0.3}, optax.adamw(rates, weight_decay=0.3, mask=MASK)),
        # A direction, whose rate follows.
        (
            {"name": "scale_by_belief", "weight_decay": 0.3, "arguments": {"b1": 0.5}},
            optax.chain(
                optax.scale_by_belief(b1=0.5), optax.add_decayed_weights(0.3, MASK), optax.scale_by_learning_rate(rates)
            ),
        ),
        ({"name": "prodigy", "arguments": {"weight_decay": 0.3}}, optax.contrib.prodigy(rates, weight_decay=0.3)),
        # Clipping comes first, the factors of rates last.
        (
            {"name": "optax.sgd", "clip_norm": 0.5, "scale_parameters_factor": 0.1, "arguments": {"momentum": 0.5}},
            optax.chain(
                optax.clip_by_global_norm(0.5),
                optax.sgd(rates, momentum=0.5),
                optax.masked(optax.scale(0.1), {"kernel": False, "bias": True}),
            ),
        ),
    ],
    ids=lambda each: each["name"] if isinstance(each, dict) else "",
)
def test_an_optimizer_of_optax_trains_with_its_own_arguments(fields, expected):
    found = trained(created(config(**fields, schedule="linear")))
    wanted = trained(expected)
    for name in PARAMS:
        np.testing.assert_allclose(found[name], wanted[name], rtol=2e-6)
        assert np.any(found[name] != PARAMS[name])


def my_optimizer(learning_rate, scale=1.0):
    return optax.sgd(lambda step: scale * learning_rate(step))


def my_schedule(total_steps, half=0.5):
    return lambda step: jnp.where(step < total_steps // 2, 1.0, half)


def test_one_of_ones_own_is_named_with_a_dot():
    found = trained(created(config(f"{__name__}.my_optimizer", {"scale": 2.0}, schedule="linear")))
    wanted = trained(optax.sgd(lambda step: 2 * rates(step)))
    jax.tree.map(np.testing.assert_allclose, found, wanted)


def cosine(progress):
    return 0.5 * (1 + np.cos(np.pi * progress))


@pytest.mark.parametrize(
    ("schedule", "arguments", "warmup", "expected"),
    [
        ("cosine_decay_schedule", {}, 0, lambda step: cosine(step / 10)),
        (
            "optax.cosine_decay_schedule",
            {"alpha": 0.1},
            2,
            lambda step: (step + 1) / 2 if step < 2 else 0.9 * cosine((step - 2) / 8) + 0.1,
        ),
        ("warmup_cosine_decay_schedule", {}, 2, lambda step: step / 2 if step < 2 else cosine((step - 2) / 8)),
        ("exponential_decay", {"transition_steps": 1, "decay_rate": 0.5}, 0, lambda step: 0.5**step),
        (
            "piecewise_constant_schedule",
            {"boundaries_and_scales": {"3": 0.5, "6": 0.1}},
            0,
            lambda step: 1.0 if step < 3 else 0.5 if step < 6 else 0.05,
        ),
        (
            "sgdr_schedule",
            {"cosine_kwargs": ({"init_value": 0.5, "peak_value": 1.0, "warmup_steps": 2, "decay_steps": 10},)},
            0,
            lambda step: 0.5 + step / 4 if step < 2 else cosine((step - 2) / 8),
        ),
        (f"{__name__}:my_schedule", {"half": 0.25}, 0, lambda step: 1.0 if step < 5 else 0.25),
    ],
)
def test_a_schedule_gives_multiples_of_the_learning_rate(schedule, arguments, warmup, expected):
    optimizer = config(schedule=schedule, schedule_arguments=arguments)
    found = create_schedule(optimizer, total_steps=10, warmup_steps=warmup)
    for step in range(10):
        np.testing.assert_allclose(found(step), 0.1 * expected(step), rtol=1e-5, atol=1e-8)
        np.testing.assert_allclose(jax.jit(found)(jnp.int32(step)), 0.1 * expected(step), rtol=1e-5, atol=1e-8)


def no_optimizer(learning_rate):
    return learning_rate


def no_schedule():
    return lambda step: jnp.ones(3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"arguments": {"decay_rat": 0.6}}, r"config.optimizer.arguments.decay_rat: .*did you mean decay_rate\?"),
        ({"arguments": {"learning_rate": 1.0}}, "arguments.learning_rate: is given by config.optimizer.learning_rate; set"),
        ({"name": "adan", "arguments": {"weight_decay": 1.0}}, "is given by config.optimizer.weight_decay; set that"),
        ({"name": "prodigy", "weight_decay": 0.1}, "would decay biases and gains too; set it to 0.0, and"),
        ({"arguments": {"decay_rate": "much"}}, r"config.optimizer.name = 'adafactor': cannot update .*TypeError"),
        ({"name": "optax.contrib.mechanize"}, "has no|there is no such argument|refuses its arguments"),
        ({"name": "optax.polyak_sgd"}, "cannot update from gradients and parameters alone"),
        ({"name": "adam", "arguments": {"b1": 0.8}}, "'adam' is built in; .* or name it 'optax.adam'"),
        ({"name": f"{__name__}.no_optimizer"}, "gives a function; expected an optax.GradientTransformation"),
        ({"name": "optax.no_such"}, "the module optax has no attribute no_such|no module or attribute no_such"),
        ({"schedule": "exponential_decay"}, "'exponential_decay': refuses its arguments .*decay_rate"),
        ({"schedule": f"{__name__}.no_schedule"}, r"gives an array of shape \(3,\) for a step; expected a number"),
        ({"schedule": "constant", "schedule_arguments": {"value": 1.0}}, "'constant' is built in"),
        ({"schedule": "cosine_decay_schedule", "schedule_arguments": {"a": 1.0}}, "schedule_arguments.a: there is no such"),
    ],
)  # fmt: skip
def test_what_is_refused_names_the_field(fields, message):
    with pytest.raises(BadInput, match=message) as raised:
        created(config(**fields))
    assert "\n" not in str(raised.value)


def test_words_are_told_apart_before_a_run_starts():
    assert is_optimizer("adafactor")
    assert is_optimizer("prodigy")
    assert is_optimizer("scale_by_adam")
    assert not is_optimizer("apply_updates")
    assert is_schedule("sgdr_schedule")
    assert not is_schedule("inject_hyperparams")
    for name, word, message in (
        (
            "optimizer.name",
            "adafactr",
            "spectral_sphere, an optimizer of optax such as adafactor, or a dotted Python name",
        ),
        ("optimizer.schedule", "sgd", "linear, a schedule of optax such as sgdr_schedule, or a dotted Python name"),
        ("task", "image", "speech_recognition, or a dotted Python name"),
        ("callbacks", ("nothing",), "expected a tuple of dotted Python names"),
        ("writers.extra", (3,), "expected a tuple of dotted Python names"),
    ):
        config = default_config("image_classification")
        config.update_from_flattened_dict({name: word})
        with pytest.raises(BadInput, match=message) as raised:
            validate(config)
        assert str(raised.value).startswith(f"config.{name} = ")


def test_an_optimizer_of_a_module_that_is_not_imported_yet(tmp_path, monkeypatch):
    (tmp_path / "their_optimizers.py").write_text("import optax\nclass Slow:\n    make = staticmethod(optax.sgd)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = trained(created(config("their_optimizers:Slow.make", schedule="linear")))
    jax.tree.map(np.testing.assert_allclose, found, trained(optax.sgd(rates)))
    del sys.modules["their_optimizers"]
