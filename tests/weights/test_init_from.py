"""Runs that begin from weights, and trained models for other programs."""

import dataclasses
import importlib.util
import json
import shutil

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from sigmarep import export
from sigmarep.errors import BadInput
from sigmarep.inference import open_run
from sigmarep.training import init_from, train_and_evaluate
from sigmarep.training.config import default_config, validate
from sigmarep.training.experiment import build
from sigmarep.training.metrics import read_metrics
from sigmarep.training.restore import restore
from sigmarep.weights import files, load, names
from tests.weights.vits import described, numpy_vit

pytestmark = pytest.mark.usefixtures("one_device")


def tiny(data_dir, **model):
    config = default_config("image_classification")
    config.data.data_dir, config.data.eval_splits = str(data_dir), ()
    config.model.update({"depth": 2, "width": 16, "num_heads": 2, "mlp_dim": 16, "reparam": "sigma", **model})
    config.optimizer.learning_rate = 0.01
    config.total_steps, config.log_every_steps = 2, 1
    config.batch_size, config.writers.progress = 8, "off"
    return config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def trained(folder):
    """A σReparam ViT after two steps."""
    train_and_evaluate(tiny(folder), str(folder / "trained"))
    return open_run(str(folder / "trained"))


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).standard_normal((3, 8, 8, 1)).astype(np.float32)


def logits(run, images):
    return np.asarray(jax.jit(run.task.model.apply)(run.variables, images))


@pytest.mark.parametrize("model", [{"reparam": "none"}, {"scan": False, "qkv": "fused"}])
def test_a_workdir_gives_its_function_to_models_of_other_layouts(folder, trained, images, model):
    config = tiny(folder, **model)
    config.init_from.path, config.ema_decay = trained.folder, 0.9
    experiment = build(validate(config))
    start = init_from.read(experiment.config, experiment.layers)
    state = jax.device_get(experiment.create_state(start.params))
    got = experiment.task.model.apply({"params": state.params, **state.model_state}, images)
    np.testing.assert_allclose(got, logits(trained, images), rtol=1e-5, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, state.ema, state.params)
    assert start.lines[0].startswith(f"weights of {trained.folder} (names of sigmarep, sha256 ")
    assert start.lines[1:] == (f"  {len(start.params)} of {len(start.params)} parameters loaded",)


def test_a_run_resumes_without_the_file_that_it_began_from(folder, trained, images):
    expected = logits(trained, images)
    shutil.copytree(trained.folder, folder / "origin")
    config = tiny(folder, qkv="fused")
    config.init_from.path, config.optimizer.layer_decay = str(folder / "origin"), 0.5
    workdir = folder / "tuned"
    train_and_evaluate(config, str(workdir))
    record = json.loads((workdir / "init_from.json").read_text())
    assert record["fingerprint"] == files.digest(f"{trained.folder}/checkpoints/2")
    assert record["step"] == 2
    assert record["names"] == "sigmarep"
    losses = [row["train/loss"] for row in read_metrics(str(workdir / "metrics.jsonl")) if "train/loss" in row]
    # As after a kill before the first checkpoint of its own.
    shutil.rmtree(workdir / "checkpoints" / "2")
    shutil.rmtree(folder / "origin")
    np.testing.assert_allclose(logits(open_run(str(workdir)), images), expected, rtol=1e-5, atol=1e-5)
    train_and_evaluate(config, str(workdir))
    again = [row["train/loss"] for row in read_metrics(str(workdir / "metrics.jsonl")) if "train/loss" in row]
    assert again == losses


def test_what_is_wrong_with_the_file_is_said_before_anything_is_written(folder):
    config = tiny(folder)
    config.init_from.path = str(folder / "nothing.safetensors")
    with pytest.raises(BadInput, match=r"config.init_from.path = '.*nothing.safetensors': there is no"):
        train_and_evaluate(config, str(folder / "refused"))
    assert not (folder / "refused").exists()


