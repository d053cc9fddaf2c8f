"""Arms as configurations, and what modules sow in the collection `losses` on its way through the training step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sigmarep.configuration import flatten
from sigmarep.errors import BadInput
from sigmarep.nn.layers import describe
from sigmarep.remedies import ARMS, SWEPT, set_arm
from sigmarep.training.config import default_config, validate
from sigmarep.training.step import create_state, make_train_step
from tests.training.test_step import TinyTask, batches


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("task", ["image_classification", "language_modeling", "translation"])
def test_every_arm_is_a_valid_configuration_of_every_task_and_changes_what_it_names_alone(task, arm):
    config = default_config(task)
    set_arm(config, arm)
    validate(config)
    before, after = flatten(default_config(task)), flatten(config)
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {name for name, value in ARMS[arm].items() if before[name] != value}


def test_the_arms_that_are_swept_exist_and_others_are_refused():
    assert set(SWEPT) <= set(ARMS)
    with pytest.raises(BadInput, match="config argument arm = 'warp': expected one of pre_ln, post_ln, sigma, "):
        set_arm(default_config("translation"), "warp")


FIELDS = {"entropy_target": 0.3, "seq_vcr": 0.5, "norm": "pre", "reparam": "none"}


@functools.cache
def stepped(accumulation=1):
    task, optimizer = TinyTask(**FIELDS), optax.sgd(1.0)
    state = create_state(task.init, optimizer, seed=0, ema=False)
    layers = describe(task.init, jax.random.key(0))
    make = make_train_step(task, optimizer, lambda _: 1.0, layers=layers, accumulation=accumulation)
    step = jax.jit(make, static_argnums=2)
    batch = next(batches(1))
    return task, state, batch, step(state, batch, True)


def test_the_step_adds_what_modules_sowed_to_the_gradient_and_not_to_the_reported_loss():
    task, state, batch, (new, output) = stepped()
    rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)

    def parts(params):
        found = task.loss(params, state.model_state, batch, rng, attention=False)
        sown = sum(map(jnp.sum, jax.tree.leaves(found.model_state["losses"])))
        return found.loss[0] / found.loss[1], sown

    loss, sown = parts(state.params)
    assert sown > 0
    np.testing.assert_allclose(output.scalars["loss"], loss, rtol=1e-5)
    gradient = jax.grad(lambda params: sum(parts(params)))(state.params)
    expected = jax.tree.map(lambda x, g: x - g, state.params, gradient)
    for (path, found), wanted in zip(
        jax.tree_util.tree_leaves_with_path(new.params), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-5, err_msg=str(path))
    assert np.all(new.params["encoder"]["blocks"]["attention"]["log_scale"] != 0)


def test_the_state_keeps_its_shapes_and_microbatches_have_losses_too():
    _, state, _, (new, _) = stepped()
    _, _, _, (split, _) = stepped(2)
    shapes = [jax.tree.map(jnp.shape, each.model_state) for each in (state, new, split)]
    assert shapes[0] == shapes[1] == shapes[2]
    assert np.all(split.params["encoder"]["blocks"]["attention"]["log_scale"] != 0)
