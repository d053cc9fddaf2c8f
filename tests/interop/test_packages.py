"""Weights in and out, against the real packages timm and transformers (the extra `interop`), on the CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

from sigmarep import export
from sigmarep.inference import open_run
from sigmarep.training import train_and_evaluate
from sigmarep.training.config import default_config
from sigmarep.weights import files, load
from tests.interop import make_golden
from tests.weights.vits import begun, vit

pytestmark = pytest.mark.usefixtures("one_device")
EPSILON = {"timm": 1e-6, "huggingface": 1e-12}


@pytest.mark.parametrize("reparam", ["none", "sigma"])
@pytest.mark.parametrize("word", EPSILON)
def test_a_plain_vit_of_theirs_begins_here_with_its_logits(word, reparam, tmp_path):
    theirs = make_golden.tiny(word)
    path = str(tmp_path / "w.safetensors")
    save_file(make_golden.arrays(theirs, word, tmp_path), path)
    images = np.random.default_rng(5).standard_normal((4, 8, 8, 3)).astype(np.float32)
    model = vit(norm_epsilon=EPSILON[word], reparam=reparam)
    variables, weights = begun(model, files.read(path), word=word)
    assert not weights.at_start
    assert not weights.unused
    got, expected = jax.jit(model.apply)(variables, images), make_golden.logits(theirs, images)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_positions_from_224_to_384_pixels():
    from timm.layers import resample_abs_pos_embed

    positions = np.random.default_rng(6).standard_normal((1, 197, 32)).astype(np.float32)
    expected = resample_abs_pos_embed(torch.tensor(positions), [24, 24], num_prefix_tokens=1).numpy()
    np.testing.assert_allclose(load.resample_positions(positions, 577), expected, atol=5e-6)


@pytest.fixture(scope="module", params=["pre", "none"])
def trained(request, tmp_path_factory):
    """A σReparam ViT after five steps of training, with LayerNorm and without."""
    folder = tmp_path_factory.mktemp(request.param)
    config = default_config("image_classification")
    config.data.data_dir, config.data.eval_splits = str(folder), ()
    config.model.update({"depth": 2, "width": 24, "num_heads": 2, "mlp_dim": 40, "reparam": "sigma"})
    config.model.norm, config.model.qkv = request.param, "fused"
    config.optimizer.learning_rate, config.batch_size, config.total_steps = 0.01, 32, 5
    config.writers.progress = "off"
    train_and_evaluate(config, str(folder / "run"))
    return open_run(str(folder / "run"))


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(7).standard_normal((4, 8, 8, 1)).astype(np.float32)


def ours(run, images):
    return np.asarray(jax.jit(run.task.model.apply)(run.variables, jnp.asarray(images)))


def test_a_trained_model_opens_in_timm(trained, images, tmp_path):
    import functools

    from safetensors.torch import load_file

    path = str(tmp_path / "timm.safetensors")
    lines = export.save_weights(trained, path, names="timm")
    model = eval(lines[1], {"timm": timm, "torch": torch, "functools": functools})
    model.load_state_dict(load_file(path), strict=True)
    np.testing.assert_allclose(make_golden.logits(model.eval(), images), ours(trained, images), rtol=1e-4, atol=1e-4)


def test_a_trained_model_opens_in_transformers(trained, images, tmp_path):
    if trained.config.model.norm == "none":
        with pytest.raises(export.BadInput, match=r"--names huggingface: config.model.norm = 'none' is not"):
            export.weights(trained, names="huggingface")
        return
    export.save_weights(trained, str(tmp_path), names="huggingface")
    model, report = transformers.ViTForImageClassification.from_pretrained(str(tmp_path), output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    np.testing.assert_allclose(make_golden.logits(model.eval(), images), ours(trained, images), rtol=1e-4, atol=1e-4)
    assert model.config.id2label[7] == "7"
