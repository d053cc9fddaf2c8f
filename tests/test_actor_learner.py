"""The example of actors and learners."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sigmarep.core import spectral

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def policy():
    path = Path(__file__).parents[1] / "examples" / "actor_learner" / "policy.py"
    spec = importlib.util.spec_from_file_location("actor_learner_policy", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def result(policy):
    return policy.main(updates=4)


def test_acting_costs_what_the_plain_model_costs_and_less_than_without_folding(result):
    costs = result["costs"]
    assert costs["folded"] == costs["plain"]
    assert costs["not folded"][0] > costs["plain"][0]
    assert result["losses"].shape == (8,)
    assert len(set(map(float, result["losses"]))) == 8


def test_the_actor_with_its_cache_does_what_the_learner_would(policy, result):
    observations, _ = policy.demonstrations(jax.random.key(5), 3)
    variables = jax.tree.map(lambda x: x[2], result["agents"].variables)
    logits = jax.jit(policy.LEARNER.apply)(variables, observations)
    actions = jax.jit(policy.act)(jax.tree.map(lambda x: x[2], result["folded"]), observations)
    np.testing.assert_array_equal(actions, jnp.argmax(logits, -1))


def test_an_update_makes_one_power_step(policy, result):
    agent = jax.tree.map(lambda x: x[1], result["agents"])
    after, _ = jax.jit(policy.update)(agent, jax.random.key(6))
    names = ("memory", "blocks", "mlp", "up")
    before, stored = agent.variables, after.variables["spectral"]
    for name in names:
        before = {
            key: before[key].get(name, before[key]) if isinstance(before[key], dict) else before[key] for key in before
        }
        stored = stored.get(name, stored)
    kernel, u = before["params"]["kernel"][0], before["spectral"]["u"][0]
    np.testing.assert_allclose(stored["u"][0], spectral.power_step(kernel, u).u, rtol=1e-4, atol=1e-6)
