"""A folder of class folders of pictures as a data set: its splits, what is left out, changes, and a run on it."""

import json
import os
import shutil
import zlib

import numpy as np
import pytest
from PIL import Image

from sigmarep import tasks
from sigmarep.data import sources
from sigmarep.data.images import files, transforms
from sigmarep.errors import BadInput
from sigmarep.inference import open_run
from sigmarep.training import evaluate, train_and_evaluate
from sigmarep.training.config import default_config, validate


def write(path, seed=0, size=(9, 12)):
    """A picture of noise in a file of any of Pillow's formats."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def options(folder, **others):
    return {"data_dir": str(folder.parent / "prepared"), "folder": str(folder), **others}


def described(folder, **others):
    return sources.describe("image_folder", **options(folder, **others))


def listed(folder, split, **others):
    """The files and class names of a split."""
    source = sources.open_source("image_folder", split, **options(folder, **others))
    names = described(folder, **others).class_names
    return {each["file"].decode(): names[each["label"]] for each in (source[i] for i in range(len(source)))}


def test_folders_of_splits(tmp_path):
    folder = tmp_path / "own"
    for i, name in enumerate(("train/cat/a.png", "train/dog/b.JPG", "train/dog/more/c.bmp", "test/dog/d.webp")):
        write(folder / name, i)
    write(folder / "val/cat/e.gif", 9)
    write(folder / ".hidden/cat/f.png")
    description = described(folder)
    assert description.class_names == ("cat", "dog")
    assert description.splits == {"train": 3, "test": 1, "validation": 1}
    assert "left out: nothing" in description.summary
    assert listed(folder, "train") == {
        "train/cat/a.png": "cat",
        "train/dog/b.JPG": "dog",
        "train/dog/more/c.bmp": "dog",
    }
    assert listed(folder, "test+validation") == {"test/dog/d.webp": "dog", "val/cat/e.gif": "cat"}
    source = sources.open_source("image_folder", "train", **options(folder))
    for i in range(3):
        alone = files.read(folder / source[i]["file"].decode(), 3)
        np.testing.assert_array_equal(transforms.with_channels(source[i]["image"], 3), alone)


def test_a_share_of_class_folders_is_held_out_for_good(tmp_path):
    folder = tmp_path / "own"
    for i in range(100):
        write(folder / f"{'ab'[i % 2]}/{i}.png", i)
    held_out = listed(folder, "test")
    assert 10 <= len(held_out) <= 30
    assert len(held_out) + len(listed(folder, "train")) == 100
    # A copy is on the side of its original, and a new picture moves none.
    copied = next(iter(held_out))
    shutil.copy(folder / copied, folder / "a/copy.png")
    write(folder / "b/new.png", 1000)
    renewed = listed(folder, "test")
    assert renewed.keys() - {"b/new.png"} == {*held_out, "a/copy.png"}
    # A slice has pictures of both classes.
    assert set(listed(folder, "train[:20]").values()) == {"a", "b"}
    assert set(described(folder, held_out=0.0).splits) == {"train"}
    assert described(folder, held_out=0.5).splits["test"] > 35


def test_what_is_left_out_is_counted_with_its_reason(tmp_path):
    folder = tmp_path / "own"
    for i in range(8):
        write(folder / f"train/cat/{i}.png", i)
    for name in ("train/cat/cut.jpg", "test/cat/good.jpg"):
        write(folder / name, 20, size=(60, 60))
    whole = (folder / "train/cat/cut.jpg").read_bytes()
    (folder / "train/cat/cut.jpg").write_bytes(whole[: len(whole) // 2])
    header = (folder / "train/cat/0.png").read_bytes()
    # Its header claims 30,000 × 30,000 pixels; the checksum is that of the claim.
    claim = header[12:16] + (30_000).to_bytes(4, "big") * 2 + header[24:29]
    checksum = zlib.crc32(claim).to_bytes(4, "big")
    (folder / "train/cat/huge.png").write_bytes(header[:12] + claim + checksum + header[33:])
    (folder / "train/cat/empty.png").write_bytes(b"")
    (folder / "train/cat/gone.png").symlink_to(folder / "nowhere")
    (folder / "train/cat/notes\n.txt").write_text("")
    (folder / "train/bird").mkdir()
    write(folder / "train/loose.png")
    description = described(folder)
    assert description.splits == {"train": 8, "test": 1}
    assert description.class_names == ("cat",)
    assert "\n" not in description.summary
    for reason in (
        "3 unreadable (train/cat/gone.png: leads to no file, train/cat/",
        "train/cat/empty.png: is empty",
        "train/cat/cut.jpg: image file is truncated",
        "1 too large (train/cat/huge.png: has more pixels than",
        r"1 of an unknown suffix (train/cat/notes\n.txt)",
        "1 in no class folder (train/loose.png)",
        "1 class folders without a picture (train/bird)",
    ):
        assert reason in description.summary


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "there is no such folder"),
        (["notes.txt"], "has no picture in a class folder; expected train/CLASS/PICTURE"),
        (["a.png"], "has no picture in a class folder"),
        (["train/a.png", "test/b.png"], "has test/, train/ without class folders"),
        (["train/cat/a.png", "test/b.png"], "has train/ and test/, which has no class folders"),
        (["train/cat/a.png", "dog/b.png"], "has train/ and dog/, which is no split"),
        (
            ["train/cat/a.png", "val/cat/b.png", "dev/cat/c.png"],
            "several folders of the split validation: dev, val; keep",
        ),
        (["train/cat/a.png", "test/dog/b.png"], "'dog' in test is no class of train"),
        (["cat /a.png", "dog/a.png"], "'cat ' cannot name a class"),
    ],
)
def test_other_layouts_are_refused_on_one_line(tmp_path, names, message):
    folder = tmp_path / "own"
    for name in names:
        if name.endswith(".png"):
            write(folder / name)
        else:
            folder.mkdir()
            (folder / name).write_text("")
    with pytest.raises(BadInput) as error:
        described(folder)
    assert str(error.value).startswith(f"config.data.folder = {str(folder)!r}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_split_without_a_whole_picture_is_refused(tmp_path):
    (tmp_path / "own/train/cat").mkdir(parents=True)
    (tmp_path / "own/train/cat/a.png").write_bytes(b"none")
    with pytest.raises(
        BadInput, match=r"no picture for the split 'train': train/cat/a\.png: cannot identify image file"
    ):
        described(tmp_path / "own", held_out=0.0)


def test_a_replaced_picture_of_the_same_size_and_time_gives_another_data_set(tmp_path):
    folder, replaced = tmp_path / "own", tmp_path / "own/train/cat/1.png"
    for i in range(3):
        write(folder / f"train/cat/{i}.png", i)
        os.utime(folder / f"train/cat/{i}.png", (1, 1))
    before = described(folder).full_name
    content = bytearray(replaced.read_bytes())
    # In the checksum of the last chunk, which Pillow does not read.
    content[-1] ^= 1
    replaced.write_bytes(content)
    os.utime(replaced, (1, 1))
    assert described(folder).full_name != before
    content[-1] ^= 1
    replaced.write_bytes(content)
    os.utime(replaced, (2, 2))
    assert described(folder).full_name == before


def colored(folder, split, count, seed):
    """Pictures of two classes, dark red and bright green ones of changing sizes."""
    rng = np.random.default_rng(seed)
    for name, color in (("green", (90, 220, 90)), ("red", (120, 20, 20))):
        (folder / split / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.clip(rng.normal(color, 10, (8 + i, 12, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / split / name / f"{i}.png")


def tiny(task, folder):
    config = default_config(task)
    config.model.update({"depth": 1, "width": 16, "num_heads": 2, "mlp_dim": 16, "scan": False, "patch_size": 4})
    config.optimizer.learning_rate = 0.01
    config.batch_size, config.total_steps, config.checkpoint_every_steps = 8, 20, 20
    config.writers.progress = "off"
    config.data.name, config.data.folder, config.data.data_dir = (
        "image_folder",
        str(folder),
        str(folder.parent / "data"),
    )
    config.data.image_size, config.data.num_threads = 8, 1
    config.data.mean = config.data.std = (0.5, 0.5, 0.5)
    return config


def test_a_run_learns_the_classes_and_goes_on_without_the_folder(tmp_path, capsys):
    folder, run = tmp_path / "own", str(tmp_path / "run")
    colored(folder, "train", 8, 0)
    colored(folder, "test", 4, 1)
    config = tiny("image_classification", folder)
    assert train_and_evaluate(config, run)["eval/test/accuracy"] == 1
    assert "2 classes; pictures: test 8, train 16; left out: nothing" in capsys.readouterr().err
    assert "train 16" in json.loads((tmp_path / "run/data.json").read_text())["summary"]
    # The same pictures elsewhere are the same data set; another picture is another.
    shutil.move(folder, tmp_path / "moved")
    config.data.folder = str(tmp_path / "moved")
    moved = tasks.get(config.task).open_data(validate(config)).files()["data.json"]
    stored = (tmp_path / "run/data.json").read_bytes()
    assert json.loads(moved)["fingerprint"] == json.loads(stored)["fingerprint"]
    shutil.copy(tmp_path / "moved/train/red/0.png", tmp_path / "moved/train/red/1.png")
    with pytest.raises(BadInput, match=r"data\.json"):
        train_and_evaluate(config, run)

    colored(tmp_path / "others", "test", 3, 2)
    shutil.rmtree(tmp_path / "moved")
    shutil.rmtree(tmp_path / "data")
    paths = sorted((tmp_path / "others").rglob("*.png"))
    assert [each.label for each in open_run(run).classify(paths)] == ["green"] * 3 + ["red"] * 3
    there = {"folder": str(tmp_path / "others"), "data_dir": str(tmp_path / "data")}
    assert evaluate(None, run, data=there)["eval/test/accuracy"] == 1


def test_self_supervision_reads_the_same_pictures(tmp_path):
    folder = tmp_path / "own"
    colored(folder, "train", 8, 0)
    colored(folder, "test", 4, 1)
    config = validate(tiny("contrastive", folder))
    data = tasks.get("contrastive").open_data(config)
    batch = next(data.train_stream(start=3, process_index=0, process_count=1))
    again = next(tasks.get("contrastive").open_data(config).train_stream(start=3, process_index=0, process_count=1))
    assert batch["views"].shape == (8, 2, 8, 8, 3)
    np.testing.assert_array_equal(batch["views"], again["views"])
    labels = [each["label"] for each in data.evaluation_batches("test", 0, 1) if "views" in each]
    assert sorted(np.concatenate(labels)) == [0] * 4 + [1] * 4
