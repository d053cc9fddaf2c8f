"""Data sets through TFDS: the project's own builder, sets prepared by name, and what the errors say."""

import io
import os
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from sigmarep.data import images, sources
from sigmarep.errors import BadInput


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data folder in which the digits were prepared on first use."""
    path = str(tmp_path_factory.mktemp("tfds"))
    sources.describe("digits", data_dir=path)
    return path


def test_the_digits_are_scikit_learns(folder):
    from sklearn.datasets import load_digits

    described = sources.describe("digits", data_dir=folder)
    assert described == (10, (8, 8, 1), {"train": 1437, "test": 360})
    test = sources.open_source("digits", "test", data_dir=folder)
    bunch = load_digits()
    read = {(test[i]["image"].tobytes(), int(test[i]["label"])) for i in range(len(test))}
    expected = {
        (np.round(image * 255 / 16).astype(np.uint8).tobytes(), int(label))
        for image, label in zip(bunch.images[1437:], bunch.target[1437:], strict=True)
    }
    assert len(test) == 360
    assert read == expected


def test_slices_are_splits(folder):
    assert len(sources.open_source("digits", "train[:10%]", data_dir=folder)) == 144


def test_reading_needs_no_tensorflow(folder):
    import subprocess
    import sys

    code = (
        "import sys; from sigmarep.data import sources; "
        f"sources.open_source('digits', 'test', data_dir={folder!r})[0]; "
        "print('tensorflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


class Imagenet2012(tfds.core.GeneratorBasedBuilder):
    """Pictures of several sizes and modes under TFDS's own name and features, as a prepared folder has them."""

    name = "imagenet2012"
    VERSION = tfds.core.Version("5.1.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(num_classes=1000),
            "file_name": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(6), "validation": self._generate_examples(4)}

    def _generate_examples(self, count):
        rng = np.random.default_rng(0)
        for i in range(count):
            picture = Image.fromarray(rng.integers(0, 255, (40 + i, 60, 3), dtype=np.uint8))
            encoded = io.BytesIO()
            picture.convert(["RGB", "L"][i % 2]).save(encoded, format="JPEG")
            encoded.seek(0)
            yield i, {"image": encoded, "label": i, "file_name": str(i)}


def test_a_prepared_imagenet_travels_the_same_road(tmp_path):
    Imagenet2012(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    described = sources.describe("imagenet2012", data_dir=str(tmp_path))
    assert described.num_classes == 1000
    config = images.default_config()
    images.imagenet_2012(config)
    config.image_size = 32
    transform, mix = images.train_transforms(config)
    source = sources.open_source("imagenet2012", "train", data_dir=str(tmp_path))
    rng = np.random.default_rng(0)
    examples = [transform(source[i], rng) for i in range(6)]
    assert all(example["image"].shape == (32, 32, 3) for example in examples)
    pair = mix({name: np.stack([examples[0][name], examples[1][name]]) for name in examples[0]}, rng)
    assert pair["image"].dtype == np.float32
    evaluate = images.eval_transform(config)
    validation = sources.open_source("imagenet2012", "validation", data_dir=str(tmp_path))
    assert evaluate(validation[1])["image"].shape == (32, 32, 3)


@pytest.mark.parametrize("name", ["cifar10", "imagenet2012", "imagenette"])
def test_a_set_that_is_not_prepared_names_the_command(name, tmp_path):
    with pytest.raises(BadInput, match=rf"python scripts/prepare_data.py --name {name} --data_dir {tmp_path}"):
        sources.open_source(name, "train", data_dir=str(tmp_path))


def test_an_unknown_name_gets_the_nearest_one(tmp_path):
    with pytest.raises(BadInput, match="'cifr10': there is no such data set; did you mean 'cifar10'"):
        sources.describe("cifr10", data_dir=str(tmp_path))


def test_an_unknown_split_lists_the_splits(folder):
    with pytest.raises(BadInput, match="no split 'validation'; expected one of train, test"):
        sources.open_source("digits", "validation", data_dir=folder)


def test_damaged_files_are_said_to_be(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    for where, _, names in os.walk(tmp_path):
        for name in names:
            if "array_record" in name:
                os.truncate(os.path.join(where, name), 10)
    with pytest.raises(BadInput, match=r"cannot be read .* delete that folder and prepare it again"):
        sources.open_source("digits", "train", data_dir=str(tmp_path))


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=r"config\.data\.data_dir = .*cannot be written"):
        sources.describe("digits", data_dir=str(tmp_path / "file"))