def test_the_momentum_encoder_begins_as_the_encoder_does(folder, trained):
    config = default_config("contrastive")
    config.data.data_dir, config.method, config.batch_size, config.total_steps = str(folder), "moco_v3", 8, 1
    config.model.update({"depth": 2, "width": 16, "num_heads": 2, "mlp_dim": 16, "reparam": "sigma", "norm": "pre"})
    config.model.patch_size = 2
    for head in (config.projector, config.predictor):
        head.hidden = head.width = 8
    config.init_from.path = trained.folder
    experiment = build(validate(config))
    start = init_from.read(experiment.config, experiment.layers)
    assert {name.split("/")[0] for name in start.params} == {"vit"}
    state = jax.device_get(experiment.create_state(start.params))
    momentum = state.model_state["momentum"]
    jax.tree.map(np.testing.assert_array_equal, momentum["params"]["vit"], state.params["vit"])
    jax.tree.map(np.testing.assert_array_equal, momentum["spectral"]["vit"], state.model_state["spectral"]["vit"])


@pytest.mark.parametrize("word", ["timm", "huggingface", "sigmarep"])
def test_exported_weights_come_back_as_the_same_function(folder, trained, images, word):
    config = tiny(folder, reparam="none")
    path = str(folder / f"{word}.safetensors")
    lines = export.save_weights(trained, path, names=word)
    assert lines[0].startswith(f"{path}: ")
    arrays = files.read(path)
    assert names.detected(arrays) == word
    assert not any("gamma" in name or "sigma" in name for name in arrays)
    config.init_from.path = path
    experiment = build(validate(config))
    start = init_from.read(experiment.config, experiment.layers)
    assert len(start.lines) == 2
    state = experiment.create_state(start.params)
    got = experiment.task.model.apply({"params": state.params}, images)
    np.testing.assert_allclose(got, logits(trained, images), rtol=1e-5, atol=1e-5)


def test_weights_for_big_vision(trained, images):
    with pytest.raises(BadInput, match=r"--names big_vision: config.model.activation = 'gelu' is not the function"):
        export.weights(trained, names="big_vision")
    config = ml_collections.ConfigDict(trained.config.to_dict())
    config.model.activation = "gelu_tanh"
    model = trained.task.model
    model = model.clone(transformer=dataclasses.replace(model.transformer, activation="gelu_tanh"))
    arrays = export.weights(dataclasses.replace(trained, config=config), names="big_vision").arrays
    expected = numpy_vit(arrays, images)
    np.testing.assert_allclose(model.apply(trained.variables, images), expected, rtol=1e-4, atol=1e-5)


def test_a_folder_for_from_pretrained(folder, trained):
    export.save_weights(trained, str(folder / "pretrained"), names="huggingface")
    config = json.loads((folder / "pretrained" / "config.json").read_text())
    assert config["id2label"]["7"] == "7"
    assert config["layer_norm_eps"] == 1e-6
    assert "classifier.weight" in files.read(str(folder / "pretrained"))


@pytest.mark.skipif(importlib.util.find_spec("flatbuffers") is None, reason="needs the extra export")
def test_an_artefact_for_a_batch_of_any_size(folder, trained, images):
    path = str(folder / "vit.stablehlo")
    export.save_stablehlo(trained, path)
    with open(path, "rb") as file:
        call = jax.export.deserialize(bytearray(file.read())).call
    for rows in (1, 3):
        got = call(jnp.asarray(images[:rows]))
        np.testing.assert_allclose(got, logits(trained, images[:rows]), rtol=1e-5, atol=1e-5)


def test_the_run_is_not_changed_by_being_begun_from(trained):
    assert restore(None, trained.folder).step == 2


def test_shapes_of_a_fixed_table_of_positions():
    from sigmarep.models.vit import ViT
    from sigmarep.nn import TransformerConfig

    fixed = ViT(TransformerConfig(depth=1, width=8, num_heads=2, mlp_dim=8), 4, 3, positions="sincos")
    assert "positions" not in described(fixed).variables["params"]
    assert load.square_grid(197) == (14, 1)
    assert load.square_grid(7) is None
