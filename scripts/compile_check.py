"""Compiles the real training step of a configuration for a TPU slice without a TPU, and prints what it takes.

    python scripts/compile_check.py --config configs/vit/imagenet_simplified.py:variant=H/16 --topology v5e:16x16
    python scripts/compile_check.py --all --output docs/compiled.md [--only mt/]

Topologies are v4, v5p (three dimensions, v5p:4x4x4), v5e, v6e (two, v5e:16x16), for which an environment of its own with
`pip install "sigmarep[tpu-compile]"` is needed, and `local`, the devices present. No data set is read. The table is
written row by row; the same command goes on with those that it lacks.

Exit status: 0 if the step fits, 1 if it needs more memory than a device has (the line says what to change), 2 for bad
input.
"""

import os
import time

from absl import flags

from sigmarep import command
from sigmarep.errors import BadInput

CONFIG = command.define_config_flag()
TOPOLOGY = flags.DEFINE_string("topology", "local", "Devices to compile for, such as v5e:16x16.")
PANEL = flags.DEFINE_boolean("panel", False, "The step that records attention and spectral norms too.")
HLO = flags.DEFINE_string("hlo", None, "File for the optimised program.")
ALL = flags.DEFINE_boolean("all", False, "Makes the table of all full-scale recipes instead.")
ONLY = flags.DEFINE_string("only", "", "With --all: only recipes with this in their names, made anew.")
OUTPUT = flags.DEFINE_string("output", "docs/compiled.md", "File of that table.")

# The full-scale recipes, each at the paper's global batch, and where they are compiled for.
RECIPES = (
    ("vit/imagenet_simplified.py", ("v5e:16x16", "v4:4x4x4")),
    ("vit/imagenet_simplified.py:variant=L/16", ("v5e:16x16", "v4:4x4x4")),
    ("vit/imagenet_simplified.py:variant=H/16", ("v5e:16x16", "v4:4x4x4")),
    ("vit/imagenet_deit.py", ("v5e:16x16",)),
    ("vit/imagenet_deit.py:reparam=sigma", ("v5e:16x16", "v5e:4x4")),
    ("vit/imagenet_mae.py:variant=L/16", ("v5e:16x16",)),
    ("vit/imagenet_mae.py:variant=H/14", ("v5e:16x16",)),
    ("ssl/simclr_imagenet.py", ("v5e:16x16",)),
    ("ssl/mocov3_imagenet.py:arm=sigma_pre_ln", ("v5e:16x16",)),
    ("asr/librispeech_100h.py", ("v5e:8x8",)),
    ("asr/librispeech_100h.py:norm=none,disjoint=2,depth=72,conv=true", ("v5e:8x8",)),
    ("lm/wikitext103.py", ("v5e:2x4",)),
    ("mt/wmt17_en_de.py", ("v5e:8x8",)),
    ("mt/wmt17_en_de.py:depth=100", ("v5e:8x8", "v5e:16x16")),
    ("mt/wmt17_en_de.py:depth=100,norm=deepnorm,reparam=none", ("v5e:16x16",)),
)
COLUMNS = (
    *("recipe", "topology", "mesh", "batch", "arguments", "outputs", "temporaries", "total of chip, GiB"),
    *("TFLOP", "GB read and written", "collectives, MB (count)", "compiled in"),
)


def main() -> None:
    if ALL.value:
        table()
        return
    config = command.resolved_config(CONFIG)
    from sigmarep.compile import aot_compile

    target = aot_compile.target(TOPOLOGY.value)
    found = aot_compile.compile_step(config, target, panel=PANEL.value)
    memory, costs = found.memory, found.costs
    print(
        f"{len(target.devices)} x {target.kind} ({target.name}), mesh {_mesh(found.mesh)}, batch {_batch(found.batch)}"
    )
    print(
        f"memory a device: {_gib(memory.total)} of {_gib(target.memory)} GiB (arguments {_gib(memory.arguments)}, outputs "
        f"{_gib(memory.outputs)}, temporaries {_gib(memory.temporaries)}, program {_gib(memory.code)})"
    )
    loops = ", ".join(f"{turns}" for turns in costs.turns.values())
    print(
        f"a step, each device: {costs.flops / 1e12:.4g} TFLOP, {costs.bytes / 1e9:.4g} GB read and written"
        + (f" (loops of {loops} turns counted in full)" if loops else "")
    )
    for each in found.collectives:
        print(f"{each.kind}: {each.times}, {each.bytes / 1e6:.4g} MB of results on each device")
    print(f"compiled in {found.seconds:.0f} s")
    if HLO.value:
        with open(HLO.value, "w") as file:
            file.write(found.text)


