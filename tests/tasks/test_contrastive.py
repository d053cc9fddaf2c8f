"""The contrastive task: its views, its momentum encoder, its state in checkpoints, and what it refuses."""

import dataclasses
import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sigmarep import tasks
from sigmarep.core import spectral
from sigmarep.errors import BadInput
from sigmarep.tasks import contrastive
from sigmarep.training import evaluate, train_and_evaluate
from sigmarep.training.checkpoints import Checkpointer
from sigmarep.training.config import default_config, validate
from sigmarep.training.experiment import build
from sigmarep.training.metrics import read_metrics
from sigmarep.training.step import create_state, make_train_step

ROOT = Path(__file__).parents[2]
ARMS = {"pre_ln": ("none", "pre"), "sigma": ("sigma", "none"), "sigma_pre_ln": ("sigma", "pre")}
TIMING = "train/examples_per_second"


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("tfds"))


def tiny(data_dir=None, **fields):
    config = default_config("contrastive")
    config.total_steps, config.log_every_steps, config.checkpoint_every_steps = 8, 1, 4
    config.batch_size = 16
    config.writers.progress = "off"
    config.model.depth, config.model.width, config.model.mlp_dim, config.model.num_heads = 1, 16, 16, 2
    config.model.scan = False
    config.model.reparam, config.model.norm, config.model.init_std = "sigma", "pre", 0.1
    config.projector.hidden, config.projector.width = 16, 8
    config.predictor.hidden, config.predictor.width = 16, 8
    config.probe.learning_rates, config.probe.weight_decays, config.probe.epochs = (0.3,), (1e-3,), 5
    config.probe.baselines = False
    config.optimizer.name, config.optimizer.learning_rate = "sgd", 0.1
    config.data.data_dir, config.data.in_memory, config.data.num_threads = data_dir, True, 1
    config.data.train_split, config.data.eval_splits = "train[:200]", ("test[:100]",)
    for name, value in fields.items():
        *blocks, leaf = name.split("__")
        block = config
        for each in blocks:
            block = block[each]
        block[leaf] = value
    return config


def rows(folder):
    found = read_metrics(f"{folder}/metrics.jsonl")
    return [{name: value for name, value in row.items() if name != TIMING} for row in found]


def losses(folder):
    return [row["train/loss"] for row in rows(folder) if "train/loss" in row]


def restored(config, folder):
    checkpoints = Checkpointer(f"{folder}/checkpoints", keep=2)
    state = checkpoints.restore(build(validate(config)).abstract_state).state
    checkpoints.close()
    return jax.device_get(state)


def stream(config, start=0, count=5, process_index=0, process_count=1):
    data = contrastive.open_data(validate(config))
    batches = data.train_stream(start=start, process_index=process_index, process_count=process_count)
    return list(itertools.islice(batches, count))


def assert_same_views(first, second):
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a["views"], b["views"])


@pytest.mark.parametrize("start", [1, 3, 90])
def test_a_resumed_stream_has_the_views_of_the_uninterrupted_one(data_dir, start):
    config = tiny(data_dir)
    assert_same_views(stream(config, count=start + 2)[start:], stream(config, start=start, count=2))


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_views_of_one(data_dir, processes):
    config = tiny(data_dir)
    parts = [stream(config, process_index=i, process_count=processes) for i in range(processes)]
    joined = [{"views": np.concatenate([part["views"] for part in row])} for row in zip(*parts, strict=True)]
    assert_same_views(stream(config), joined)


@pytest.mark.slow
def test_workers_and_threads_do_not_change_the_views(data_dir):
    expected = stream(tiny(data_dir))
    assert_same_views(expected, stream(tiny(data_dir, data__num_workers=2)))
    assert_same_views(expected, stream(tiny(data_dir, data__num_workers=1, data__num_threads=4)))
    halves = [
        stream(tiny(data_dir, data__num_workers=2), start=2, count=3, process_index=i, process_count=2)
        for i in range(2)
    ]
    joined = [{"views": np.concatenate([part["views"] for part in row])} for row in zip(*halves, strict=True)]
    assert_same_views(expected[2:], joined)


def test_views_differ_and_training_sees_no_label(data_dir):
    (first, _) = stream(tiny(data_dir), count=2)
    assert list(first) == ["views"]
    assert first["views"].shape == (16, 2, 8, 8, 1)
    assert all(not np.allclose(one, other) for one, other in first["views"])
    assert not np.array_equal(first["views"], stream(tiny(data_dir, seed=1), count=1)[0]["views"])


