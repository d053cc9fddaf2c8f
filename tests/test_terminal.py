"""Text that the terminal's encoding lacks is written as escapes."""

import io
import sys

from sigmarep import terminal
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
