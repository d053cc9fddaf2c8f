"""--help of every command: its own flags, and status 0."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = sorted(path for path in (Path(__file__).parents[1] / "scripts").glob("*.py"))
# A process for each command, forked from one that has imported what takes long.
FORKS = """
import io, json, os, re, runpy, sys
import numpy, absl.app, ml_collections.config_flags, jax, optax
outcomes = {}
for path in sys.argv[1:]:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(write, 1)
        sys.argv = [path, "-h" if path.endswith("theory.py") else "--help"]
        sys.path[0] = os.path.dirname(path)
        runpy.run_path(path, run_name="__main__")
        os._exit(9)
    os.close(write)
    with open(read, encoding="utf-8") as pipe:
        text = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    outcomes[os.path.basename(path)] = status, re.findall(r"^  --(?:\\[no\\])?([a-z_]+)", text, re.M)
print(json.dumps(outcomes))
"""


@pytest.fixture(scope="module")
def outcomes():
    """Exit status and flags that each command prints."""
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS[0].parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", FORKS, *map(str, SCRIPTS)], capture_output=True, text=True, env=environment, check=True
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", [path.name for path in SCRIPTS])
def test_help_shows_all_flags_of_the_command_and_ends_well(name, outcomes):
    status, shown = outcomes[name]
    assert status == 0
    source = (SCRIPTS[0].parent / name).read_text()
    # The names of the flags that the file defines by itself.
    defined = {
        part.split('"')[1] for part in source.split("flags.DEFINE_")[1:] if part.split("(")[1].lstrip()[:1] == '"'
    }
    if "define_config_flag()" in source:
        defined |= {"config", "import"}
    if "processes.define_flags()" in source:
        defined |= {"distributed", "coordinator", "num_processes", "process_id"}
    assert defined <= set(shown)
