"""scripts/theory.py: the tables of Theorem 3.1 and Proposition 3.2 are what the formulas say."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "theory.py"
# Lower bounds to six digits, from an independent computation: T, then s = 0, 1, 5, 10.
BOUNDS = {
    2: (0.693147, 0.494200, 0.006850, 0.000011),
    8: (2.079442, 1.979691, 0.205592, 0.001862),
    64: (4.158883, 4.143699, 1.802616, 0.029206),
    197: (5.283204, 5.278175, 3.671609, 0.094856),
}


def run(*arguments):
    found = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=300)
    rows = [line.strip("| ").split(" | ") for line in found.stdout.splitlines() if line.startswith("| ")]
    return found, rows[1:]


def test_the_bound_is_attained_and_no_random_input_is_below_it(tmp_path):
    found, rows = run("--draws=5", f"--plot={tmp_path / 'bound.png'}")
    assert found.returncode == 0, found.stderr
    numbers = {(int(row[0]), float(row[1])): [float(x) for x in row[2:]] for row in rows}
    for tokens, bounds in BOUNDS.items():
        for sigma, bound in zip((0.0, 1.0, 5.0, 10.0), bounds, strict=True):
            assert numbers[tokens, sigma][:2] == pytest.approx([bound, bound], abs=2e-6)
    assert all(lowest >= bound - 1e-5 for bound, _, lowest in numbers.values())
    assert "140 random inputs, 0 rows of the table below the bound" in found.stdout
    assert (tmp_path / "bound.png").read_bytes().startswith(b"\x89PNG")


def test_updates_of_adam_grow_with_the_width_and_muons_do_not():
    spec = importlib.util.spec_from_file_location("theory", SCRIPT)
    theory = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theory)
    small, large = (theory.update_norms(width, 1.0) for width in (32, 128))
    for norms in (small, large):
        assert norms["ideal Adam"] >= norms["bound"]
        assert norms["Adam"] == pytest.approx(norms["ideal Adam"], rel=0.1)
    assert large["Adam"] / small["Adam"] == pytest.approx(4.0, rel=0.1)
    assert large["bound"] / small["bound"] == pytest.approx(2.0, rel=0.1)
    assert np.isclose(large["Muon"], small["Muon"], rtol=0.3)


def test_a_plot_that_cannot_be_written_is_refused_in_one_line(tmp_path):
    found, _ = run("--draws=1", f"--plot={tmp_path}/missing/bound.png")
    assert found.returncode == 2
    assert len(found.stderr.splitlines()) == 1
    assert "missing/bound.png: cannot be written" in found.stderr
