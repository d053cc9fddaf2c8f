"""Sharpness, interventions and QK-clip through the one trainer, on a tiny run."""

import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from sigmarep.errors import BadInput
from sigmarep.training import train_and_evaluate
from sigmarep.training.config import default_config, validate
from sigmarep.training.experiment import build
from sigmarep.training.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture
def config():
    config = default_config("image_classification")
    config.batch_size, config.total_steps, config.log_every_steps = 16, 8, 1
    config.model.depth, config.model.width, config.model.num_heads, config.model.mlp_dim = 1, 8, 2, 8
    config.model.scan = False
    config.model.patch_size = 4
    config.model.reparam, config.model.norm, config.model.init_std = "sigma", "post", 0.3
    config.optimizer.name, config.optimizer.learning_rate, config.optimizer.schedule = "adam", 1e-2, "constant"
    config.data.in_memory = True
    config.writers.progress = "off"
    return config


@pytest.mark.parametrize("relative", [False, True])
def test_sharpness_is_the_largest_eigenvalue_of_the_dense_hessian(config, relative):
    """Also where γ, biases and scales have half the rate, and the gradients in kernels are relative."""
    if relative:
        config.optimizer.relative_gradients, config.optimizer.scale_parameters_factor = True, 0.5
    config.sharpness.every_steps, config.sharpness.iterations = 2, 60
    experiment = build(validate(config))
    state = experiment.create_state()
    batches = experiment.data.train_stream(start=0, process_index=0, process_count=1)
    first = next(batches)
    for batch in (first, next(batches), next(batches)):
        state, _ = experiment.runner.step(state, batch, panel=False)
    found = experiment.sharpness()(state)

    flat, unravel = ravel_pytree(state.params)

    def loss(flat):
        variables = {"params": unravel(flat), **state.model_state}
        logits, _ = experiment.task.model.apply(variables, first["image"], deterministic=False, mutable=["spectral"])
        return jnp.mean(-jnp.take_along_axis(jax.nn.log_softmax(logits), first["label"][:, None], axis=1))

    dense = np.asarray(jax.jit(jax.jacrev(jax.jacrev(loss)))(flat), np.float64)
    assert found["sharpness/hessian"] == pytest.approx(np.linalg.eigvalsh(dense)[-1], rel=1e-3)
    adam = next(
        each for each in jax.tree.leaves(state.opt_state, is_leaf=lambda x: hasattr(x, "nu")) if hasattr(each, "nu")
    )
    moment = np.sqrt(np.asarray(ravel_pytree(adam.nu)[0], np.float64) / (1 - 0.999**3)) + 1e-8
    leaves = jax.tree_util.tree_leaves_with_path(state.params)
    gammas = {path[:-1] for path, _ in leaves if path[-1].key == "gamma"}

    def factor(path, w):
        if path[-1].key in ("gamma", "bias", "scale"):
            return 0.5
        return np.linalg.norm(w) if path[-1].key == "kernel" and path[:-1] in gammas else 1.0

    longer = np.concatenate([np.full(w.size, factor(path, w) if relative else 1.0) for path, w in leaves])
    scale = np.sqrt((1 - 0.9**3) * moment / longer)
    largest = np.linalg.eigvalsh(dense / scale[:, None] / scale)[-1]
    assert found["sharpness/preconditioned"] == pytest.approx(largest, rel=1e-2)
    assert found["sharpness/threshold"] == pytest.approx(200.0)
    assert found["sharpness/preconditioned_threshold"] == pytest.approx(3800.0)


def test_an_intervention_changes_what_follows_alone_and_a_resumed_run_goes_on_after_it(config, tmp_path):
    config.sharpness.every_steps = 4
    train_and_evaluate(config, str(tmp_path / "plain"))
    config.intervention.at_steps = 4
    config.intervention.attention_temperature = 0.1
    config.intervention.learning_rate_factor = 3.0
    config.checkpoint_every_steps = 6
    train_and_evaluate(config, str(tmp_path / "changed"))
    plain, changed = (
        [row for row in read_metrics(str(tmp_path / name / "metrics.jsonl")) if "train/loss" in row]
        for name in ("plain", "changed")
    )
    losses = [[row["train/loss"] for row in rows] for rows in (plain, changed)]
    assert losses[0][:4] == losses[1][:4]
    assert all(a != b for a, b in zip(losses[0][4:], losses[1][4:], strict=True))
    assert [row["train/learning_rate"] for row in changed] == pytest.approx([1e-2] * 4 + [3e-2] * 4)
    # A tenth of the temperature: ten times the logits of the same step.
    ratio = changed[4]["attention/max_logit/encoder/block_0"] / plain[4]["attention/max_logit/encoder/block_0"]
    assert ratio == pytest.approx(10.0, rel=1e-4)
    assert changed[4]["attention/entropy_min"] < plain[4]["attention/entropy_min"]

    # Stopped after step 6, whose checkpoint is the last.
    shutil.copytree(tmp_path / "changed", tmp_path / "resumed")
    for path in (tmp_path / "resumed/checkpoints").iterdir():
        if path.name.startswith("8"):
            shutil.rmtree(path)
    train_and_evaluate(config, str(tmp_path / "resumed"))
    rows = [read_metrics(str(tmp_path / name / "metrics.jsonl")) for name in ("changed", "resumed")]
    timed = "train/examples_per_second"
    stripped = [[{k: v for k, v in row.items() if k != timed} for row in each] for each in rows]
    assert stripped[0] == stripped[1]
    assert all(math.isfinite(row["sharpness/hessian"]) for row in rows[0] if "sharpness/hessian" in row)
    assert sum("sharpness/hessian" in row for row in rows[0]) == 2


@pytest.mark.parametrize("parallel", ["jit", "pmap"])
def test_qk_clip_brings_the_largest_logits_of_the_same_batch_to_its_threshold(config, parallel):
    config.parallel, config.model.reparam, config.optimizer.learning_rate = parallel, "none", 0.0
    config.optimizer.qk_clip = 0.01
    experiment = build(validate(config))
    state = experiment.runner.put_state(experiment.create_state())
    batch = next(experiment.data.train_stream(start=0, process_index=0, process_count=1))
    state, first = experiment.runner.step(state, batch, panel=True)
    _, second = experiment.runner.step(state, batch, panel=True)
    before, after = (
        np.ravel(output.panel["attention"]["encoder"]["block_0"]["attention"]["max_logit"])
        for output in (first, second)
    )
    assert (before > 0.01).all()
    np.testing.assert_allclose(after, 0.01, rtol=1e-4)


def test_what_is_refused(config):
    config.optimizer.qk_clip = 1.0
    with pytest.raises(BadInput, match=r"config.optimizer.qk_clip = 1.0: needs config.model.reparam = 'none'"):
        build(validate(config))
    config.optimizer.qk_clip = 0.0
    config.sharpness.every_steps = 2
    config.parallel = "pmap"
    with pytest.raises(BadInput, match=r"config.sharpness.every_steps: needs config.parallel = 'jit'"):
        build(validate(config))
    config.parallel = "jit"
    config.intervention.attention_temperature = 0.0
    with pytest.raises(BadInput, match=r"config.intervention.attention_temperature = 0.0: expected a number above"):
        validate(config)
