"""Two real processes with a device each: the contrastive training step of one process, and its views."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]

PROGRAM = """
import functools, itertools, json, sys

import jax

index, count, port, data_dir, method, output = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
jax.config.update("jax_num_cpu_devices", 1)
if count > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", count, index)

import numpy as np
from sigmarep.training.config import default_config, validate
from sigmarep.training.experiment import build

config = default_config("contrastive")
config.batch_size, config.total_steps, config.method = 16, 4, method
config.model.depth, config.model.width, config.model.mlp_dim, config.model.num_heads = 2, 16, 16, 2
config.model.reparam, config.model.norm, config.model.init_std = "sigma", "pre", 0.1
config.projector.hidden, config.projector.width = 16, 8
config.predictor.hidden, config.predictor.width = 16, 8
config.optimizer.name, config.optimizer.learning_rate, config.optimizer.schedule = "sgd", 0.01, "constant"
config.data.data_dir, config.data.in_memory, config.data.num_threads = data_dir, True, 1
config.data.train_split = "train[:200]"
experiment = build(validate(config))
state = experiment.create_state()
stream = experiment.data.train_stream(start=0, process_index=index, process_count=count)
losses, norms, views = [], [], []
for batch in itertools.islice(stream, 4):
    views.append(float(np.sum(batch["views"], dtype=np.float64)))
    state, found = experiment.runner.step(state, batch, panel=False)
    losses.append(float(found.scalars["loss"]))
    norms.append(float(found.scalars["gradient_norm"]))
leaves = [np.asarray(leaf).ravel().astype(float) for leaf in jax.tree.leaves((state.params, state.model_state))]
json.dump(
    {"devices": jax.device_count(), "losses": losses, "norms": norms, "views": views,
     "state": np.concatenate(leaves).tolist()},
    open(output, "w"),
)
"""


def run(folder, method, count):
    """Runs `count` processes for four steps and returns the report of each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    program = folder / "program.py"
    program.write_text(PROGRAM)
    outputs = [folder / f"{method}-{count}-{index}.json" for index in range(count)]
    running = [
        subprocess.Popen(
            [sys.executable, program, str(index), str(count), port, str(folder / "tfds"), method, output],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(folder)},
        )
        for index, output in enumerate(outputs)
    ]
    try:
        errors = [process.communicate(timeout=240)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * count, errors
    return [json.loads(output.read_text()) for output in outputs]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["simclr", "moco_v3"])
def test_two_processes_take_the_contrastive_steps_of_one(method, tmp_path):
    (one,) = run(tmp_path, method, 1)
    first, second = run(tmp_path, method, 2)
    assert (one["devices"], first["devices"]) == (1, 2)
    np.testing.assert_allclose(np.add(first["views"], second["views"]), one["views"], rtol=1e-9)
    assert first["views"] != second["views"]
    for found in (first, second):
        # The first step to rounding; later ones enlarge its differences.
        np.testing.assert_allclose(found["losses"][0], one["losses"][0], rtol=1e-6)
        np.testing.assert_allclose(found["norms"][0], one["norms"][0], rtol=1e-5)
        np.testing.assert_allclose(found["losses"], one["losses"], rtol=2e-4)
        np.testing.assert_allclose(found["state"], one["state"], rtol=1e-3, atol=2e-4)
