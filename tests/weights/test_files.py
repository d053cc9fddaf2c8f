"""Files of weights: read back as written, and refused in one line where they are damaged or would run code."""

import json
import pickle
import zipfile

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from sigmarep.errors import BadInput
from sigmarep.weights import files

ARRAYS = {
    "a/b": np.arange(6, dtype=np.float32).reshape(2, 3),
    "half": np.array([1.5, -2.25], ml_dtypes.bfloat16),
    "scalar": np.float32(3.0),
    "none": np.zeros((0, 4), np.float32),
    "numbers": np.array([2**40, -1]),
}


def same(read, written):
    assert sorted(read) == sorted(written)
    for name, x in written.items():
        assert read[name].dtype == np.asarray(x).dtype
        np.testing.assert_array_equal(read[name], x)


def test_safetensors_are_read_as_written(tmp_path):
    path = str(tmp_path / "w.safetensors")
    save_file({name: np.asarray(x) for name, x in ARRAYS.items()}, path, {"step": "7"})
    same(files.read(path), ARRAYS)
    with safe_open(path, "numpy") as file:
        assert file.metadata() == {"step": "7"}


def test_npz_are_read_as_written(tmp_path):
    path = tmp_path / "w.npz"
    np.savez(path, **ARRAYS)
    same(files.read(str(path)), ARRAYS)


def test_a_checkpoint_of_orbax(tmp_path):
    tree = {"params": {"in": {"kernel": ARRAYS["a/b"]}, "out": {"bias": np.arange(3, dtype=np.float32)}}}
    path = tmp_path / "checkpoint"
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
    same(files.read(str(path)), {"params/in/kernel": ARRAYS["a/b"], "params/out/bias": np.arange(3, dtype=np.float32)})


def test_a_folder_of_transformers_whole_and_in_shards(tmp_path):
    save_file({"a": ARRAYS["a/b"]}, tmp_path / "model.safetensors")
    same(files.read(str(tmp_path)), {"a": ARRAYS["a/b"]})
    save_file({"half": ARRAYS["half"]}, tmp_path / "model-2.safetensors")
    index = {"weight_map": {"a": "model.safetensors", "half": "../elsewhere/model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    same(files.read(str(tmp_path)), {"a": ARRAYS["a/b"], "half": ARRAYS["half"]})


class Trap:
    """Marks a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def archive_of(path, name, content):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, content)


def test_pickles_are_never_opened(tmp_path):
    mark = tmp_path / "mark"
    content = pickle.dumps(Trap(mark))
    (tmp_path / "old.pth").write_bytes(content)
    archive_of(tmp_path / "new.pt", "archive/data.pkl", content)
    np.savez(tmp_path / "objects.npz", a=np.array([Trap(mark)], object))
    for name, reason in (("old.pth", "is a pickle"), ("new.pt", "is a pickle"), ("objects.npz", "allow_pickle=False")):
        with pytest.raises(BadInput, match=reason) as raised:
            files.read(str(tmp_path / name))
        assert "\n" not in str(raised.value)
    assert not mark.exists()


def header(**entries):
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no safetensors file"),
        (b"\xff" * 8 + b"{}", "no safetensors file"),
        (b"\x02\0\0\0\0\0\0\0[]", "no safetensors file"),
        (header(a={"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}), "no safetensors file"),
        (header(a={"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}) + b"\0" * 8, "no safetensors file"),
        (header(a={"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}) + b"\0" * 8, "no safetensors file"),
        (header(a={"dtype": "pickle", "shape": [1], "data_offsets": [0, 4]}) + b"\0" * 8, "no safetensors file"),
        (header(a=3) + b"\0" * 8, "no safetensors file"),
    ],
)
def test_a_damaged_file_is_one_line(tmp_path, content, reason):
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=reason) as raised:
        files.read(str(path))
    assert str(raised.value).startswith(f"config.init_from.path = {str(path)!r}: ")


def test_nothing_there_and_a_folder_of_something_else(tmp_path):
    with pytest.raises(BadInput, match="there is no "):
        files.read(str(tmp_path / "none.npz"))
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(BadInput, match=r"expected a workdir, a checkpoint of Orbax, or a folder with .* has notes.txt"):
        files.read(str(tmp_path))


def test_the_digest_of_a_folder_is_of_names_and_contents(tmp_path):
    (tmp_path / "a").write_text("1")
    first = files.digest(str(tmp_path))
    (tmp_path / "a").rename(tmp_path / "b")
    second = files.digest(str(tmp_path))
    (tmp_path / "b").write_text("2")
    assert len({first, second, files.digest(str(tmp_path))}) == 3
