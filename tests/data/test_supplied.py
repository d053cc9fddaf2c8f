"""Data sets by a dotted Python name: a function that gives examples, a class of TFDS's, with or without a folder."""

import json

import numpy as np
import pytest
import tensorflow_datasets as tfds

from sigmarep import tasks
from sigmarep.data import sources
from sigmarep.data.datasets.text_folder import TextFolder
from sigmarep.errors import BadInput
from sigmarep.training.config import default_config, validate


class Pictures:
    """Random pictures of two classes, by the number of the example."""

    class_names = ("dark", "light")

    def __init__(self, split, data_dir):
        self.size = {"train": 24, "test": 8}[split]
        self.data_dir = data_dir

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        label = index % 2
        pixels = np.random.default_rng(index).integers(128 * label, 128 * (label + 1), (8, 8, 1), np.uint8)
        return {"image": pixels, "label": label}


def sentences(split, folder=""):
    return [{"text": f"{split} {i} {folder}"} for i in range(5)]


class Mine(TextFolder):
    """A class of TFDS's that reads a folder."""

    name = "mine"


def empty(split):
    return []


def numbers(split):
    return [1, 2]


NAME = f"{__name__}:Pictures"


def test_a_function_gives_the_examples_of_a_split_and_what_it_asks_for(tmp_path):
    source = sources.open_source(NAME, "train", data_dir=str(tmp_path))
    assert (len(source), source.data_dir) == (24, str(tmp_path))
    assert sources.open_source(f"{__name__}.sentences", "test", folder="x")[4] == {"text": "test 4 x"}
    assert sources.describe(NAME).class_names == ("dark", "light")
    assert sources.sample_rate(NAME, "audio") is None
    # Nothing is prepared, and nothing written.
    assert list(tmp_path.iterdir()) == []


def test_its_fingerprint_follows_the_examples():
    def of(split, **options):
        return sources.fingerprint(f"{__name__}.sentences", split, **options)

    assert of("train") == of("train")
    assert len({of("train"), of("test"), of("train", folder="x")}) == 3


def test_a_class_of_tfds_is_prepared_once_and_read(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "train.txt").write_text("one\n\ntwo\n")
    options = {"data_dir": str(tmp_path / "tfds"), "folder": str(tmp_path / "texts")}
    source = sources.open_source(f"{__name__}.Mine", "train[:1]", **options)
    assert [each["text"] for each in source] == [b"one"]
    assert (tmp_path / "tfds" / "mine").exists()
    assert issubclass(Mine, tfds.core.DatasetBuilder)


def test_pictures_of_ones_own_train_a_classifier(tmp_path):
    config = default_config("image_classification")
    config.batch_size, config.total_steps = 8, 1
    config.data.name, config.data.eval_splits, config.data.num_threads = NAME, ("test",), 1
    config.data.data_dir = str(tmp_path)
    checked = validate(config)
    data = tasks.get(config.task).open_data(checked)
    assert json.loads(data.files()["labels.json"]) == ["dark", "light"]
    batch = next(data.train_stream(start=0, process_index=0, process_count=1))
    assert batch["image"].shape == (8, 8, 8, 1)
    model = tasks.get(config.task).create_model(checked, data.files())
    (evaluation,) = data.evaluations(model)
    assert sum(batch["mask"].sum() for batch in evaluation.batches(process_index=0, process_count=1)) == 8


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (f"{__name__}.Pictures", r"fails to open the split 'other' \(KeyError: 'other'\)"),
        (f"{__name__}.empty", "the split 'other' is empty; expected examples that map features to values"),
        (f"{__name__}.numbers", "the split 'other' has examples of type int; expected"),
        (f"{__name__}.NAME", "is a str; expected a function that is given a split"),
        (f"{__name__}.nothing", "has no attribute nothing"),
        ("digit", "did you mean 'digits'\\? expected one of digits, .* or a dotted Python name"),
    ],
)
def test_what_is_refused_is_one_line(name, message, tmp_path):
    with pytest.raises(BadInput, match=message) as raised:
        sources.open_source(name, "other", data_dir=str(tmp_path))
    assert str(raised.value).startswith(f"config.data.name = {name!r}: ")
    assert "\n" not in str(raised.value)


def test_pictures_without_names_of_classes_are_refused():
    with pytest.raises(BadInput, match="has no attribute class_names, the names of the classes in order"):
        sources.describe(f"{__name__}.sentences")
