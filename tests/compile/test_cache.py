"""Compiled programs that outlive a process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sigmarep.compile import cache
from sigmarep.errors import BadInput

# Prints how many programs came from the cache, and a sum.
PROGRAM = """
import sys
from sigmarep.compile import cache
cache.enable(sys.argv[1])
import jax, jax.numpy as jnp
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name) if name.endswith("cache_hits") else None)
value = jax.jit(lambda x: jnp.sum(jnp.tanh(x @ x)))(jnp.ones((8, 8)))
print(len(hits), float(value))
"""
ROOT = Path(__file__).parents[2]


def start(folder, **environment):
    """Number of programs that a new process took from the cache, and its result."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder)],
        capture_output=True,
        text=True,
        env={**kept, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **environment},
        check=True,
    )
    hits, value = done.stdout.split()
    return int(hits), float(value), done.stderr


def test_the_second_start_compiles_nothing_and_broken_programs_are_compiled_anew(tmp_path):
    first = start(tmp_path / "programs")
    again = start(tmp_path / "programs")
    assert (first[0], again[0] > 0, again[1]) == (0, True, first[1])
    programs = list((tmp_path / "programs").glob("*/*-cache"))
    assert programs
    for number, path in enumerate(programs):
        contents = path.read_bytes()
        path.write_bytes((b"", contents[: len(contents) // 2], bytes(len(contents)))[number % 3])
    broken = start(tmp_path / "programs")
    assert broken[:2] == (0, first[1])
    assert "Error" not in broken[2]


def test_auto_is_the_users_cache_folder_unless_the_environment_has_another(tmp_path):
    start("auto", XDG_CACHE_HOME=str(tmp_path / "home"))
    folder = tmp_path / "home" / "sigmarep" / "programs"
    assert list(folder.glob("*/*-cache"))
    assert folder.stat().st_mode & 0o777 == 0o700
    start("auto", XDG_CACHE_HOME=str(tmp_path / "none"), JAX_COMPILATION_CACHE_DIR=str(tmp_path / "own"))
    assert not (tmp_path / "none").exists()
    start("off", XDG_CACHE_HOME=str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def test_a_folder_that_others_can_write_to_is_refused(tmp_path):
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(BadInput, match=r"--compilation_cache = .*others can write to it"):
        cache.enable(str(folder))
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match=r"--compilation_cache = .*cannot be made"):
        cache.enable(str(tmp_path / "file"))


def test_the_programs_used_longest_ago_go_first(tmp_path):
    folder = tmp_path / "machine"
    folder.mkdir()
    for age, name in enumerate("abcd"):
        path = folder / name
        path.write_bytes(bytes(100))
        os.utime(path, (1e9 - age, 1e9 - age))
    cache._shorten(tmp_path, 250)
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b"]
