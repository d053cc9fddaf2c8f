"""Output off a terminal: text that the encoding lacks is written as escapes, and the first line comes soon."""

import io
import sys

import pytest

from sigmarep import terminal
from sigmarep.errors import BadInput
from sigmarep.training import train_and_evaluate
from sigmarep.training.config import default_config
from sigmarep.training.progress import Progress


def test_a_line_of_a_run_survives_a_terminal_of_ascii(monkeypatch):
    written = io.BytesIO()
    stream = io.TextIOWrapper(written, encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    Progress(10, mode="plain").message("schön \u2192 good")
    stream.flush()
    assert written.getvalue() == b"sch\\xf6n \\u2192 good\n"


def test_other_streams_are_left_alone(monkeypatch):
    whole = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="replace")
    monkeypatch.setattr(sys, "stdout", whole)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    terminal.escape_unencodable()
    assert whole.errors == "replace"


def test_a_run_says_something_before_its_data_are_open(tmp_path, capsys):
    config = default_config("image_classification")
    config.data.name = "no_such_set"
    for mode, expected in (("auto", f"image_classification in {tmp_path}: opens "), ("off", "")):
        config.writers.progress = mode
        with pytest.raises(BadInput, match="there is no such data set"):
            train_and_evaluate(config, str(tmp_path))
        assert capsys.readouterr().out.partition("the data")[0] == expected
