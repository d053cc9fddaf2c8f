"""The guide docs/switching_on.md: its sweep changes one thing at a time, its table's cells, and its adapters."""

import functools
import importlib.util
import inspect
import json
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest

from sigmarep.configuration import flatten
from sigmarep.nn import TransformerConfig, TransformerStack, fold
from sigmarep.nn.layers import describe
from sigmarep.training.config import validate

ROOT = Path(__file__).parents[1]


def load(path):
    spec = importlib.util.spec_from_file_location(path.rpartition("/")[2].removesuffix(".py"), ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def sweep():
    return load("configs/guide/what_to_change.py")


@pytest.fixture(scope="module")
def adapters():
    return load("examples/lora.py")


def test_a_change_is_its_fields_alone(sweep):
    weights = {"keep_checkpoints"}
    for change, (_, fields) in sweep.CHANGES.items():
        base = flatten(validate(sweep.get_config("change=lm_blocks" if change.startswith("lm_") else "")))
        changed = flatten(validate(sweep.get_config(f"change={change}")))
        different = {name for name in base if base[name] != changed[name]} - weights
        assert different == set(fields), change


def test_every_change_answers_a_question_and_the_page_asks_all(sweep):
    asked = {change for rows in sweep.QUESTIONS.values() for change, _ in rows}
    assert asked == set(sweep.CHANGES)
    assert len(sweep.sweep()) == 3 * len({row for rows in sweep.QUESTIONS.values() for row in rows})


# In a process of its own: the script defines flags.
OF_THE_SCRIPT = """
import json, runpy, sys
from sigmarep.sweeps import Outcome

script = runpy.run_path("scripts/what_to_change.py")

def run(accuracy, loss, entropies, state="done"):
    last = {f"attention/entropy/{i}": value for i, value in enumerate(entropies)}
    return Outcome({}, state, [{"train/loss": 1.0, **last}, {"eval/test/accuracy": accuracy, "eval/test/loss": loss}])

runs = [run(0.5, 1.25, [2.0, 1.5]), run(0.75, 1.0, [0.5, 1.0]), run(0.9, 0.1, [1.0], "diverged")]
tables = {"x": ["| 1 |", "| 2 |"]}
once = script["with_tables"](sys.argv[1], tables)
print(json.dumps([script["cells"](runs), script["cells"](runs[2:]), once, script["with_tables"](once, tables)]))
"""


def test_rows_have_lowest_and_highest_and_tables_replace_those_between_their_marks(sweep):
    text = "a\n<!-- table: x -->\n\n| old |\n\n<!-- end -->\nb\n<!-- table: y -->\n<!-- end -->\n"
    done = subprocess.run(
        [sys.executable, "-c", OF_THE_SCRIPT, text], cwd=ROOT, capture_output=True, text=True, check=True
    )
    cells, diverged, once, twice = json.loads(done.stdout)
    assert cells == ["50.0% to 75.0%, 1 diverged", "1.000 to 1.250", "0.50 to 1.50"]
    assert diverged == ["1 diverged", "", ""]
    assert once == twice == text.replace("| old |", "| 1 |\n| 2 |")
    page = (ROOT / "docs" / "switching_on.md").read_text()
    assert all(f"<!-- table: {question} -->" in page for question in sweep.QUESTIONS)
    assert all(f"| {words} |" in page for words, _ in sweep.CHANGES.values())


def test_the_page_prints_the_examples_adapters(adapters):
    page = (ROOT / "docs" / "switching_on.md").read_text()
    for function in (adapters.adapters, adapters.adapted):
        assert inspect.getsource(function) in page


@pytest.fixture(scope="module")
def stack(adapters):
    """A σReparam stack of scanned blocks with its variables, the layers that are adapted, and pairs of rank 2."""
    model = TransformerStack(TransformerConfig(depth=2, width=8, num_heads=2, mlp_dim=16, reparam="sigma"))
    x = jax.random.normal(jax.random.key(0), (2, 5, 8))
    variables = model.init(jax.random.key(1), x)
    layers = describe(model.init, jax.random.key(0), x)
    pairs = adapters.adapters(variables["params"], layers, 2, jax.random.key(2))
    return model, x, variables, layers, pairs


def test_adapters_begin_as_the_model_that_they_adapt(adapters, stack):
    _, _, variables, layers, pairs = stack
    assert set(pairs) == set(layers)
    jax.tree.map(
        np.testing.assert_array_equal, adapters.adapted(variables["params"], layers, pairs), variables["params"]
    )


def test_adapters_inside_sigma_keep_every_norm_and_over_folded_kernels_do_not(adapters, stack):
    _, _, variables, layers, pairs = stack
    moved = {path: (a, b + 1.0) for path, (a, b) in pairs.items()}
    before = fold(variables)
    inside = {"params": adapters.adapted(variables["params"], layers, moved), "spectral": variables["spectral"]}
    for _ in range(30):  # the vectors follow the adapted kernels, as in as many training steps
        inside = {**inside, "spectral": stepped(stack[0], inside, stack[1])}
    assert adapters.growth(before, fold(inside), layers) == pytest.approx(1, abs=0.01)
    assert adapters.growth(before, adapters.adapted(before, layers, moved), layers) > 1.5


@functools.partial(jax.jit, static_argnums=0)
def stepped(model: nn.Module, variables, x):
    return model.apply(variables, x, mutable=["spectral"])[1]["spectral"]
