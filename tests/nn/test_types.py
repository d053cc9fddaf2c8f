"""The types of `sigmarep.nn` as a type checker of another project reads them."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_misspelled_word_is_the_only_complaint(tmp_path, monkeypatch):
    api = pytest.importorskip("mypy.api")
    # Installed packages are read for types only if they are beside the interpreter or on this path.
    monkeypatch.setenv("MYPYPATH", str(ROOT))
    snippet = tmp_path / "snippet.py"
    snippet.write_text(
        "from sigmarep.nn import SigmaDense\n"
        'good = SigmaDense(8, reparam="sigma")\n'
        'typo = SigmaDense(8, reparam="sgima")\n'
    )
    options = ["--config-file=", "--ignore-missing-imports", "--follow-imports=silent", f"--cache-dir={tmp_path}"]
    output, errors, status = api.run([*options, f"--python-executable={sys.executable}", str(snippet)])
    assert (status, errors) == (1, "")
    complaints = [line for line in output.splitlines() if ": error:" in line]
    assert len(complaints) == 1, output
    assert complaints[0].startswith(f"{snippet}:3:")
    assert "reparam" in complaints[0]
    assert "sgima" in complaints[0]
