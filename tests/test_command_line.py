"""The command `sigmarep`, and names of configurations in place of paths."""

import subprocess
import sys
from pathlib import Path

import pytest

from sigmarep import __main__ as entry
from sigmarep import recipes

ROOT = Path(__file__).parents[1]


def sigmarep(*arguments, cwd):
    done = subprocess.run(
        [sys.executable, "-m", "sigmarep", *arguments],
        cwd=cwd,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, done.stderr


def test_it_lists_its_commands_and_refuses_others(tmp_path):
    status, out, _ = sigmarep(cwd=tmp_path)
    assert status == 0
    for name in entry.COMMANDS:
        if (ROOT / "scripts" / f"{name}.py").exists():
            assert f"\n  {name} " in out
    status, _, err = sigmarep("trian", cwd=tmp_path)
    assert status == 2
    assert len(err.splitlines()) == 1
    assert "'trian': expected one of train, evaluate" in err


def test_a_command_takes_the_flags_and_has_the_status_of_its_script(tmp_path):
    status, out, err = sigmarep("train", "--config", "quickstart:", "--describe", cwd=tmp_path)
    assert status == 0, err
    assert out.startswith("task = 'image_classification'")
    status, _, err = sigmarep("train", "--config", "quikstart", "--workdir", "run", cwd=tmp_path)
    assert status == 2
    assert err.strip().endswith(
        "--config quikstart: there is no such file; configurations of the package: quickstart, "
        "mt/quickstart, lm/quickstart, …"
    )


@pytest.mark.parametrize("given", ["vit/cifar10", "configs/vit/cifar10.py", "vit/cifar10.py"])
def test_a_configuration_is_named_where_there_is_no_checkout(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = str(ROOT / "configs" / "vit" / "cifar10.py")
    for flags in (["--config", f"{given}:reparam=none"], [f"--config={given}:reparam=none"]):
        (value,) = recipes.with_paths(flags)[-1:]
        assert value.removeprefix("--config=") == f"{path}:reparam=none"
    # A file of one's own goes before.
    own = tmp_path / given
    own.parent.mkdir(parents=True)
    own.write_text("")
    assert recipes.with_paths(["--config", given]) == ["--config", given]


def test_the_version_is_that_of_the_project():
    import sigmarep as package

    assert f'__version__ = "{package.__version__}"' in (ROOT / "sigmarep" / "__init__.py").read_text()
    assert f"version: {package.__version__}" in (ROOT / "CITATION.cff").read_text()
