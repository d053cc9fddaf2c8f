"""The README and the pages of docs/: their examples run as printed, what they name exists, and the site builds."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("one_device")

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# A word behind ```python: `no-run` is shown only, since it names files of a reader's; `notebook` trains.
BLOCK = re.compile(r"^```python *([\w-]*)\n(.*?)^```", re.S | re.M)
BLOCKS = [
    pytest.param(code, id=f"{path.name}-{number}")
    for path in PAGES
    for number, (word, code) in enumerate(BLOCK.findall(path.read_text()))
    if not word
]


@pytest.mark.parametrize("code", BLOCKS)
def test_an_example_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code, names)
    if "plain" in names:
        assert len(names["plain"]) == 2
        assert float(names["value"]) < 0.5
    if "theirs" in names:
        before = names["theirs"].apply(names["trained"], names["x"])
        np.testing.assert_allclose(names["y"], before, rtol=1e-5, atol=1e-5)
        assert "layers_1/query/kernel" in names["model"].table()
    if "row" in names:
        assert "attention/entropy/layers_0" in names["row"]
        assert "spectral/norm/layers_1" in names["row"]


def test_the_notebook_example_runs(tmp_path, monkeypatch):
    (code,) = [code for word, code in BLOCK.findall(README) if word == "notebook"]
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code.replace("total_steps = 100", "total_steps = 2"), names)
    assert 0 <= names["result"]["eval/test/accuracy"] <= 1


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_file_and_script_that_a_page_names_exists(page):
    text = page.read_text()
    named = set(re.findall(r"(?:configs|scripts|tests|examples)/[\w/]+\.py", text)) - set(
        re.findall(r"my_\w+/[\w/]+\.py", text)
    )
    for path in named:
        assert (ROOT / path).exists(), path
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / link).exists(), link


def test_its_first_screen_has_exactly_two_commands_and_it_is_short():
    first = README.split("\n## ")[0]
    assert len(re.findall(r"```bash", first)) == 2
    assert len(README.splitlines()) <= 200


def test_the_site_builds_without_warnings(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "docs", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for page in PAGES[1:]:
        assert (tmp_path / f"{page.stem}.html").exists()
    # Any page is one click away from the first, whose bar at the side has them all.
    first = (tmp_path / "index.html").read_text()
    names = {path.relative_to(ROOT / "docs").with_suffix(".html").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert not [name for name in names - {"index.html"} if f'href="{name}"' not in first]
