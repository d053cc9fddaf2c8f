"""Eight virtual devices for every test, and one compilation cache for all runs of the suite."""

import collections
import gc
import os
import pathlib
import tempfile
from importlib.metadata import version

# Tiny models spend their time being compiled: leave out what only makes large ones run faster, the fusions' own
# code generator (half of a step's compilation) and the splitting of a program for more cores than a worker has.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_parallel_codegen_split_count=1",
        # A busy machine may stop a device's thread for longer than the 40 seconds after which XLA ends the process.
        "--xla_cpu_collective_call_terminate_timeout_seconds=300",
        # XLA ends the process at a flag that it does not know: jaxlib 0.11.2 no longer knows this one.
        "--xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else "",
    ]
)

# Processes that a test starts inherit these two.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), "sigmarep-test-jax-cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

# A script that a test starts does not start once more for the sake of the speed of its steps (`sigmarep.huge_pages`).
os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0")

# With eight devices on two cores collectives would wait for each other for ever (`give_threads` of training/processes.py).
os.environ.setdefault("NPROC", "32")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)

# Every compiled program takes memory maps, of which Linux allows a process 65,530: one that has more is aborted.
MAPS = 15_000


@pytest.fixture(scope="module", autouse=True)
def _few_maps():
    yield
    if not os.path.exists("/proc/self/maps"):
        return
    with open("/proc/self/maps", "rb") as file:
        maps = sum(1 for _ in file)
    if maps > MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="module")
def one_device():
    """Programs for one of the devices, for files in which their number plays no part: they compile and run faster."""
    first = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: first)
        yield


# Test functions, one a line, that are slow beside those marked in their files; written by --update-slow.
SLOW = pathlib.Path(__file__).with_name("slow.txt")


def pytest_addoption(parser):
    parser.addoption("--update-golden", action="store_true", help="rewrite the golden files of the configurations")
    parser.addoption(
        "--update-slow",
        type=float,
        metavar="SECONDS",
        help="list the tests that took longer, of the files that run",
    )


def pytest_collection_modifyitems(items):
    listed = set(SLOW.read_text(encoding="utf-8").split())
    for item in items:
        if item.nodeid.partition("[")[0] in listed:
            item.add_marker(pytest.mark.slow)


def pytest_configure(config):
    if config.getoption("--update-slow") is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Durations(config), "slow tests")


class _Durations:
    """Measures every test, those of xdist's workers too, and lists the slow ones at the end."""

    def __init__(self, config):
        self.limit, self.seconds = config.getoption("--update-slow"), collections.defaultdict(float)

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid] += report.duration

    def pytest_sessionfinish(self):
        files = {name.partition("::")[0] for name in self.seconds}
        others = {name for name in SLOW.read_text(encoding="utf-8").split() if name.partition("::")[0] not in files}
        slow = {name.partition("[")[0] for name, seconds in self.seconds.items() if seconds > self.limit}
        SLOW.write_text("".join(f"{name}\n" for name in sorted(others | slow)), encoding="utf-8")
