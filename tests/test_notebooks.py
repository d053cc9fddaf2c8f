"""The notebooks of docs/notebooks: they run to the end, and are stored with what they show."""

import importlib.util
import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("one_device")

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def runner():
    spec = importlib.util.spec_from_file_location("run_notebooks", FOLDER / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def execute(name, tmp_path):
    """The notebook with its outputs, and the names that it defines."""
    return runner().run(str(FOLDER / name), str(tmp_path))


def test_a_loop_of_ones_own_keeps_its_attention_and_its_function_when_folded(tmp_path):
    notebook, names = execute("your_own_loop.ipynb", tmp_path)
    assert names["accuracy"](names["model"], names["variables"]) > 0.7
    assert float(names["difference"]) < 1e-4
    plain, sigma = (
        names["read_metrics"](f"{tmp_path}/runs/{name}/metrics.jsonl")[-1]["attention/entropy_min"]
        for name in ("plain", "sigma")
    )
    assert plain < sigma
    assert "nothing to say" in str(notebook["cells"])


def test_the_plain_run_collapses_and_its_cure_does_not(tmp_path):
    _, names = execute("collapse_and_cure.ipynb", tmp_path)
    lowest = {
        name: min(values[-1] for values in names["entropies"](f"{tmp_path}/runs/{name}").values())
        for name in ("pre_ln", "sigma")
    }
    assert lowest["pre_ln"] < 0.5 < 1 < lowest["sigma"]
    assert names["cured"]["eval/test/accuracy"] > names["collapsed"]["eval/test/accuracy"]


def test_values_text_and_figures_of_cells_are_stored(tmp_path):
    cells = ["import matplotlib.pyplot as plt\nx = 2\nprint('a')\nx + 1", "plt.plot([1, 2]);", "x"]
    path = tmp_path / "small.ipynb"
    path.write_text(json.dumps({"cells": [{"cell_type": "code", "source": text} for text in cells]}))
    notebook, names = runner().run(str(path), str(tmp_path))
    first, second, third = (cell["outputs"] for cell in notebook["cells"])
    assert [each.get("text") or each["data"]["text/plain"] for each in first] == [["a\n"], ["3"]]
    assert [list(each["data"]) for each in second] == [["image/png"]]
    assert third[0]["data"]["text/plain"] == ["2"]
    assert names["x"] == 2


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_stored_notebook_is_small_and_has_been_run_from_the_top(path):
    assert path.stat().st_size < 200_000
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert cells[-1]["outputs"]
