"""Runs the fast tests on Python 3.11 with the oldest versions that pyproject.toml admits, and on 3.13 with the newest.

    python scripts/check_versions.py
    python scripts/check_versions.py --only oldest -- -n 2 --dist loadfile tests/core

Each of the two gets a virtual environment of its own in a temporary folder, with the extra `dev`, and runs
`pytest -m "not slow"` with the arguments behind `--`. Oldest are the lower bounds of all direct requirements together, so
bounds that exclude one another count as a failure. An interpreter is looked for on PATH and in pyenv's folder; one
that is in neither is named and skipped. Needs the package `packaging` and nothing else. Exit status: 0 unless an
environment failed, then 1; 2 for an interpreter that was asked for and does not run.
"""

import argparse
import itertools
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).resolve().parents[1]
INTERPRETERS = {"oldest": "python3.11", "newest": "python3.13"}
# Direct requirements whose versions the summary names.
SHOWN = (
    "jax",
    "flax",
    "optax",
    "orbax-checkpoint",
    "tensorflow-datasets",
    "grain",
    "numpy",
    "scipy",
    "pillow",
    "pytest",
)
LIST_VERSIONS = f"""
import platform
from importlib.metadata import version
print("Python", platform.python_version() + ":", ", ".join(f"{{name}} {{version(name)}}" for name in {SHOWN}))
"""


def lower_bounds(pyproject: str) -> list[str]:
    """Constraints, one `name==version` for each package that a pyproject.toml requires directly or by an extra.

    Raises:
      ValueError: a requirement has no `>=`.
    """
    project = tomllib.loads(pyproject)["project"]
    own = canonicalize_name(project["name"])
    constraints = {}
    for text in itertools.chain(project["dependencies"], *project.get("optional-dependencies", {}).values()):
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        if name == own:
            continue
        lowest = [each.version for each in requirement.specifier if each.operator == ">="]
        if not lowest:
            raise ValueError(f"pyproject.toml: {text!r} has no lower bound")
        constraints[name] = f"{name}=={lowest[0]}"
    return sorted(constraints.values())


def runs(python: str) -> bool:
    """True for a command that starts a Python; a shim of a version manager may be on PATH and not start one."""
    if shutil.which(python) is None:
        return False
    return subprocess.run([python, "-c", ""], stderr=subprocess.DEVNULL).returncode == 0


def interpreter(name: str) -> str | None:
    """The command of an interpreter on PATH, else the newest of that name among pyenv's, else None."""
    versions = pathlib.Path(os.environ.get("PYENV_ROOT") or pathlib.Path.home() / ".pyenv") / "versions"
    others = sorted(map(str, versions.glob(f"{name.removeprefix('python')}*/bin/{name}")), reverse=True)
    return next((python for python in (name, *others) if runs(python)), None)


def check(age: str, python: str, arguments: Sequence[str]) -> tuple[bool, str]:
    """Installs and tests in a new environment of the interpreter; returns success and the summary."""
    start = time.monotonic()
    # The tests see what is installed there and nothing else.
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    with tempfile.TemporaryDirectory(prefix=f"sigmarep-{age}-") as folder:
        venv, report = os.path.join(folder, "venv"), os.path.join(folder, "report.xml")
        constraints, log = os.path.join(folder, "constraints.txt"), os.path.join(folder, "pip.log")
        installed = os.path.join(venv, "bin", "python")
        install = [installed, "-m", "pip", "install", "--no-compile", "-e", f"{ROOT}[dev]"]
        if age == "oldest":
            pathlib.Path(constraints).write_text("\n".join(lower_bounds((ROOT / "pyproject.toml").read_text())) + "\n")
            install += ["-c", constraints]
        for command in ([python, "-m", "venv", venv], install):
            with open(log, "w", encoding="utf-8") as output:
                status = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=environment).returncode
            if status:
                print(*pathlib.Path(log).read_text(encoding="utf-8").splitlines()[-20:], sep="\n", flush=True)
                return False, f"{age}, {python}: failed, {' '.join(command[1:4])} ended with status {status}"
        versions = subprocess.run(
            [installed, "-c", LIST_VERSIONS], env=environment, capture_output=True, text=True, check=True
        ).stdout.strip()
        print(f"{age}, {versions}; installed in {time.monotonic() - start:.0f} s", flush=True)
        tests = [installed, "-m", "pytest", "-m", "not slow", f"--junitxml={report}", *arguments]
        status = subprocess.run(tests, env=environment, cwd=ROOT).returncode
        # Python that is ended by a library, as XLA does at an unknown flag, leaves no report.
        counts = count(pathlib.Path(report).read_text(encoding="utf-8")) if os.path.exists(report) else "no report"
    outcome = "passed" if status == 0 else f"failed, pytest ended with status {status}"
    return status == 0, f"{age}, {versions}: {outcome} ({counts}; {time.monotonic() - start:.0f} s)"


def count(junit: str) -> str:
    """The numbers of tests in a JUnit report, in words."""
    suites = list(ElementTree.fromstring(junit).iter("testsuite"))
    total, bad, skipped = (
        sum(int(suite.get(name, 0)) for suite in suites for name in names)
        for names in (("tests",), ("failures", "errors"), ("skipped",))
    )
    return f"{total - bad - skipped} passed, {bad} failed, {skipped} skipped"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for age, name in INTERPRETERS.items():
        parser.add_argument(
            f"--{age}", metavar="PYTHON", help=f"Interpreter for the {age} versions, by default {name}."
        )
    parser.add_argument("--only", choices=list(INTERPRETERS), help="Check these versions and not the others.")
    parser.add_argument("pytest", nargs="*", help="Arguments of pytest, behind --.")
    flags = parser.parse_args()
    summaries, successes = [], []
    for age, name in INTERPRETERS.items():
        if flags.only not in (None, age):
            continue
        asked = getattr(flags, age)
        if asked and not runs(asked):
            parser.error(f"--{age} {asked}: expected a command that starts Python")
        python = asked or interpreter(name)
        if python is None:
            summaries.append(
                f"{age}, {name}: SKIPPED, no such interpreter on PATH or in pyenv's folder; name one by --{age}"
            )
            print(summaries[-1], flush=True)
            continue
        success, summary = check(age, python, flags.pytest)
        successes.append(success)
        summaries.append(summary)
    print("\n" + "\n".join(summaries), flush=True)
    sys.exit(not all(successes))


if __name__ == "__main__":
    main()
