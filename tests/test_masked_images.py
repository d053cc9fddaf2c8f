"""A task from outside, by the commands alone: trained, killed, resumed, evaluated, reported and swept."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from sigmarep.errors import BadInput
from sigmarep.training.metrics import read_metrics
from sigmarep.training.restore import restored_config

pytestmark = pytest.mark.usefixtures("one_device")

ROOT = Path(__file__).parents[1]
CONFIG = """
import os
from sigmarep.command import load_config_file
from sigmarep.sweeps import values

def get_config(text=""):
    config = load_config_file(os.path.join(ROOT, "examples/masked_images/config.py")).get_config("steps=48")
    config.batch_size, config.log_every_steps, config.eval_every_steps, config.checkpoint_every_steps = 16, 1, 24, 6
    config.model.depth, config.model.width, config.model.num_heads, config.model.mlp_dim = 1, 8, 2, 8
    config.model.scan = False
    config.optimizer.name, config.optimizer.warmup_steps = "adafactor", 4
    config.optimizer.learning_rate = 0.03
    config.optimizer.arguments.min_dim_size_to_factor = 8
    return config

def sweep():
    return values("config.mask_ratio", 0.25, 0.75)
"""
FLAGS = ["--config.mask_ratio=0.75", "--config.writers.progress=plain"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("masked")
    (folder / "config.py").write_text(f"ROOT = {str(ROOT)!r}\n{CONFIG}")
    return folder


def start(folder, script, *arguments):
    environment = {
        **os.environ,
        "TFDS_DATA_DIR": str(folder / "tfds"),
        "JAX_PLATFORMS": "cpu",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONUNBUFFERED": "1",
    }
    return subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / script), *map(str, arguments)],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


PACKAGE = ["--import", ROOT / "examples" / "masked_images"]


@pytest.fixture(scope="module")
def swept(folder):
    """The folder of a sweep of two runs, and what it printed."""
    arguments = ["--config", folder / "config.py", "--workdir", folder / "sweep", "--jobs", 1, *PACKAGE]
    status, out, err = finish(start(folder, "sweep.py", *arguments))
    assert status == 0, out + err
    return folder / "sweep", out


def rows(workdir):
    found = read_metrics(str(workdir / "metrics.jsonl"))
    return [{name: value for name, value in row.items() if not name.endswith("_per_second")} for row in found]


def test_a_sweep_makes_two_runs_that_learn(swept):
    assert "2 done" in swept[1]
    for run in ("mask_ratio=0.25", "mask_ratio=0.75"):
        losses = [row["train/loss"] for row in rows(swept[0] / run) if "train/loss" in row]
        assert len(losses) == 48
        assert np.mean(losses[-4:]) < 0.9 * np.mean(losses[:4])
        assert [row["step"] for row in rows(swept[0] / run) if "eval/test/explained" in row] == [24, 48]


def test_a_killed_run_goes_on_to_the_bit(folder, swept):
    workdir = folder / "killed"
    arguments = ["--config", folder / "config.py", "--workdir", workdir, *PACKAGE, *FLAGS]
    process = start(folder, "train.py", *arguments)
    deadline = time.monotonic() + 120
    # Under this name a checkpoint is whole.
    while not (workdir / "checkpoints" / "6").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert finish(process)[0] == -signal.SIGKILL
    status, out, err = finish(start(folder, "train.py", *arguments))
    assert status == 0, err
    assert "resumed from the checkpoint of step " in out
    assert rows(workdir) == rows(swept[0] / "mask_ratio=0.75")


def test_a_run_is_evaluated_once_its_package_is_named(folder, swept):
    workdir = swept[0] / "mask_ratio=0.75"
    with pytest.raises(
        BadInput, match=r"its config.json names masked_images.task \(config.task\).* add --import masked_im"
    ):
        restored_config(str(workdir))
    assert "masked_images" not in sys.modules
    status, out, err = finish(start(folder, "evaluate.py", "--workdir", workdir, *PACKAGE))
    assert status == 0, err
    assert out.splitlines()[0] == "checkpoint of step 48"
    explained = rows(workdir)[-1]["eval/test/explained"]
    assert f"test explained: {explained:.4g}" in out.splitlines()


def test_the_report_needs_no_code_of_the_task(folder, swept):
    status, _, err = finish(start(folder, "report.py", swept[0], "--output", folder / "report.html", "--plots", 1))
    assert status == 0, err
    page = (folder / "report.html").read_text()
    assert "2 done" in page
    assert "mask_ratio=0.75" in page
    assert "encoder/block_0" in page