def step_once(task, variables, images, seed=0):
    """Loss, gradient and the next model state of one batch."""
    params = variables["params"]
    state = {name: value for name, value in variables.items() if name != "params"}
    batch = {"views": jnp.asarray(images)}

    def loss(params):
        output = task.loss(params, state, batch, jax.random.key(seed), attention=False)
        return output.loss[0] / output.loss[1], output

    (value, output), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return value, gradient, output.model_state


@pytest.fixture(scope="module")
def moco(data_dir):
    """A MoCo v3 task and variables whose momentum encoder is another than the encoder."""
    task = contrastive.create_model(validate(tiny(data_dir, method="moco_v3", momentum=0.75)), {})
    variables = task.init(jax.random.key(0))
    noise = lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape)  # noqa: E731
    return task, {**variables, "params": jax.tree.map(noise, variables["params"])}


def test_the_momentum_encoder_starts_as_a_copy_without_the_predictor(data_dir):
    task = contrastive.create_model(validate(tiny(data_dir, method="moco_v3")), {})
    variables = task.init(jax.random.key(0))
    assert sorted(variables["params"]) == ["predictor", "projector", "vit"]
    assert sorted(variables["momentum"]) == ["batch_stats", "params", "spectral"]
    copied = variables["momentum"]["params"]
    assert sorted(copied) == ["projector", "vit"]
    for a, b in zip(jax.tree.leaves(copied["vit"]), jax.tree.leaves(variables["params"]["vit"]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_momentum_encoder_follows_the_parameters_with_a_spectral_state_of_its_own(moco):
    task, variables = moco
    images = np.random.default_rng(0).normal(size=(16, 2, 8, 8, 1)).astype(np.float32)
    _, gradient, state = step_once(task, variables, images)
    assert sorted(gradient) == ["predictor", "projector", "vit"]
    old, new, now = variables["momentum"]["params"]["vit"], state["momentum"]["params"]["vit"], variables["params"]
    for a, b, c in zip(*(jax.tree.leaves(tree) for tree in (old, now["vit"], new)), strict=True):
        np.testing.assert_allclose(c, 0.75 * np.asarray(a) + 0.25 * np.asarray(b), rtol=1e-5, atol=1e-6)
    kernel = np.asarray(new["patch_embedding"]["kernel"]).reshape(-1, 16).astype(np.float64)
    u = np.asarray(variables["momentum"]["spectral"]["vit"]["patch_embedding"]["u"], np.float64)
    # One power step: v = Wu/|Wu|, z = Wᵀv, σ = |z|, u = z/σ.
    v = kernel @ u / np.linalg.norm(kernel @ u)
    z = kernel.T @ v
    found = state["momentum"]["spectral"]["vit"]["patch_embedding"]
    np.testing.assert_allclose(found["u"], z / np.linalg.norm(z), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["sigma"], np.linalg.norm(z), rtol=1e-5)
    online = state["spectral"]["vit"]["patch_embedding"]
    assert np.abs(np.asarray(online["u"]) - np.asarray(found["u"])).max() > 1e-3


def test_the_decay_of_the_momentum_encoder_rises_on_half_a_cosine(data_dir):
    config = validate(tiny(data_dir, method="moco_v3", momentum=0.75, momentum_schedule="cosine"))
    task = contrastive.create_model(config, {})
    optimizer = optax.sgd(0.0)
    state = create_state(task.init, optimizer, seed=0, ema=False)
    # Both encoders begin alike.
    state = dataclasses.replace(state, params=jax.tree.map(lambda x: x + 1.0, state.params))
    step = jax.jit(make_train_step(task, optimizer, lambda _: 0.0, layers=tasks.describe_layers(task), total_steps=4))
    images = np.random.default_rng(0).normal(size=(16, 2, 8, 8, 1)).astype(np.float32)
    old = state.model_state["momentum"]["params"]["vit"]
    for made, moved in ((0, 0.25), (2, 0.25 / 2), (3, 0.25 * (1 - np.sqrt(0.5)) / 2)):
        after, _ = step(dataclasses.replace(state, step=jnp.asarray(made)), {"views": images})
        new = after.model_state["momentum"]["params"]["vit"]
        for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
            np.testing.assert_allclose(b - a, moved, rtol=1e-4, atol=1e-6)


def test_a_training_step_takes_one_power_step_over_both_views(data_dir):
    task = contrastive.create_model(validate(tiny(data_dir)), {})
    variables = task.init(jax.random.key(0))
    noise = lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape)  # noqa: E731
    variables["params"] = jax.tree.map(noise, variables["params"])
    images = np.random.default_rng(0).normal(size=(16, 2, 8, 8, 1)).astype(np.float32)
    _, _, state = step_once(task, variables, images)
    layers = (("patch_embedding",), ("encoder", "block_0", "mlp", "up"), ("encoder", "block_0", "attention", "query"))
    for path in layers:
        kernel, start, found = variables["params"]["vit"], variables["spectral"]["vit"], state["spectral"]["vit"]
        for name in path:
            kernel, start, found = kernel[name], start[name], found[name]
        matrix = kernel["kernel"].reshape(-1, start["u"].size)
        once = spectral.power_step(matrix, start["u"])
        np.testing.assert_allclose(found["u"], once.u, rtol=1e-5, atol=1e-6)
        assert np.abs(np.asarray(spectral.power_step(matrix, once.u).u) - np.asarray(found["u"])).max() > 1e-4


@pytest.mark.parametrize("method", ["simclr", "moco_v3"])
def test_a_run_goes_on_to_the_last_bit_with_statistics_and_vectors_in_its_checkpoint(data_dir, method, tmp_path):
    config = tiny(data_dir, method=method, optimizer__name="adamw", optimizer__learning_rate=1e-3, mesh__data=8)
    train_and_evaluate(config, str(tmp_path / "whole"))
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "8")
    train_and_evaluate(config, str(tmp_path / "resumed"))
    assert rows(tmp_path / "resumed") == rows(tmp_path / "whole")
    whole, resumed = restored(config, tmp_path / "whole"), restored(config, tmp_path / "resumed")
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)
    collections = {"batch_stats", "spectral"} | ({"momentum"} if method == "moco_v3" else set())
    assert set(whole.model_state) == collections
    assert np.any(whole.model_state["batch_stats"]["projector"]["norm_0"]["mean"] != 0)
    assert evaluate(None, str(tmp_path / "whole")) == {"step": 8} | {
        name: value for name, value in rows(tmp_path / "whole")[-1].items() if name.startswith("eval/")
    }


