"""The command `sigmarep`: the scripts of this project by their names, also where only the package is installed.

    sigmarep train --config quickstart --workdir runs/quickstart
    sigmarep report runs/quickstart --output report.html
    sigmarep train --help

`sigmarep NAME` is `python scripts/NAME.py`, with the same flags and exit statuses. `--config` takes the name of a
configuration that comes with the package, such as quickstart or vit/cifar10, as well as the path of a file.
"""

import ast
import pathlib
import runpy
import sys

import sigmarep
from sigmarep.files import shipped

# Shown first by --help, in this order; every other script can be named too.
COMMANDS = (
    "train",
    "evaluate",
    "sweep",
    "report",
    "watch",
    "export",
    "classify",
    "generate",
    "translate",
    "transcribe",
    "prepare_data",
    "train_vocabulary",
    "choose_decoding",
    "archive_sweep",
    "sensitivity",
    "best_rates",
    "stable_rates",
    "robustness",
    "compile_check",
)


def scripts() -> dict[str, pathlib.Path]:
    """The files of the commands by name."""
    return {path.stem: path for path in sorted(pathlib.Path(shipped("scripts")).glob("*.py"))}


def usage(files: dict[str, pathlib.Path]) -> str:
    """The list of the commands, each with the first line of its file's docstring."""
    lines = ["sigmarep COMMAND [flags]; sigmarep COMMAND --help shows the flags.", ""]
    for name in (name for name in COMMANDS if name in files):
        docstring = ast.get_docstring(ast.parse(files[name].read_text(encoding="utf-8"))) or ""
        lines.append(f"  {name:18}{docstring.partition(chr(10))[0]}")
    others = [
        name for name in files if name not in COMMANDS and not name.startswith(("benchmark_", "check_", "stress_"))
    ]
    return "\n".join([*lines, "", f"Experiments: {', '.join(others)}"])


def main() -> None:
    files = scripts()
    name = sys.argv[1].replace("-", "_") if len(sys.argv) > 1 and not sys.argv[1].startswith("-") else ""
    if sys.argv[1:2] == ["--version"]:
        print(f"sigmarep {sigmarep.__version__}")
    elif name in files:
        del sys.argv[1]
        try:
            runpy.run_path(str(files[name]), run_name="__main__")
        except ModuleNotFoundError as error:
            if str(error.name).startswith("sigmarep"):
                raise
            print(f'sigmarep {name}: needs the package {error.name}: pip install "sigmarep[train]"', file=sys.stderr)
            sys.exit(2)
    elif name:
        print(f"sigmarep: {sys.argv[1]!r}: expected one of {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    else:
        print(usage(files))


if __name__ == "__main__":
    main()
