"""Whole runs as a user starts them: stopped, killed, damaged, resumed, diverged, refused."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import ml_collections
import pytest

from sigmarep.errors import BadInput
from sigmarep.training import workdir as workdirs
from sigmarep.training.config import default_config
from sigmarep.training.metrics import read_metrics

ROOT = Path(__file__).parents[2]
TINY = [
    "--config.model.depth=2",
    "--config.model.width=16",
    "--config.model.num_heads=2",
    "--config.model.mlp_dim=16",
    "--config.model.dropout=0.1",
    "--config.batch_size=16",
    "--config.total_steps=60",
    "--config.log_every_steps=1",
    "--config.eval_every_steps=20",
    "--config.checkpoint_every_steps=10",
    "--config.optimizer.warmup_steps=5",
]
TIMING = ("train/examples_per_second",)


def environment(folder):
    return {
        **os.environ,
        "TFDS_DATA_DIR": str(folder / "tfds"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONUNBUFFERED": "1",
    }


def start(folder, workdir, *flags, script="train.py"):
    config = [] if script == "evaluate.py" else ["--config", "configs/quickstart.py"]
    return subprocess.Popen(
        [sys.executable, f"scripts/{script}", *config, "--workdir", str(workdir), *flags],
        cwd=ROOT,
        env=environment(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process, timeout=240):
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def train(folder, workdir, *flags, **options):
    return finish(start(folder, workdir, *TINY, *flags, **options))


def rows(workdir):
    found = read_metrics(str(Path(workdir) / "metrics.jsonl"))
    return [{name: value for name, value in row.items() if name not in TIMING} for row in found]


def wait_for_step(process, workdir, step, timeout=120):
    """Returns once the metrics have reached `step`, or the process has ended."""
    end = time.monotonic() + timeout
    while time.monotonic() < end and process.poll() is None:
        found = read_metrics(str(Path(workdir) / "metrics.jsonl"))
        if found and found[-1]["step"] >= step:
            return
        time.sleep(0.01)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def uninterrupted(folder):
    """The workdir of a run that nobody disturbed, and what it printed."""
    workdir = folder / "uninterrupted"
    status, out, err = train(folder, workdir)
    assert status == 0, err
    return workdir, out


def test_a_run_says_how_it_went_and_where_its_files_are(uninterrupted):
    workdir, out = uninterrupted
    assert "test accuracy: " in out
    assert "lowest attention entropy: " in out
    for name in ("metrics.jsonl", "checkpoints", "config.json"):
        assert str(workdir / name) in out
        assert (workdir / name).exists()
    trained = [row["step"] for row in rows(workdir) if "train/loss" in row]
    assert trained == list(range(1, 61))
    assert [row["step"] for row in rows(workdir) if "eval/test/accuracy" in row] == [20, 40, 60]
    about = json.loads((workdir / "environment.json").read_text())
    assert about["packages"]["jax"]
    assert about["devices"]["count"] == 1
    assert json.loads((workdir / "config.json").read_text())["model"]["width"] == 16


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_numbers(folder, uninterrupted):
    workdir = folder / "killed"
    for step in (3, 12, 13, 37, 58):
        process = start(folder, workdir, *TINY)
        wait_for_step(process, workdir, step)
        process.send_signal(signal.SIGKILL)
        finish(process)
    status, _, err = train(folder, workdir)
    assert status == 0, err
    assert rows(workdir) == rows(uninterrupted[0])


@pytest.mark.slow
def test_sigterm_or_ctrl_c_saves_exits_soon_and_loses_nothing(folder, uninterrupted):
    workdir, stopped_at = folder / "terminated", None
    for step, by in ((1, signal.SIGTERM), (27, signal.SIGINT)):
        process = start(folder, workdir, *TINY)
        wait_for_step(process, workdir, step)
        process.send_signal(by)
        sent = time.monotonic()
        status, out, err = finish(process)
        assert status == 143
        assert time.monotonic() - sent < 10
        assert "stopped by SIGTERM" in err
        assert stopped_at is None or f"resumed from the checkpoint of step {stopped_at}" in out
        stopped_at = rows(workdir)[-1]["step"]
    status, out, err = train(folder, workdir)
    assert status == 0, err
    assert f"resumed from the checkpoint of step {stopped_at}" in out
    assert rows(workdir) == rows(uninterrupted[0])


@pytest.mark.slow
def test_sigterm_before_the_first_step_exits_at_once(folder):
    process = start(folder, folder / "early", *TINY)
    end = time.monotonic() + 60
    while not (folder / "early" / "config.json").exists() and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(1.0)
    process.send_signal(signal.SIGTERM)
    sent = time.monotonic()
    assert finish(process)[0] == 143
    assert time.monotonic() - sent < 5


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_costs_only_the_steps_since_the_one_before(folder, uninterrupted):
    workdir = folder / "damaged"
    shutil.copytree(uninterrupted[0], workdir)
    for path in sorted((workdir / "checkpoints" / "60" / "state").rglob("*")):
        if path.is_file():
            os.truncate(path, path.stat().st_size // 2)
    status, out, err = train(folder, workdir)
    assert status == 0, err
    assert "the checkpoint of step 60 is damaged" in out
    assert "going on from step 50" in out
    assert rows(workdir) == rows(uninterrupted[0])


def test_a_finished_run_has_nothing_left_to_do(folder, uninterrupted):
    workdir, out = uninterrupted
    before = (workdir / "metrics.jsonl").read_bytes()
    status, again, err = train(folder, workdir)
    assert status == 0, err
    assert "all 60 steps are done already" in again
    assert next(line for line in out.splitlines() if "accuracy:" in line) in again
    assert (workdir / "metrics.jsonl").read_bytes() == before


def test_evaluating_a_workdir_gives_its_last_evaluation(folder, uninterrupted):
    workdir, out = uninterrupted
    status, found, err = finish(start(folder, workdir, script="evaluate.py"))
    assert status == 0, err
    assert "checkpoint of step 60" in found
    accuracy = [line for line in out.splitlines() if line.startswith("test accuracy")]
    assert accuracy[0] in found.splitlines()


def test_divergence_has_its_own_status_keeps_a_finite_checkpoint_and_is_diagnosed(folder):
    workdir = folder / "diverged"
    flags = [
        "--config.model.reparam=none",
        "--config.model.norm=none",
        "--config.optimizer.name=sgd",
        "--config.optimizer.learning_rate=1e4",
        "--config.optimizer.schedule=linear",
        "--config.optimizer.warmup_steps=40",
        "--config.checkpoint_every_steps=1",
    ]
    status, _, err = train(folder, workdir, *flags)
    assert status == 3
    (line,) = err.strip().splitlines()
    assert "diverged at step" in line
    assert "last good checkpoint: step" in line
    diagnosis = json.loads((workdir / "diagnosis.json").read_text())
    assert diagnosis["message"] in line
    kept = max(int(name) for name in os.listdir(workdir / "checkpoints") if name.isdigit())
    assert kept < diagnosis["step"]
    assert rows(workdir)[-1]["step"] == diagnosis["step"]


REFUSED = [
    (
        ["--config.optimizer.learning_rat=1"],
        "config.optimizer.learning_rat.*did you mean config.optimizer.learning_rate",
    ),
    (
        ["--config.optimiser.name=adam"],
        "config.optimiser.name: there is no such section; did you mean config.optimizer.name",
    ),
    (["--config.seed=None"], "config.seed = None: expected a whole number"),
    (["--config.batch_sise=8"], "config.batch_sise.*did you mean config.batch_size"),
    (["--config.batch_size=many"], "config.batch_size=many"),
    (["--config.model.num_heads=3"], "config.model.num_heads = 3: does not divide width = 64"),
    (["--config.model.patch_size=3"], "config.model.patch_size = 3: does not divide the image of 8 x 8"),
    (["--config.model.norm=prenorm"], "config.model.norm = 'prenorm': expected one of none, pre, peri, post, deepnorm"),
    (["--config.optimizer.name=adm"], "config.optimizer.name = 'adm': expected one of adamw"),
    (["--config.optimizer.schedule=cos"], "config.optimizer.schedule = 'cos': expected one of constant"),
    (["--config.batch_size=63", "--config.accumulation=2"], "config.batch_size = 63: does not divide"),
    (["--config.mesh.data=3"], "config.mesh = .*does not multiply to the 1 devices"),
    (["--config.data.name=cifar10"], "python scripts/prepare_data.py --name cifar10"),
    (["--config.data.augment.crop=centre"], "config.data.augment.crop = 'centre': expected one of"),
    (["--config.total_steps=-5"], "config.total_steps = -5"),
    (["--config.parallel=pmapp"], "config.parallel = 'pmapp': expected one of jit, pmap"),
    (["--confg=x"], "confg: there is no such flag"),
    (["stray"], "'stray': not understood"),
]


# A process for each of the commands, forked from one that has imported what they import and not yet started JAX.
FORKS = """
import json, os, runpy, sys

