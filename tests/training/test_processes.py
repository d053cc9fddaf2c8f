"""Joining processes, who brings which rows, and a run that loses a process and goes on with another number of them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest

from sigmarep.errors import BadInput
from sigmarep.training import mesh as meshes
from sigmarep.training import processes

ROOT = Path(__file__).parents[2]


def a_mesh(count, sizes):
    """Stands in for a mesh of eight devices of `count` processes, as far as `input_share` reads it."""
    devices = [types.SimpleNamespace(process_index=i * count // 8) for i in range(8)]
    grid = np.array(devices, dtype=object).reshape(sizes)
    return types.SimpleNamespace(devices=grid, shape=dict(zip(meshes.AXES, sizes, strict=True)))


@pytest.mark.parametrize("count", [1, 2, 4, 8])
@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 4, 1), (2, 2, 2), (1, 2, 4), (1, 1, 8), (1, 8, 1)])
def test_every_row_is_brought_by_those_who_hold_it(count, sizes):
    mesh = a_mesh(count, sizes)
    shards = sizes[0] * sizes[1]
    brought = {}
    for index in range(count):
        share = meshes.input_share(mesh, index)
        size = shards // share.parts
        brought[index] = set(range(share.part * size, (share.part + 1) * size))
    held = {index: set() for index in range(count)}
    for (data, fsdp, _), device in np.ndenumerate(mesh.devices):
        held[device.process_index].add(data * sizes[1] + fsdp)
    assert brought == held


def test_processes_that_share_some_rows_are_refused():
    mesh = a_mesh(1, (1, 2, 4))
    for place, device in enumerate(mesh.devices.ravel()):
        device.process_index = int(place >= 3)
    with pytest.raises(BadInput, match=r"config\.mesh = .*do not share a batch evenly"):
        meshes.input_share(mesh, 0)


def join(mode="on", coordinator=None, num_processes=None, process_id=None, timeout=1):
    return processes.join(
        mode, coordinator=coordinator, num_processes=num_processes, process_id=process_id, timeout=timeout
    )


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def test_more_devices_than_cores_get_a_thread_for_every_collective(monkeypatch):
    monkeypatch.delenv("NPROC")
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    processes.give_threads()
    assert "NPROC" not in os.environ
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    processes.give_threads()
    assert int(os.environ["NPROC"]) >= 2 * 8
    monkeypatch.setenv("NPROC", "3")
    processes.give_threads()
    assert os.environ["NPROC"] == "3"


def test_alone_there_is_nothing_to_join(monkeypatch):
    for name in ("TPU_WORKER_HOSTNAMES", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert join("auto") is None
    assert join("off", coordinator="localhost:1", num_processes=2, process_id=0) is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"coordinator": "localhost:1"}, "--num_processes, --process_id: required"),
        ({"coordinator": "localhost", "num_processes": 2, "process_id": 1}, r"'localhost': expected HOST:PORT"),
        (
            {"coordinator": "localhost:1", "num_processes": 2, "process_id": 2},
            "--process_id = 2: expected a number below",
        ),
    ],
)
def test_what_is_missing_or_wrong_is_named(given, message):
    with pytest.raises(BadInput, match=message):
        join(**given)


def test_a_coordinator_that_cannot_be_reached_is_said_in_time():
    start = time.monotonic()
    with pytest.raises(BadInput, match=r"process 1: the coordinator localhost:\d+ cannot be reached \(.*refused"):
        join(coordinator=f"localhost:{free_port()}", num_processes=2, process_id=1)
    assert time.monotonic() - start < 10


CONFIG = """
from sigmarep.training.config import default_config

def get_config(_=None):
    config = default_config("image_classification")
    config.batch_size, config.total_steps, config.log_every_steps = 16, 60, 1
    config.checkpoint_every_steps = 10
    config.model.depth, config.model.width, config.model.mlp_dim, config.model.patch_size = 1, 16, 16, 4
    config.model.scan = False
    config.model.reparam, config.model.num_heads = "sigma", 2
    config.optimizer.name, config.optimizer.learning_rate = "sgd", 0.01
    config.data.in_memory, config.data.num_threads = True, 1
    config.data.train_split = "train[:400]"
    return config
"""


HEARTBEAT = 15


def start(folder, name, index, count, port):
    flags = f"--distributed=on --coordinator=localhost:{port} --num_processes={count} --process_id={index}".split()
    flags.append(f"--heartbeat_timeout={HEARTBEAT}")
    command = [sys.executable, "scripts/train.py", "--config", folder / "config.py", "--workdir", folder / name]
    environment = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(4 // count)}
    return subprocess.Popen(
        [*command, *(flags if count > 1 else []), "--config.writers.progress=plain"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment, "PYTHONPATH": str(ROOT), "TFDS_DATA_DIR": str(folder / "data")},
    )


def finish(running, timeout=300):
    try:
        return [(process.communicate(timeout=timeout), process.returncode) for process in running]
    finally:
        for process in running:
            process.kill()


def steps_and_losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "train/loss" in row]
    return [row["step"] for row in rows], [row["train/loss"] for row in rows]


@pytest.mark.slow
def test_a_run_that_loses_a_process_goes_on_with_one_and_then_with_four(tmp_path):
    (tmp_path / "config.py").write_text(CONFIG)
    ((_, status),) = finish([start(tmp_path, "whole", 0, 1, 0)])
    assert status == 0

    port = free_port()
    first, second = (start(tmp_path, "broken", index, 2, port) for index in range(2))
    metrics = tmp_path / "broken" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text().count("\n") > 24):
        time.sleep(0.05)
    second.kill()
    killed = time.monotonic()
    ((out, err), status), _ = finish([first, second], timeout=HEARTBEAT + 60)
    assert time.monotonic() - killed < HEARTBEAT + 40
    assert status not in (0, 2, 3), err
    assert "process 0 of 2: 2 of 4 devices (cpu" in out
    # Whoever notices first ends it: a collective that fails, or JAX's own watch over the processes.
    assert "another process of the run has ended" in err or "coordination service" in err.lower()

    # With one process, told to stop in the midst; then with four.
    alone = start(tmp_path, "broken", 0, 1, 0)
    before = metrics.read_text().count("\n")
    while time.monotonic() < deadline + 300 and metrics.read_text().count("\n") < before + 3:
        time.sleep(0.05)
    alone.send_signal(signal.SIGTERM)
    (((out, _), status),) = finish([alone])
    assert status in (0, 143)
    assert "resumed from the checkpoint of step" in out
    port = free_port()
    four = finish([start(tmp_path, "broken", index, 4, port) for index in range(4)])
    assert [status for _, status in four] == [0] * 4, four

    steps, losses = steps_and_losses(tmp_path / "broken")
    expected_steps, expected = steps_and_losses(tmp_path / "whole")
    assert steps == expected_steps == list(range(1, 61))
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
