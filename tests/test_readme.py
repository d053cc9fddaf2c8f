"""The README's examples run as printed."""

import re
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("one_device")

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_layer_example_runs():
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "SigmaDense" in block]
    names: dict = {}
    exec(code, names)
    assert set(names["plain"]) == {"kernel", "bias"}


def test_the_example_of_a_model_of_others_runs():
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "reparametrize" in block]
    names: dict = {}
    exec(code, names)
    before = names["theirs"].apply(names["trained"], names["x"])
    np.testing.assert_allclose(names["y"], before, rtol=1e-5, atol=1e-5)
    assert "layers_1/query/kernel" in names["model"].table()


def test_the_notebook_example_runs(tmp_path, monkeypatch):
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "notebook" in block]
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code.replace("total_steps = 100", "total_steps = 2"), names)
    assert 0 <= names["result"]["eval/test/accuracy"] <= 1


def test_every_file_and_script_it_names_exists():
    for path in set(re.findall(r"(?:configs|scripts|tests)/[\w/]+\.py", README)):
        assert (ROOT / path).exists(), path


def test_its_first_screen_has_exactly_two_commands():
    first = README.split("\n## ")[0]
    assert len(re.findall(r"```bash", first)) == 2
