"""Compiles the real training step of a configuration for a TPU slice without a TPU, and prints its cost.

    python scripts/compile_check.py --config configs/vit/imagenet_simplified.py:variant=H/16 --topology v5e:16x16
    python scripts/compile_check.py --all --output docs/compiled.md [--only mt/]

Topologies are `local`, the devices present, or a slice of v4 or v5p (three dimensions: v5p:4x4x4), v5e or v6e (two:
v5e:16x16). Slices need a separate environment with `pip install "sigmarep[tpu-compile]"`. No data set is read. With
--all the table is written row by row; the same command continues an unfinished table.

Exit status: 0 if the step fits, 1 if it needs more memory than a device has (the message tells what to change), 2 for
bad input.
"""

import os
import time

from absl import flags

from sigmarep import command
from sigmarep.errors import BadInput

CONFIG = command.define_config_flag()
TOPOLOGY = flags.DEFINE_string("topology", "local", "Devices to compile for, such as v5e:16x16.")
PANEL = flags.DEFINE_boolean("panel", False, "Compile the step that also records attention and spectral norms.")
HLO = flags.DEFINE_string("hlo", None, "File to write the optimized program to.")
ALL = flags.DEFINE_boolean("all", False, "Make the table of all full-scale recipes instead.")
ONLY = flags.DEFINE_string("only", "", "With --all: recompile only the recipes whose names contain this.")
OUTPUT = flags.DEFINE_string("output", "docs/compiled.md", "With --all: file to write the table to.")

# The full-scale recipes, each at the paper's global batch, and the slices that they are compiled for.
LARGE = ("v5e:16x16", "v5p:4x4x4", "v6e:8x8")
MIDDLE = ("v5e:8x8", "v5p:4x4x4", "v6e:8x8")
SMALL = ("v5e:2x4", "v5p:2x2x2", "v6e:2x4")
RECIPES = (
    ("vit/imagenet_simplified.py", (*LARGE, "v4:4x4x4")),
    ("vit/imagenet_simplified.py:variant=L/16", (*LARGE, "v4:4x4x4")),
    ("vit/imagenet_simplified.py:variant=H/16", (*LARGE, "v4:4x4x4")),
    ("vit/imagenet_deit.py", LARGE),
    ("vit/imagenet_deit.py:reparam=sigma", (*LARGE, "v5e:4x4")),
    ("vit/imagenet_mae.py:variant=L/16", LARGE),
    ("vit/imagenet_mae.py:variant=H/14", LARGE),
    ("ssl/simclr_imagenet.py", LARGE),
    ("ssl/mocov3_imagenet.py:arm=sigma_pre_ln", LARGE),
    ("asr/librispeech_100h.py", MIDDLE),
    ("asr/librispeech_100h.py:norm=none,disjoint=2,depth=72,conv=true", MIDDLE),
    ("lm/wikitext103.py", SMALL),
    ("lm/decoder.py:size=full", LARGE),
    ("mt/wmt17_en_de.py", MIDDLE),
    ("mt/wmt17_en_de.py:depth=100", ("v5e:8x8", *LARGE)),
    ("mt/wmt17_en_de.py:depth=100,norm=deepnorm,reparam=none", LARGE),
)
COLUMNS = (
    *("recipe", "topology", "mesh", "batch", "arguments", "outputs", "temporaries", "total of chip, GiB"),
    *("TFLOP", "GB read and written", "main memory, GB", "collectives, MB (count)", "compiled in"),
)
UNPRINTABLE = (
    'this jaxlib cannot print what the installed libtpu, a newer one, has compiled; pip install "sigmarep[tpu-compile]" '
    "brings the one that jax names"
)


def main() -> None:
    if ALL.value:
        table()
        return
    config = command.resolved_config(CONFIG)
    from sigmarep.compile import aot_compile

    target = aot_compile.target(TOPOLOGY.value)
    step = aot_compile.compile_step(config, target, panel=PANEL.value)
    memory, costs = step.memory, step.costs
    print(f"{len(target.devices)} x {target.kind} ({target.name}), mesh {_mesh(step.mesh)}, batch {_batch(step.batch)}")
    print(
        f"memory a device: {_gib(memory.total)} of {_gib(target.memory)} GiB (arguments {_gib(memory.arguments)}, outputs "
        f"{_gib(memory.outputs)}, temporaries {_gib(memory.temporaries)}, program {_gib(memory.code)})"
    )
    if costs is None:
        print(f"operations, bytes and collectives are not known: {UNPRINTABLE}")
    else:
        loops = ", ".join(str(count) for count in costs.trip_counts.values())
        print(
            f"a step, each device: {costs.flops / 1e12:.4g} TFLOP, {costs.bytes / 1e9:.4g} GB read and written, "
            f"{costs.main_memory / 1e9:.4g} GB to and from main memory"
            + (f" (loops of {loops} iterations counted in full)" if loops else "")
        )
    for each in step.collectives:
        print(f"{each.kind}: {each.executions}, {each.bytes / 1e6:.4g} MB of results on each device")
    print(f"compiled in {step.seconds:.0f} s")
    if HLO.value and step.text is None:
        print(f"--hlo {HLO.value}: not written, {UNPRINTABLE}")
    elif HLO.value and step.text is not None:
        with open(HLO.value, "w") as file:
            file.write(step.text)


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


def _cells(step, target) -> tuple[str, ...]:
    memory = step.memory
    moved = ", ".join(f"{each.kind} {each.bytes / 1e6:.4g} ({each.executions})" for each in step.collectives) or "none"
    counted: tuple[str, ...] = ("not known",) * 4
    if step.costs is not None:
        moved_bytes = (f"{each / 1e9:.4g}" for each in (step.costs.bytes, step.costs.main_memory))
        counted = (f"{step.costs.flops / 1e12:.4g}", *moved_bytes, moved)
    return (
        _mesh(step.mesh),
        _batch(step.batch),
        *(_gib(part) for part in (memory.arguments, memory.outputs, memory.temporaries)),
        f"{_gib(memory.total)} of {_gib(target.memory)}",
        *counted,
        f"{step.seconds:.0f} s",
    )


def _read(path: str, versions: str) -> dict[tuple[str, str], tuple[str, ...]]:
    """Rows of an existing table, if it was compiled with the same versions."""
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
        "# Cost of every full-scale recipe, compiled ahead of time",
        "",
        "    python scripts/compile_check.py --all --output docs/compiled.md",
        "",
        f"The training step of each recipe at its own global batch, compiled by {versions} with no TPU present, on "
        f"{os.cpu_count()} CPU cores, {time.strftime('%Y-%m-%d')}. All figures are for one chip and one step. Memory, in "
        "GiB, is the compiler's: arguments are the state and the chip's part of the batch, outputs are the results that "
        "do not reuse their memory. Operations and bytes are the compiler's own count, with a loop's body counted once "
        "per iteration. The traffic with main memory is counted from the program's text: without buffers that never leave "
        "the core's own memory, and with the padding of tiles, by which it may be above the compiler's count of all. "
        "Collectives are counted likewise, and sized by their results on one chip. Nothing here was "
        "run: no figure tells how long a step takes. The batch is the largest of the task.",
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
