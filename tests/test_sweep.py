"""Sweeps: their points, and scripts/sweep.py on runs that end well, diverge, fail and are stopped."""

import concurrent.futures
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sigmarep import command, sweep_execution, sweeps
from sigmarep.errors import BadInput
from sigmarep.training import train_and_evaluate
from sigmarep.training.config import default_config, validate
from sigmarep.training.experiment import Programs, build, program_key
from sigmarep.training.workdir_lock import WorkdirLock, holder

SCRIPT = Path(__file__).parents[1] / "scripts" / "sweep.py"
TRAIN = str(SCRIPT.with_name("train.py"))
# A file whose runs are tiny; a huge rate makes the loss overflow, a head too many is refused.
CONFIG = """
from sigmarep.sweeps import product, seeds, values
from sigmarep.training.config import arguments, default_config

def get_config(text=""):
    args = arguments(text, learning_rate=0.01, heads=2)
    config = default_config("image_classification")
    config.batch_size, config.total_steps, config.log_every_steps = 16, STEPS, 1
    config.model.depth, config.model.width, config.model.mlp_dim, config.model.patch_size = 1, 8, 8, 4
    config.model.num_heads = args["heads"]
    config.optimizer.name, config.optimizer.learning_rate = "sgd", args["learning_rate"]
    config.data.in_memory = True
    return config

def sweep():
    return POINTS
"""


def write(tmp_path, points, steps=3):
    path = tmp_path / "config.py"
    path.write_text(CONFIG.replace("POINTS", points).replace("STEPS", str(steps)))
    return path


def start(path, workdir, *more, **options):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), "--config", str(path), "--workdir", str(workdir), *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **options,
    )


def finish(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def test_points_are_products_zips_and_seeds():
    a, b = sweeps.values("a", 1, 2), sweeps.values("config.b", "x", "y")
    assert sweeps.product(a, b) == [{"a": i, "config.b": j} for i in (1, 2) for j in "xy"]
    assert sweeps.zipped(a, b) == [{"a": 1, "config.b": "x"}, {"a": 2, "config.b": "y"}]
    assert sweeps.product(a, sweeps.seeds(2))[1] == {"a": 1, "config.seed": 1}
    with pytest.raises(ValueError, match=r"shorter|longer"):
        sweeps.zipped(a, sweeps.seeds(3))
    with pytest.raises(BadInput, match=r"two points 'a=1'; make them differ"):
        sweeps.runs("c.py", [{"a": 1}, {"config.a": 1}], "w", "train.py")
    with pytest.raises(BadInput, match="has no points"):
        sweeps.runs("c.py", [], "w", "train.py")


def test_a_dry_run_prints_the_commands_and_makes_nothing(tmp_path):
    path = write(tmp_path, 'product(values("learning_rate", 0.01, 0.1), seeds(2))')
    status, out, _ = finish(start(path, tmp_path / "runs", "--dry_run"))
    assert status == 0
    assert len(out.splitlines()) == 4
    assert (
        f"--config {path}:learning_rate=0.1 --workdir {tmp_path}/runs/learning_rate=0.1,seed=1 --config.seed=1" in out
    )
    assert not (tmp_path / "runs").exists()


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path):
    path = write(tmp_path, 'values("learning_rate", 0.01, 0.1)')
    process = start(path, tmp_path / "runs", "--dry_run")
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 128 + signal.SIGPIPE


