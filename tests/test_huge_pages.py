"""A process starts once more as itself to have memory in huge pages."""

import os
import pathlib
import subprocess
import sys

import pytest

from sigmarep import huge_pages

MADVISE = "always [madvise] never\n"
GLIBC = ("glibc", "2.36")


@pytest.mark.parametrize(
    ("variables", "setting"),
    [
        ({}, "glibc.malloc.hugetlb=1"),
        ({"GLIBC_TUNABLES": ""}, "glibc.malloc.hugetlb=1"),
        ({"GLIBC_TUNABLES": "glibc.malloc.check=1"}, "glibc.malloc.check=1:glibc.malloc.hugetlb=1"),
    ],
)
def test_others_settings_stay(variables, setting):
    variables = {"HOME": "/home/me", **variables}
    assert huge_pages.environment(variables, modes=MADVISE, libc=GLIBC) == {**variables, "GLIBC_TUNABLES": setting}


@pytest.mark.parametrize(
    "case",
    [
        {"variables": {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}},
        {"variables": {"LD_PRELOAD": "/usr/lib/libtcmalloc_minimal.so.4"}},
        {"modes": "[always] madvise never\n"},
        {"modes": "always madvise [never]\n"},
        {"modes": ""},
        {"libc": ("glibc", "2.34")},
        {"libc": ("", "")},
    ],
)
def test_no_other_environment_where_it_is_set_or_cannot_be_had(case):
    assert huge_pages.environment(**{"variables": {}, "modes": MADVISE, "libc": GLIBC, **case}) is None


def started(tmp_path, text, *arguments, **variables):
    program = tmp_path / "program.py"
    program.write_text(text)
    others = {name: value for name, value in os.environ.items() if name not in ("GLIBC_TUNABLES", "LD_PRELOAD")}
    process = subprocess.Popen(
        [sys.executable, "-X", "utf8", program, *arguments],
        env={**others, **variables},
        stdout=subprocess.PIPE,
        text=True,
    )
    return process.pid, process.communicate()[0].splitlines()


PROGRAM = """
import os, sys
from sigmarep import huge_pages
huge_pages._modes = lambda: "always [madvise] never"
huge_pages.platform.libc_ver = lambda: ("glibc", "2.36")
print("started", os.getpid(), os.environ.get("GLIBC_TUNABLES"), sys.flags.utf8_mode, *sys.argv[1:])
huge_pages.restart()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux starts a program as the same process")
def test_the_program_starts_once_more_as_the_same_process(tmp_path):
    process, lines = started(tmp_path, PROGRAM, "--name=a b", "")
    assert lines == [f"started {process} None 1 --name=a b ", f"started {process} glibc.malloc.hugetlb=1 1 --name=a b "]


@pytest.mark.parametrize(
    "variables", [{"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, {"LD_PRELOAD": "libjemalloc.so.0"}]
)
def test_the_program_does_not_start_again_against_its_users_will(tmp_path, variables):
    assert len(started(tmp_path, PROGRAM, **variables)[1]) == 1


def test_the_program_does_not_start_again_once_jax_is_there(tmp_path):
    assert len(started(tmp_path, PROGRAM.replace("import os, sys", "import os, sys; sys.modules['jax'] = sys"))[1]) == 1


STARTED = """
import os, runpy, sys
from sigmarep import huge_pages
huge_pages.environment = lambda variables, **_: {"changed": "yes"}
os.execve = lambda program, arguments, variables: (print(arguments[2:], variables, flush=True), os._exit(7))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(("script", "starts_again"), [("train", True), ("generate", True), ("archive_sweep", False)])
def test_scripts_that_compute_start_again(script, starts_again):
    arguments = [f"scripts/{script}.py", "--help"]
    ended = subprocess.run([sys.executable, "-c", STARTED, *arguments], stdout=subprocess.PIPE, text=True)
    assert (ended.returncode == 7) == starts_again
    assert (f"{[STARTED, *arguments]} {{'changed': 'yes'}}\n" == ended.stdout) == starts_again


def test_no_script_that_computes_has_imported_jax_before_it_could_start_again():
    scripts = [
        str(path) for path in sorted(pathlib.Path("scripts").glob("*.py")) if "compiles=True" in path.read_text()
    ]
    assert "scripts/train.py" in scripts
    code = (
        "import runpy, sys\nfrom absl import flags\n"
        "for script in sys.argv[1:]:\n"
        "    [delattr(flags.FLAGS, name) for name in list(flags.FLAGS)]\n"
        "    runpy.run_path(script, run_name='imported')\n"
        "    assert 'jax' not in sys.modules, script\n"
    )
    subprocess.run([sys.executable, "-c", code, *scripts], check=True)
