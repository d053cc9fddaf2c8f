"""A sweep packed into one file and unpacked elsewhere."""

import json
import lzma
import re

import pytest

from sigmarep import sweep_archive, sweeps
from sigmarep.errors import BadInput
from sigmarep.sweep_execution import note, read_record
from sigmarep.training.metrics import JsonLines


def made(folder, name, *, state="done", rows=({"step": 1, "train/loss": 2.0, "train/gradient_norm": 1.0},)):
    run = folder / name
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"seed": 0}))
    writer = JsonLines(str(run))
    for row in rows:
        writer.write(row["step"], {name: value for name, value in row.items() if name != "step"})
    writer.close()
    note(str(folder), name, {"point": {"arm": name}, "state": state, "status": 0, "seconds": 1.0})


def test_an_unpacked_sweep_has_the_outcomes_of_the_packed_one(tmp_path):
    made(tmp_path / "a", "one", rows=[{"step": 1, "train/loss": 2.0}, {"step": 2, "eval/test/loss": 0.1 + 0.2}])
    made(tmp_path / "a", "two", state="diverged", rows=[{"step": 1, "train/loss": float("nan")}])
    made(tmp_path / "a", "high", rows=[{"step": 1, "eval/test/loss": 1e6, "eval/test/perplexity": float("inf")}])
    made(tmp_path / "a", "lost", state="failed")
    path = str(tmp_path / "sweep.jsonl.xz")
    assert sweep_archive.pack(str(tmp_path / "a"), path) == 3
    assert sweep_archive.unpack(path, str(tmp_path / "b")) == (3, 0)
    assert not {"Infinity", "NaN"} & set(
        re.findall(r"\w+", lzma.decompress((tmp_path / "sweep.jsonl.xz").read_bytes()).decode())
    )
    before, after = (sweeps.finished_runs(str(tmp_path / folder)) for folder in "ab")
    # As text: NaN equals nothing, and a float's text is the float.
    assert repr(dict(sorted(after.items()))) == repr(dict(sorted(before.items())))
    assert json.loads((tmp_path / "b/one/config.json").read_text()) == {"seed": 0}


def test_an_archive_with_infinities_that_json_does_not_have_is_unpacked(tmp_path):
    path = tmp_path / "sweep.jsonl.xz"
    entry = {"point": {"arm": "one"}, "state": "done", "status": 0, "seconds": 1.0}
    rows = [{"step": 1, "eval/test/loss": 1e6, "eval/test/perplexity": float("inf")}]
    path.write_bytes(lzma.compress(json.dumps({"name": "one", "entry": entry, "files": {}, "rows": rows}).encode()))
    sweep_archive.unpack(str(path), str(tmp_path / "b"))
    assert sweeps.finished_runs(str(tmp_path / "b"))["one"].rows == rows


def test_only_metrics_that_are_asked_for_are_kept(tmp_path):
    made(tmp_path / "a", "one")
    sweep_archive.pack(str(tmp_path / "a"), str(tmp_path / "few"))
    sweep_archive.pack(str(tmp_path / "a"), str(tmp_path / "more"), (*sweep_archive.METRICS, "train/gradient"))
    for name, keys in (("few", {"step", "train/loss"}), ("more", {"step", "train/loss", "train/gradient_norm"})):
        sweep_archive.unpack(str(tmp_path / name), str(tmp_path / f"{name}_runs"))
        (row,) = sweeps.finished_runs(str(tmp_path / f"{name}_runs"))["one"].rows
        assert set(row) == keys


def test_runs_that_are_there_stay_as_they_are(tmp_path):
    made(tmp_path / "a", "one")
    made(tmp_path / "a", "two")
    path = str(tmp_path / "sweep.jsonl.xz")
    sweep_archive.pack(str(tmp_path / "a"), path)
    made(tmp_path / "b", "two", rows=[{"step": 9, "train/loss": 9.0}])
    assert sweep_archive.unpack(path, str(tmp_path / "b")) == (1, 1)
    assert sweeps.finished_runs(str(tmp_path / "b"))["two"].rows == [{"step": 9, "train/loss": 9.0}]
    assert set(read_record(str(tmp_path / "b"))) == {"one", "two"}


def test_a_packed_sweep_is_not_overwritten_and_an_empty_one_not_packed(tmp_path):
    made(tmp_path / "a", "one")
    path = tmp_path / "sweep.jsonl.xz"
    path.write_bytes(b"mine")
    with pytest.raises(BadInput, match="cannot be written"):
        sweep_archive.pack(str(tmp_path / "a"), str(path))
    assert path.read_bytes() == b"mine"
    with pytest.raises(BadInput, match="no finished run"):
        sweep_archive.pack(str(tmp_path / "none"), str(tmp_path / "new"))


@pytest.mark.parametrize("name", ["../out", "/tmp/out", "..", ""])
def test_an_archive_writes_nothing_outside_the_folder(tmp_path, name):
    run = {"name": name, "entry": {"state": "done", "point": {}}, "files": {}, "rows": []}
    path = tmp_path / "stranger"
    path.write_bytes(lzma.compress(json.dumps(run).encode()))
    with pytest.raises(BadInput, match="is no archive of a sweep"):
        sweep_archive.unpack(str(path), str(tmp_path / "sweep"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content", [b"text", lzma.compress(b"[1]\n"), lzma.compress(b'{"name": "a"}\n'), lzma.compress(b"{}")[:-9]]
)
def test_what_is_no_archive_is_refused(tmp_path, content):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(BadInput, match="is no archive of a sweep"):
        sweep_archive.unpack(str(path), str(tmp_path / "sweep"))
    assert not (tmp_path / "sweep").exists()