def test_runs_that_diverge_and_fail_are_told_apart_and_finished_ones_are_not_repeated(tmp_path):
    path = write(tmp_path, 'values("learning_rate", 0.01, 1e30) + values("heads", 3)', steps=6)
    status, out, err = finish(start(path, tmp_path / "runs", "--jobs", "2"))
    assert status == 1, err
    record = json.loads((tmp_path / "runs/sweep.json").read_text())
    assert {name: run["state"] for name, run in record.items()} == {
        "learning_rate=0.01": "done",
        "learning_rate=1e+30": "diverged",
        "heads=3": "bad input",
    }
    assert out.splitlines()[0] == "3 runs, 0 finished before, 2 at a time"
    assert "heads=3: bad input" in out
    assert "num_heads = 3: does not divide width = 8" in out
    assert (tmp_path / "runs/learning_rate=1e+30/diagnosis.json").exists()
    metrics = (tmp_path / "runs/learning_rate=0.01/metrics.jsonl").stat()
    status, out, _ = finish(start(path, tmp_path / "runs", "--jobs", "1"))
    assert status == 1
    assert out.splitlines()[0] == "3 runs, 2 finished before, 1 at a time"
    assert (tmp_path / "runs/learning_rate=0.01/metrics.jsonl").stat().st_mtime == metrics.st_mtime


@pytest.mark.parametrize(("by", "together"), [(signal.SIGTERM, 1), (signal.SIGINT, 2)])
def test_a_sweep_that_is_stopped_stops_its_runs_and_goes_on(tmp_path, by, together):
    path = write(tmp_path, f"seeds({together})", steps=400)
    process = start(path, tmp_path / "runs", f"--vectorize={together}", process_group=0)
    names = [f"seed={seed}" for seed in range(together)]
    files = [tmp_path / "runs" / name / "metrics.jsonl" for name in names]
    deadline = time.monotonic() + 120
    while not (files[0].exists() and files[0].read_text().count("\n") > 5) and time.monotonic() < deadline:
        time.sleep(0.1)
    # To the whole group, as a terminal sends its Ctrl-C.
    os.killpg(process.pid, by)
    status, _, err = finish(process)
    assert (status, err) == (143, "")
    record = json.loads((tmp_path / "runs/sweep.json").read_text())
    assert [record[name]["state"] for name in names] == ["stopped"] * together
    status, out, err = finish(start(path, tmp_path / "runs", "--jobs", "1", f"--vectorize={together}"))
    assert status == 0, err
    assert out.splitlines()[0].startswith(f"{together} runs, 0 finished before, 1 ")
    assert f"{together} done" in out
    for metrics in files:
        steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines() if "train/loss" in line]
        assert steps == list(range(1, 401))


def test_a_run_that_another_process_trains_is_waited_for(tmp_path):
    folder = tmp_path / "sweep/heads=3"
    (run,) = sweeps.runs(str(write(tmp_path, "")), [{"heads": 3}], str(tmp_path / "sweep"), TRAIN)
    lines = []
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        with WorkdirLock(str(folder)):
            record = pool.submit(sweeps.execute, [run], str(tmp_path / "sweep"), jobs=1, say=lines.append)
            time.sleep(1)
            assert lines[1:] == [f"heads=3: waits for {holder(str(folder))} which trains in it"]
            assert f"process {os.getpid()} on host" in lines[1]
            assert not (folder / "log.txt").exists()
        assert record.result()["heads=3"]["state"] == "bad input"
    assert "num_heads = 3" in (folder / "log.txt").read_text()
    assert holder(str(folder)) is None


