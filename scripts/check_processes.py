"""Makes the same training steps in one process and in several, on several meshes, and compares the losses.

    python scripts/check_processes.py [--tasks image_classification,language_modeling] [--steps 50]

Every layout has eight virtual CPU devices: one process with eight, two with four or four with two; meshes (data, fsdp,
tensor) of (8, 1, 1), (2, 4, 1) and (2, 2, 2); and pmap. The processes are real and communicate by gloo. Small models are
trained by SGD on the digits, Python's help pages and synthesized speech. The reference is one process with one device.
Exit status: 0 if the relative difference of every loss is within --tolerance, 1 if not.
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
STEPS = flags.DEFINE_integer("steps", 50, "Number of training steps.")
TOLERANCE = flags.DEFINE_float("tolerance", 1e-3, "Largest accepted relative difference of a loss.")
LAYOUTS = flags.DEFINE_list("layouts", [], "Only these layouts, by their names in the first column.")
WORKER = flags.DEFINE_string("worker", None, "Used by this script itself.")

# A layout: number of processes, devices of each, mesh, config.parallel.
MESHES = ((8, 1, 1), (2, 4, 1), (2, 2, 2))
REFERENCE = (1, 1, (1, 1, 1), "jit")
ALL = (
    REFERENCE,
    *((count, 8 // count, mesh, "jit") for count in (1, 2, 4) for mesh in MESHES),
    *((count, 8 // count, (8, 1, 1), "pmap") for count in (1, 2, 4)),
)


class Differs(SigmarepError):
    """The losses of a layout differ from the reference."""


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
                pairs = zip(losses(task, layout, folder), reference, strict=True)
                differences = [abs(loss - expected) / abs(expected) for loss, expected in pairs]
                worst = max(worst, *differences)
                print(f"  {name:22} step 1 {differences[0]:.1e}, largest of all {max(differences):.1e}", flush=True)
    if not worst <= TOLERANCE.value:
        raise Differs(f"a loss differs by {worst:.1e}, more than --tolerance = {TOLERANCE.value:g}")


def layout_name(layout) -> str:
    count, devices, mesh, parallel = layout
    return f"{count}x{devices}:{parallel if parallel == 'pmap' else '-'.join(map(str, mesh))}"


def losses(task: str, layout, folder: str) -> list[float]:
    """Trains in the processes of a layout and returns the losses, which must agree to the last bit between processes."""
    count, devices, mesh, parallel = layout
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    # Tiny models spend most of their time in compilation.
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
    losses_of = []
    for output in outputs:
        with open(output) as file:
            losses_of.append(json.load(file))
    if any(each != losses_of[0] for each in losses_of):
        raise Differs(f"{layout_name(layout)} of {task}: its processes disagree about the losses")
    return losses_of[0]


def work(*, task, mesh, parallel, devices, folder, index, count, port, output) -> None:
    """Trains as one process of a layout and writes its losses to `output`."""
    import jax

    from sigmarep.training import processes
    from sigmarep.training.config import validate
    from sigmarep.training.experiment import build
    from sigmarep.training.mesh import input_share

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    processes.give_threads()
    if count > 1:
        processes.join("on", coordinator=f"localhost:{port}", num_processes=count, process_id=index, timeout=120)
    config = small_config(task, folder)
    config.parallel = parallel
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = mesh
    experiment = build(validate(config))
    runner, share = experiment.runner, input_share(experiment.runner.mesh)
    state = runner.put_state(experiment.create_state())
    stream = experiment.data.train_stream(start=0, process_index=share.part, process_count=share.parts)
    step_losses = []
    for _ in range(STEPS.value):
        state, result = runner.step(state, next(stream), panel=False)
        step_losses.append(float(result.scalars["loss"]))
    with open(output, "w") as file:
        json.dump(step_losses, file)


def small_config(task: str, folder: str):
    from sigmarep.training.config import default_config

    config = default_config(task)
    config.batch_size, config.total_steps = 16, STEPS.value
    model = config.model
    model.depth, model.width, model.num_heads, model.mlp_dim = 2, 32, 4, 64
    model.reparam, model.norm = "sigma", "post"
    # SGD, because Adam would turn the rounding of zero gradients into full steps.
    config.optimizer.name, config.optimizer.learning_rate, config.optimizer.schedule = "sgd", 0.02, "constant"
    if task == "contrastive":
        # Batch normalization of nearly equal features makes gradients large, and steps at the rate above chaotic: rounding
        # errors grew sixfold per step. Larger kernels make the features differ.
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
        # pmap and jit draw different random shifts of positions.
        model.max_global_shift = 0.0
        # In seconds: sixteen rows of two.
        config.batch_size, config.data.buckets, config.data.eval_splits = 32, (2.0,), ()
    return config


def write_text(task: str, folder: str) -> str:
    """Writes a folder of text from Python's help; translations are its lines with the words in reverse order."""
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