@pytest.mark.parametrize("method", ["simclr", "moco_v3"])
def test_every_way_of_using_eight_devices_gives_the_losses_of_one(data_dir, method, tmp_path, monkeypatch):
    # Fast learning would enlarge differences of rounding.
    slow = {"method": method, "total_steps": 4, "optimizer__learning_rate": 0.01, "data__eval_splits": ()}
    config = tiny(data_dir, **slow)
    folders = {}
    for name, fields in {
        "data": {"mesh__data": 8},
        "fsdp": {"mesh__data": 2, "mesh__fsdp": 4},
        "pmap": {"parallel": "pmap"},
    }.items():
        folders[name] = tmp_path / name
        train_and_evaluate(tiny(data_dir, **slow, **fields), str(folders[name]))
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: first)
    train_and_evaluate(config, str(tmp_path / "one"))
    one = restored(config, tmp_path / "one")
    for name, folder in folders.items():
        np.testing.assert_allclose(losses(folder), losses(tmp_path / "one"), rtol=2e-4, err_msg=name)
        other = restored(config, folder)
        for (path, a), b in zip(
            jax.tree_util.tree_leaves_with_path((one.params, one.model_state)),
            jax.tree.leaves((other.params, other.model_state)),
            strict=True,
        ):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4, err_msg=f"{name} {path}")


def test_a_frozen_patch_embedding_stays_under_weight_decay(data_dir, tmp_path):
    config = tiny(data_dir, freeze_patch_embedding=True, optimizer__name="adamw", optimizer__weight_decay=0.5)
    config.optimizer.no_decay = (*config.optimizer.no_decay, "patch_embedding")
    config.mesh.data = 8
    start = jax.device_get(build(validate(config)).create_state().params)["vit"]
    train_and_evaluate(config, str(tmp_path))
    end = restored(config, tmp_path).params["vit"]
    np.testing.assert_array_equal(end["patch_embedding"]["kernel"], start["patch_embedding"]["kernel"])
    blocks = "encoder", "block_0", "mlp", "up", "kernel"
    for name in blocks:
        start, end = start[name], end[name]
    assert not np.allclose(start, end)


