"""Every module with the versions installed; scripts/check_versions.py, which installs the oldest and the newest."""

import importlib.util
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import sigmarep

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "check_versions.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("check_versions", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments], capture_output=True, text=True, env={**os.environ, **environment}
    )


@pytest.mark.parametrize("name", [each.name for each in pkgutil.walk_packages(sigmarep.__path__, "sigmarep.")])
def test_every_module_can_be_imported(name):
    importlib.import_module(name)


def test_the_oldest_versions_are_the_lower_bounds_of_requirements_and_extras(script):
    pyproject = """
[project]
name = "My_Package"
dependencies = ["jax>=0.10.2", "ml_collections>=1.1,<3"]
[project.optional-dependencies]
text = ["SacreBLEU[ja]>=2.4 ; python_version >= '3.8'"]
all = ["my-package[text]"]
"""
    assert script.lower_bounds(pyproject) == ["jax==0.10.2", "ml-collections==1.1", "sacrebleu==2.4"]


def test_a_requirement_without_a_lower_bound_is_named(script):
    with pytest.raises(ValueError, match="'numpy<3' has no lower bound"):
        script.lower_bounds('[project]\nname = "a"\ndependencies = ["numpy<3"]\n')


def test_every_requirement_of_this_project_has_a_lower_bound(script):
    constraints = script.lower_bounds((ROOT / "pyproject.toml").read_text())
    assert {"jax", "numpy", "sacrebleu", "wandb"} <= {each.split("==")[0] for each in constraints}


def test_interpreters_that_are_not_there_are_named_and_skipped(tmp_path):
    # The shim of a version manager is on PATH and fails.
    shim = tmp_path / "python3.13"
    shim.write_text("#!/bin/sh\nexit 127\n")
    shim.chmod(0o755)
    done = run(PATH=str(tmp_path), PYENV_ROOT=str(tmp_path / "pyenv"))
    assert done.returncode == 0, done.stderr
    assert "oldest, python3.11: SKIPPED" in done.stdout
    assert "newest, python3.13: SKIPPED" in done.stdout


def test_interpreters_of_pyenv_are_taken_where_path_has_none(script, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    for version in ("3.13.0", "3.13.1"):
        folder = tmp_path / "versions" / version / "bin"
        folder.mkdir(parents=True)
        (folder / "python3.13").symlink_to(sys.executable)
    assert script.interpreter("python3.13") == str(tmp_path / "versions" / "3.13.1" / "bin" / "python3.13")
    assert script.interpreter("python3.11") is None


def test_an_interpreter_that_was_asked_for_must_run():
    done = run("--only", "newest", "--newest", "/nowhere/python")
    assert done.returncode == 2
    assert "--newest /nowhere/python: expected a command that starts Python" in done.stderr


def test_it_counts_what_pytest_reports(script, tmp_path):
    source = (
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 0\ndef test_c(): pytest.skip()\ndef test_d(): pass\n"
    )
    (tmp_path / "test_it.py").write_text(source)
    subprocess.run([sys.executable, "-m", "pytest", "--junitxml=report.xml", "-c", os.devnull, "."], cwd=tmp_path)
    assert script.count((tmp_path / "report.xml").read_text()) == "2 passed, 1 failed, 1 skipped"


def test_every_slow_test_exists():
    for line in (ROOT / "tests" / "slow.txt").read_text(encoding="utf-8").split():
        path, _, name = line.partition("::")
        assert f"def {name.rpartition('::')[2]}(" in (ROOT / path).read_text(encoding="utf-8"), line
