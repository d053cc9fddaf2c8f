"""A run's config.json as the configuration file of another run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def describe(path, *overrides):
    command = [sys.executable, "scripts/train.py", "--config", str(path), *overrides, "--describe"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120)
    lines = [line for line in done.stdout.splitlines() if not line.startswith(" ")]
    return done.returncode, dict(line.split(" = ", 1) for line in lines if " = " in line), done.stderr.splitlines()


@pytest.fixture
def stored(tmp_path):
    """The file of a run whose folder has a name as those of sweeps have."""
    from sigmarep.training.config import default_config

    config = default_config("image_classification")
    config.model.norm, config.optimizer.learning_rate, config.seed = "post", 0.0125, 7
    folder = tmp_path / "arm=a,rate=0.1:x"
    folder.mkdir()
    (folder / "config.json").write_text(config.to_json())
    return folder / "config.json"


def test_it_is_the_configuration_of_the_run_with_what_the_command_changes(stored):
    status, fields, _ = describe(stored, "--config.model.reparam=sigma", "--config.seed=8")
    assert status == 0
    assert fields["model.norm"] == "'post'"
    assert fields["optimizer.learning_rate"] == "0.0125"
    assert (fields["model.reparam"], fields["seed"]) == ("'sigma'", "8")


def test_what_is_no_configuration_of_a_run_is_refused_in_one_line(stored, tmp_path):
    status, _, err = describe(tmp_path / "other.json")
    assert status == 2
    expected = "expected a configuration file of Python, or the config.json of a run"
    assert err == [f"train.py: --config {tmp_path / 'other.json'}: {expected}"]
    stored.write_text(json.dumps({"task": "os.path"}))
    (stored.parent / "os.py").write_text("raise SystemExit('a stranger ran')")
    status, _, err = describe(stored)
    assert status == 2
    assert len(err) == 1
    assert "a stranger ran" not in err[0]