@pytest.mark.parametrize("arm", ARMS)
def test_evaluation_measures_whole_splits_and_the_start_of_the_same_run(data_dir, arm, tmp_path):
    """At a learning rate of 0 the encoder is the one at random initialisation, and has no margin over it."""
    reparam, norm = ARMS[arm]
    config = tiny(data_dir, model__reparam=reparam, model__norm=norm, total_steps=1, mesh__data=8)
    config.optimizer.learning_rate, config.probe.baselines = 0.0, True
    config.batch_size, config.data.train_split, config.data.eval_splits = 128, "train", ("test",)
    result = train_and_evaluate(config, str(tmp_path))
    assert result["eval/test/probe_margin_over_random_init"] == pytest.approx(0, abs=0.01)
    assert result["eval/test/knn_accuracy"] == pytest.approx(result["eval/test/knn_accuracy_random_init"], abs=0.01)
    # Nearest neighbours of the pixels read 94 to 97 % of these digits.
    assert 0.92 < result["eval/test/knn_accuracy_pixels"] < 0.98
    assert result["eval/test/uniformity"] < 0 < result["eval/test/alignment"]
    data = contrastive.open_data(validate(config))
    batches = list(data.evaluation_batches("test", 0, 1))
    assert sum(batch["mask"].sum() for batch in batches if "views" in batch) == 360
    assert sum(batch["mask"].sum() for batch in batches if "views" not in batch) == 1437


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "byol"}, "config.method = 'byol': expected one of simclr, moco_v3"),
        ({"accumulation": 2}, "config.accumulation = 2: the loss of contrastive compares all examples of a batch"),
        ({"batch_size": 1}, "config.batch_size = 1: a contrastive loss needs at least 2 pictures"),
        ({"temperature": 0.0}, "config.temperature = 0.0: expected a number above 0"),
        ({"momentum": 1.5}, "config.momentum = 1.5: expected a number of at least 0 and at most 1"),
        ({"projector__norm": "group"}, "config.projector.norm = 'group': expected one of batch, none"),
        ({"projector__reparam": "sgima"}, "config.projector.reparam = 'sgima': expected one of none, sigma"),
        ({"projector__layers": 0}, "config.projector.layers = 0: expected a whole number of at least 1"),
        ({"knn__neighbours": 0}, "config.knn.neighbours = 0: expected a whole number of at least 1"),
        (
            {"probe__learning_rates": ()},
            "config.probe.learning_rates = (): expected a tuple of numbers of at least 0",
        ),
        (
            {"data__views__blur": (0.5,)},
            "config.data.views.blur = (0.5,): expected a tuple of 2 numbers",
        ),
        ({"data__views__hue": 0.7}, "config.data.views.hue = 0.7: expected a number of at least 0 and at most 0.5"),
        (
            {"data__views__crop_scale": (0.0, 1.0)},
            "config.data.views.crop_scale = (0.0, 1.0): expected a tuple of 2 numbers",
        ),
        ({"data__views__flip": -0.5}, "config.data.views.flip = -0.5: expected a number of at least 0 and at most 1"),
        (
            {"data__views__blur_sigma": (2.0, 1.0)},
            "config.data.views.blur_sigma = (2.0, 1.0): expected a tuple of 2 numbers",
        ),
        ({"model__patch_size": 3}, "config.model.patch_size = 3: does not divide the image of 8 x 8"),
        (
            {"freeze_patch_embedding": True, "optimizer__weight_decay": 0.1},
            'config.freeze_patch_embedding = True: weight decay would still shrink the patch embedding; add "patch_emb',
        ),
    ],
)
def test_impossible_values_are_refused_on_one_line(data_dir, fields, message):
    with pytest.raises(BadInput, match=re.escape(message)) as raised:
        build(validate(tiny(data_dir, **fields)))
    assert "\n" not in str(raised.value)


FIRST_EVALUATION = """
import sys

from configs.ssl.quickstart import get_config
from sigmarep.training import train_and_evaluate
from sigmarep.training.callbacks import Callback, StopTraining


class Once(Callback):
    def on_evaluation(self, run, step, metrics):
        raise StopTraining("one evaluation is enough")


config = get_config()
config.eval_every_epochs = 5
train_and_evaluate(config, sys.argv[1], callbacks=[Once()])
"""


@pytest.mark.slow
def test_five_epochs_of_the_quickstart_beat_its_random_start(data_dir, tmp_path):
    # The flags that make tiny models compile sooner make these steps four times slower.
    environment = {**os.environ, "XLA_FLAGS": "", "TFDS_DATA_DIR": data_dir, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", FIRST_EVALUATION, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    (measured,) = (row for row in rows(tmp_path) if "eval/test/probe_accuracy" in row)
    assert 55 <= measured["step"] <= 58
    # A standard error of 360 digits is 1 to 1.5 points. That it beats the pixels too takes the whole run: see the README.
    assert measured["eval/test/probe_margin_over_random_init"] > 0.03
    assert measured["eval/test/probe_margin_over_pixels"] > -0.15
