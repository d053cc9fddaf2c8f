"""A few metrics out of long lines: the same rows as those of JSON."""

import json

import pytest

from sigmarep.diagnostics.files import MetricsFile

PLAIN = {"step": 1, "train/loss": 0.5, "other/a": 1e-7, "eval/x": -3.0, "other/b": 12345678901234567890}


def wanted(name):
    return name.startswith(("train/", "eval/"))


def written(*rows):
    return b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows)


@pytest.mark.parametrize(
    "line",
    [
        PLAIN | {"step": 2, "train/loss": 1e300, "eval/x": 7},
        PLAIN | {"train/loss": "nan"},
        PLAIN | {"other/a": "inf"},
        {"step": 2, "eval/x": 4.0, "other/a": 1.0, "train/loss": 0.1, "other/b": 2.0},
        {"step": 2, 'x, "train/loss': 9.0, "train/loss": 1.0},
        {"step": 2, 'x"train/loss': 9.0, "other/a": 1.0},
        {"step": 2.5, "train/loss": 0.5, "other/a": 1.0, "eval/x": 1.0, "other/b": 2.0},
        {"step": 2, "train/los1": 0.5, "other/a": 1.0, "eval/y": 1.0, "other/b": 2.0},
        b'{"step": 2, "train/loss": 0.5.1, "other/a": 1.0, "eval/x": 1.0, "other/b": 2.0}\n',
        b'{"step": 2, "train/loss": 0.5, "other/a": 1.0, "ev{"step": 3, "train/loss": 0.5}\n',
        b'{"step":2,"train/loss":0.25,"other/a":1.0,"eval/x":1.0,"other/b":2.0}\n',
        b'{"step": 2, "train/loss": 1.0, "train/loss": 2.0}\n',
    ],
)
def test_rows_are_those_of_json(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(written(PLAIN, PLAIN | {"step": 5}, line, line, PLAIN))
    skimmed, whole = MetricsFile(str(path), wanted), MetricsFile(str(path))
    assert skimmed.update()
    assert whole.update()
    assert repr(list(skimmed.rows)) == repr(list(whole.rows.only(wanted)))
    assert skimmed.damage == whole.damage


def test_lines_like_an_earlier_one_are_not_read_as_json(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(written(*(PLAIN | {"step": step} for step in range(5))))
    parsed = []
    monkeypatch.setattr(
        "sigmarep.diagnostics.files.parse", lambda line: (parsed.append(line), (json.loads(line), True))[1]
    )
    metrics = MetricsFile(str(path), wanted)
    metrics.update()
    assert len(metrics.rows) == 5
    assert len(parsed) == 1