def comparable(folder):
    """Rows of metrics without what depends on the clock."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if "per_second" not in name} for row in rows]


@pytest.mark.usefixtures("one_device")
def test_runs_of_one_program_compile_it_once_and_are_those_made_alone(tmp_path):
    path = str(write(tmp_path, "", steps=4))
    points = sweeps.product(sweeps.values("learning_rate", 0.01, 0.3), sweeps.seeds(2))
    decay = [{**point, "config.optimizer.weight_decay": 0.1 * (1 + i)} for i, point in enumerate(points)]
    programs = Programs()
    configs = [command.resolve(run.arguments) for run in sweeps.runs(path, decay, str(tmp_path), TRAIN)]
    assert len({program_key(config.to_dict()) for config in configs}) == 1
    for i, config in enumerate(configs):
        train_and_evaluate(config, str(tmp_path / f"together{i}"), programs=programs)
    steps = build(validate(configs[0]), programs=programs).runner._step._cache_size()
    train_and_evaluate(configs[0], str(tmp_path / "again"), programs=programs)
    # The one with the panel, as every step is logged.
    assert steps == 1 == build(validate(configs[0]), programs=programs).runner._step._cache_size()
    train_and_evaluate(configs[-1], str(tmp_path / "alone"))
    assert comparable(tmp_path / "alone") == comparable(tmp_path / f"together{len(configs) - 1}")
    assert comparable(tmp_path / "again") == comparable(tmp_path / "together0")
    assert comparable(tmp_path / "again") != comparable(tmp_path / "alone")


def test_what_makes_another_program():
    config = default_config("image_classification")
    key = program_key(config.to_dict())

    def changed(**values):
        other = default_config("image_classification")
        other.update_from_flattened_dict({name.replace("__", "."): value for name, value in values.items()})
        return program_key(other.to_dict())

    assert changed(seed=3, optimizer__learning_rate=1.0) == key
    assert changed(optimizer__weight_decay=0.1) == changed(optimizer__weight_decay=0.2) != key
    assert changed(optimizer__clip_norm=1.0) == changed(optimizer__clip_norm=2.0) != key
    assert changed(optimizer__beta1=0.5) != key
    assert changed(model__width=32) != key
    foreign = {"optimizer__name": "adafactor"}
    assert changed(**foreign, optimizer__weight_decay=0.1) != changed(**foreign, optimizer__weight_decay=0.2)


def test_a_killed_worker_costs_the_run_that_it_makes_and_no_other(tmp_path):
    path = write(tmp_path, 'values("learning_rate", 0.01, 0.02)', steps=300)
    process = start(path, tmp_path / "runs", "--jobs", "1")
    metrics = tmp_path / "runs/learning_rate=0.01/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") > 5) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(json.loads((metrics.parent / ".lock").read_text())["pid"], signal.SIGKILL)
    status, out, err = finish(process)
    assert status == 1, err
    assert "1 done" in out
    record = json.loads((tmp_path / "runs/sweep.json").read_text())
    assert [(run["state"], run["status"]) for run in record.values()] == [("failed", -9), ("done", 0)]


def test_one_run_by_its_number_and_the_table_of_all(tmp_path):
    path = write(tmp_path, 'values("learning_rate", 0.01) + values("heads", 3)')
    status, out, _ = finish(start(path, tmp_path / "runs", "--run", "1"))
    assert status == 1
    assert out.splitlines()[0] == "1 runs, 0 finished before, 1 at a time"
    assert list(json.loads((tmp_path / "runs/sweep.json").read_text())) == ["heads=3"]
    status, out, _ = finish(start(path, tmp_path / "runs", "--table"))
    assert status == 0
    assert [line.split() for line in out.splitlines()] == [
        ["learning_rate=0.01", "waiting"],
        ["heads=3", "bad", "input"],
    ]
    status, _, err = finish(start(path, tmp_path / "runs", "--run", "2"))
    assert (status, err.splitlines()) == (2, ["sweep.py: --run 2: expected a number from 0 to 1"])


def test_outcomes_noted_by_several_at_once_are_all_kept(tmp_path):
    def note(number):
        sweep_execution.note(str(tmp_path), f"run {number}", {"state": "done"})

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(note, range(40)))
    assert len(sweeps.read_record(str(tmp_path))) == 40


@pytest.mark.parametrize(
    ("text", "message"),
    [("x = 1\n", "has no function sweep()"), (None, "there is no such file")],
)
def test_what_is_refused(tmp_path, text, message):
    path = tmp_path / "config.py"
    if text is not None:
        path.write_text(text)
    status, _, err = finish(start(path, tmp_path / "runs"))
    assert status == 2
    assert message in err
    assert len(err.splitlines()) == 1