import sigmarep.training.loop
from sigmarep import tasks

tasks.get("image_classification")
statuses = []
for number, arguments in enumerate(json.loads(sys.argv[1])):
    child = os.fork()
    if child == 0:
        errors = os.open(os.path.join(sys.argv[2], f"{number}.err"), os.O_WRONLY | os.O_CREAT)
        os.dup2(errors, 2)
        sys.argv = ["scripts/train.py", *arguments]
        runpy.run_path(sys.argv[0], run_name="__main__")
        sys.exit(0)
    statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(statuses))
"""


@pytest.fixture(scope="module")
def refusals(folder):
    """Exit status and standard error of the command with each of the flags of `REFUSED`."""
    where = folder / "refused"
    where.mkdir()
    commands = [
        ["--config", "configs/quickstart.py", "--workdir", str(where / f"{number}"), *flags]
        for number, (flags, _) in enumerate(REFUSED)
    ]
    done = subprocess.run(
        [sys.executable, "-c", FORKS, json.dumps(commands), str(where)],
        cwd=ROOT,
        env=environment(folder) | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
        timeout=240,
    )
    errors = [(where / f"{number}.err").read_text() for number in range(len(REFUSED))]
    # Some of them have begun, and said so, before the data are opened.
    return list(zip(json.loads(done.stdout.splitlines()[-1]), errors, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(REFUSED)), ids=[" ".join(flags) for flags, _ in REFUSED])
def test_bad_input_gets_one_line_and_status_two(folder, refusals, number):
    status, err = refusals[number]
    assert status == 2, err
    (line,) = err.strip().splitlines()
    assert re.search(REFUSED[number][1], line), line
    assert "Traceback" not in err
    assert not (folder / "refused" / str(number) / "config.json").exists()


def test_a_missing_config_file_and_a_missing_workdir_are_named(folder, tmp_path):
    command = [sys.executable, "scripts/train.py", "--config", "configs/none.py", "--workdir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--config configs/none.py: there is no such file" in done.stderr
    command = [sys.executable, "scripts/train.py", "--config", "configs/quickstart.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (2, "train.py: --workdir is missing")


def test_a_workdir_of_another_configuration_is_left_alone(folder, uninterrupted):
    workdir = uninterrupted[0]
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file()}
    status, _, err = train(folder, workdir, "--config.optimizer.learning_rate=0.5")
    assert status == 2
    assert "config.optimizer.learning_rate is 0.003 there and 0.5 here" in err
    assert before == {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file()}


def test_a_run_of_a_version_without_a_field_had_its_default(tmp_path):
    config = default_config("image_classification")
    workdirs.claim(str(tmp_path), ml_collections.FrozenConfigDict(config), {}, total_steps=1, primary_metric="accuracy")
    stored = json.loads((tmp_path / "config.json").read_text())
    del stored["optimizer"]["scale_parameters_factor"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    config.optimizer.scale_parameters_factor = 0.5
    with pytest.raises(BadInput, match=r"config.optimizer.scale_parameters_factor is 1.0 there and 0.5 here"):
        workdirs.claim(
            str(tmp_path), ml_collections.FrozenConfigDict(config), {}, total_steps=1, primary_metric="accuracy"
        )
    config.optimizer.scale_parameters_factor = 1.0
    workdirs.claim(str(tmp_path), ml_collections.FrozenConfigDict(config), {}, total_steps=1, primary_metric="accuracy")


def test_a_workdir_that_cannot_be_made_is_named(folder, tmp_path):
    (tmp_path / "file").write_text("")
    status, _, err = train(folder, tmp_path / "file" / "run")
    assert status == 2
    assert "cannot be written" in err
    assert len(err.strip().splitlines()) == 1


def test_evaluating_an_empty_folder_is_refused(folder, tmp_path):
    status, _, err = finish(start(folder, tmp_path, script="evaluate.py"))
    assert status == 2
    assert "holds no run" in err


@pytest.mark.slow
def test_the_quickstart_reads_at_least_95_percent_of_the_test_digits(folder, monkeypatch):
    # As a user runs it, without the flags that make tiny models compile sooner.
    monkeypatch.setenv("XLA_FLAGS", "")
    status, out, err = finish(start(folder, folder / "quickstart"), timeout=600)
    assert status == 0, err
    accuracy = next(line for line in out.splitlines() if line.startswith("test accuracy: "))
    assert float(accuracy.split()[-1]) >= 0.95
    assert "lowest attention entropy: " in out


def test_a_run_of_a_version_whose_fields_had_other_names_is_read(tmp_path):
    from sigmarep.training import workdir

    stored = {"task": "image_classification", "optimizer": {"other_learning_rate": 0.01, "gains": ["gamma$"]}}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert workdir.stored_config(str(tmp_path))["optimizer"] == {
        "non_matrix_learning_rate": 0.01,
        "scale_parameters": ["gamma$"],
    }
