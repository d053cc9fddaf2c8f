"""Trains the same steps on one process and on several, over several meshes, and compares the losses.

    python scripts/check_processes.py [--tasks image_classification,language_modeling] [--steps 50]

Eight virtual CPU devices in all: one process with eight, two with four, four with two; meshes (data, fsdp, tensor) of
(8, 1, 1), (2, 4, 1) and (2, 2, 2); pmap. The processes are real ones and talk by gloo. Small models by SGD on the digits,
on Python's own help pages and on synthesised speech. The reference is one process with one device. Exit status: 0 if every
loss is within --tolerance, relatively, 1 if not.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
from typing import Any

from absl import flags

from sigmarep import command, tasks
from sigmarep.errors import BadInput, SigmarepError

TASKS = flags.DEFINE_list("tasks", list(tasks.TASKS), "Tasks, separated by commas.")
STEPS = flags.DEFINE_integer("steps", 50, "Steps.")
TOLERANCE = flags.DEFINE_float("tolerance", 1e-3, "Largest relative difference of a loss that passes.")
LAYOUTS = flags.DEFINE_list("layouts", [], "Only these, as the first column names them.")
WORKER = flags.DEFINE_string("worker", None, "Used by this script itself.")

# Processes, devices of each, mesh, config.parallel.
MESHES = ((8, 1, 1), (2, 4, 1), (2, 2, 2))
REFERENCE = (1, 1, (1, 1, 1), "jit")
ALL = (
    REFERENCE,
    *((count, 8 // count, mesh, "jit") for count in (1, 2, 4) for mesh in MESHES),
    *((count, 8 // count, (8, 1, 1), "pmap") for count in (1, 2, 4)),
)


class Differs(SigmarepError):
    """A layout has other losses."""


def main() -> None:
    if WORKER.value:
        work(**json.loads(WORKER.value))
        return
    layouts = {layout_name(each): each for each in ALL}
    unknown = [each for each in LAYOUTS.value if each not in layouts]
    if unknown:
        raise BadInput(f"--layouts {unknown[0]}: expected one of {', '.join(layouts)}")
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for task in TASKS.value:
            reference = losses(task, REFERENCE, folder)
            print(f"{task}: {STEPS.value} steps, loss {reference[0]:.6g} to {reference[-1]:.6g}", flush=True)
            for name, layout in layouts.items():
                if layout == REFERENCE or (LAYOUTS.value and name not in LAYOUTS.value):
                    continue
                found = losses(task, layout, folder)
                apart = [abs(a - b) / abs(b) for a, b in zip(found, reference, strict=True)]
                worst = max(worst, *apart)
                print(f"  {name:22} step 1 {apart[0]:.1e}, largest of all {max(apart):.1e}", flush=True)
    if not worst <= TOLERANCE.value:
        raise Differs(f"a loss differs by {worst:.1e}, more than --tolerance = {TOLERANCE.value:g}")


def layout_name(layout) -> str:
    count, devices, mesh, parallel = layout
    return f"{count}x{devices}:{parallel if parallel == 'pmap' else '-'.join(map(str, mesh))}"


def losses(task: str, layout, folder: str) -> list[float]:
    """The losses that every process of a layout found; they must agree to the last bit."""
    count, devices, mesh, parallel = layout
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    # Tiny models spend their time being compiled.
    fast = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    environment = {**os.environ, "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {fast}"}
    running, outputs = [], []
    for index in range(count):
        output = os.path.join(folder, f"{index}.json")
        what: dict[str, Any] = {"task": task, "mesh": mesh, "parallel": parallel, "devices": devices, "folder": folder}
        what |= {"index": index, "count": count, "port": port, "output": output}
        arguments = [sys.executable, __file__, "--worker", json.dumps(what), "--steps", str(STEPS.value)]
        running.append(
            subprocess.Popen(arguments, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment)
        )
        outputs.append(output)
    errors = [process.communicate()[1] for process in running]
    for process, error in zip(running, errors, strict=True):
        if process.returncode:
            raise SigmarepError(f"{layout_name(layout)} of {task} ended with {process.returncode}: {error[-2000:]}")
    found = []
    for output in outputs:
        with open(output) as file:
            found.append(json.load(file))
    if any(each != found[0] for each in found):
        raise Differs(f"{layout_name(layout)} of {task}: its processes disagree about the losses")
    return found[0]


def work(*, task, mesh, parallel, devices, folder, index, count, port, output) -> None:
    """One process of a layout."""
    import jax

    from sigmarep.training import processes
    from sigmarep.training.config import validate
    from sigmarep.training.experiment import build
    from sigmarep.training.mesh import input_share

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    if count > 1:
        processes.join("on", coordinator=f"localhost:{port}", num_processes=count, process_id=index, timeout=120)
    config = small_config(task, folder)
    config.parallel = parallel
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = mesh
    experiment = build(validate(config))
    runner, share = experiment.runner, input_share(experiment.runner.mesh)
    state = runner.put_state(experiment.create_state())
    stream = experiment.data.train_stream(start=0, process_index=share.part, process_count=share.parts)
    found = []
    for _ in range(STEPS.value):
        state, result = runner.step(state, next(stream), panel=False)
        found.append(float(result.scalars["loss"]))
    with open(output, "w") as file:
        json.dump(found, file)


def small_config(task: str, folder: str):
    from sigmarep.training.config import default_config

    config = default_config(task)
    config.batch_size, config.total_steps = 16, STEPS.value
    model = config.model
    model.depth, model.width, model.num_heads, model.mlp_dim = 2, 32, 4, 64
    model.reparam, model.norm = "sigma", "post"
    # By SGD: what has no gradient but rounding, Adam would turn into steps.
    config.optimizer.name, config.optimizer.learning_rate, config.optimizer.schedule = "sgd", 0.02, "constant"
    if task == "contrastive":
        # Batch normalisation of features that differ little makes its gradients large, and at that rate the steps chaotic:
        # a rounding error grew sixfold a step. Larger kernels tell the pictures apart.
        model.init_std, config.optimizer.learning_rate = 0.5, 1e-4
    config.data.data_dir, config.data.num_threads = os.path.join(folder, "data"), 1
    if task in ("language_modeling", "translation"):
        config.data.name, config.data.folder = "text_folder", write_text(task, folder)
        config.data.vocabulary.kind = "byte"
    if task == "language_modeling":
        config.data.sequence_length = 64
    if task == "translation":
        config.batch_size, config.data.buckets = 1024, (32, 64)
        config.data.max_source_length = config.data.max_target_length = 64
        config.data.source_feature, config.data.target_feature = "source", "target"
    if task == "speech_recognition":
        # pmap's random numbers, which shift positions, are other than jit's.
        model.max_global_shift = 0.0
        # Seconds: sixteen rows of two.
        config.batch_size, config.data.buckets, config.data.eval_splits = 32, (2.0,), ()
    return config


def write_text(task: str, folder: str) -> str:
    """A folder of text from Python's help, or of its lines with the words turned round as their translations."""
    from pydoc_data import topics

    path = os.path.join(folder, task)
    if not os.path.isdir(path):
        os.makedirs(path)
        text = topics.topics["assert"] + topics.topics["import"] + topics.topics["class"]
        lines = [line.strip() for line in text.splitlines() if len(line.split()) > 1 and len(line.strip()) < 60]
        if task == "translation":
            pairs = [f"{line}\t{' '.join(reversed(line.split()))}" for line in lines if "\t" not in line]
            name, text = "train.tsv", "\n".join(pairs) + "\n"
        else:
            name = "train.txt"
        with open(os.path.join(path, name), "w") as file:
            file.write(text)
    return path


if __name__ == "__main__":
    command.run(main)