def table() -> None:
    import jax
    import jaxlib

    from sigmarep.compile import aot_compile

    versions = f"jax {jax.__version__}, jaxlib {jaxlib.__version__}, libtpu {_version('libtpu')}"
    folder = os.path.join(os.path.dirname(__file__), "..", "configs")
    made = _read(OUTPUT.value, versions)
    for recipe, topologies in RECIPES:
        path, _, arguments = recipe.partition(":")
        for topology in topologies:
            key = (f"`{recipe}`", topology)
            if ONLY.value not in recipe or (key in made and not ONLY.value):
                continue
            target = aot_compile.target(topology)
            config = command.load_config_file(os.path.join(folder, path)).get_config(arguments)
            try:
                made[key] = _cells(aot_compile.compile_step(config, target), target)
            except aot_compile.DoesNotFit as error:
                made[key] = (str(error),)
            print(" | ".join((*key, *made[key])), flush=True)
            _write(OUTPUT.value, made, versions)


def _cells(found, target) -> tuple[str, ...]:
    memory = found.memory
    moved = ", ".join(f"{each.kind} {each.bytes / 1e6:.4g} ({each.times})" for each in found.collectives)
    return (
        _mesh(found.mesh),
        _batch(found.batch),
        *(_gib(part) for part in (memory.arguments, memory.outputs, memory.temporaries)),
        f"{_gib(memory.total)} of {_gib(target.memory)}",
        f"{found.costs.flops / 1e12:.4g}",
        f"{found.costs.bytes / 1e9:.4g}",
        moved or "none",
        f"{found.seconds:.0f} s",
    )


def _read(path: str, versions: str) -> dict[tuple[str, str], tuple[str, ...]]:
    """The rows of a table that was begun with the same versions."""
    if not os.path.exists(path):
        return {}
    with open(path) as file:
        text = file.read()
    rows = [tuple(line.strip("| \n").split(" | ")) for line in text.splitlines() if line.startswith("| `")]
    return {(row[0], row[1]): row[2:] for row in rows} if versions in text else {}


def _write(path: str, made: dict[tuple[str, str], tuple[str, ...]], versions: str) -> None:
    order = [(f"`{recipe}`", topology) for recipe, topologies in RECIPES for topology in topologies]
    rows = [(*key, *made[key]) for key in order if key in made]
    lines = [
        "# What every full-scale recipe takes, compiled ahead of time",
        "",
        "    python scripts/compile_check.py --all --output docs/compiled.md",
        "",
        f"The training step of each recipe at its own global batch, compiled by {versions} with no TPU present, on "
        f"{os.cpu_count()} CPU cores, {time.strftime('%Y-%m-%d')}. All figures are of one chip and one step. Memory, in "
        "GiB, is the compiler's: arguments are the state and the chip's part of the batch, outputs what does not reuse "
        "their memory. Operations and bytes are the compiler's own count, a loop's body counted as often as it turns. "
        "Collectives are counted likewise, and sized by their results on one chip. Nothing here was run: no figure says "
        "how long a step takes. The batch is the largest that a task has.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
    ]
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "w") as file:
        file.write("\n".join(lines))


def _mesh(mesh: dict[str, int]) -> str:
    return " x ".join(f"{name} {size}" for name, size in mesh.items() if size > 1) or "one device"


def _batch(batch: dict[str, tuple[int, ...]]) -> str:
    name, shape = max(batch.items(), key=lambda each: len(each[1]))
    return f"{name} {' x '.join(str(n) for n in shape)}"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"


def _version(package: str) -> str:
    import importlib.metadata

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise BadInput(f'--all: needs {package}; pip install "sigmarep[tpu-compile]"') from None


if __name__ == "__main__":
    command.run(main)
