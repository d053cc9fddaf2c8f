"""Writes a trained model for other programs: folded weights, or a StableHLO artefact with the weights inside.

    python scripts/export.py --workdir runs/vit --format safetensors --names timm --output vit_timm.safetensors
    python scripts/export.py --workdir runs/vit --format safetensors --names huggingface --output vit_huggingface/
    python scripts/export.py --workdir runs/vit --format stablehlo --output vit.stablehlo

The folder of the run, or a copy of it, is all that is needed. Prints the Python that opens what was written; see
docs/fine_tune_and_export.md.
"""

from absl import flags

from sigmarep import command
from sigmarep.errors import BadInput

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
AVERAGE = command.define_average_flag()
# A format that is asked for often and cannot be written, so that the refusal says why.
ONNX = "onnx"
FORMAT = flags.DEFINE_enum(
    "format", "safetensors", ("safetensors", "stablehlo", ONNX), "Kind of file; onnx is refused with the reason."
)
NAMES = flags.DEFINE_enum(
    "names", "sigmarep", ("sigmarep", "timm", "huggingface", "big_vision"), "Names of the arrays in safetensors."
)
OUTPUT = flags.DEFINE_string("output", None, "The file; with names of huggingface also a folder.")


def main() -> None:
    workdir, output = command.required("workdir", WORKDIR.value), command.required("output", OUTPUT.value)
    if FORMAT.value == ONNX:
        raise BadInput(
            "--format = onnx: expected safetensors or stablehlo; the converter that is kept, jax2onnx, needs an older "
            "orbax-checkpoint than this project"
        )
    from sigmarep import export
    from sigmarep.inference import open_run

    run = open_run(workdir, average=AVERAGE.value)
    if FORMAT.value == "stablehlo":
        lines = export.save_stablehlo(run, output)
    else:
        lines = export.save_weights(run, output, names=NAMES.value)
    for line in lines:
        print(line)


if __name__ == "__main__":
    command.run(main)
