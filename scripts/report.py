"""Writes a report of a run, a sweep or a folder of runs: one interactive HTML page that opens offline.

    python scripts/report.py runs/stability_vit --output report.html
    python scripts/report.py runs/a runs/b runs/c --output report.html [--plots 4] [--static pdf [--column double]]

The page shows loss against attention entropy of every layer and head, spectral norms and γ, sharpness and its threshold,
the sensitivity of sweeps to the learning rate, a table of all runs, differences between their configurations, and findings
in words. Runs may be unfinished. --static also writes pictures for papers, FILE_plots/*.pdf, which needs matplotlib:
pip install "sigmarep[report]".
"""

import os

from absl import flags

from sigmarep import command

OUTPUT = flags.DEFINE_string("output", None, "Path of the page, FILE.html.")
PLOTS = flags.DEFINE_integer("plots", 4, "Largest number of runs that are drawn one by one.", lower_bound=0)
STATIC = flags.DEFINE_enum("static", None, ["png", "svg", "pdf"], "Also writes static pictures into FILE_plots.")

COLUMN = flags.DEFINE_enum(
    "column", "single", ["single", "double"], "Width of the static pictures: 3.3 inches, or 6.9."
)


def main(folders: list[str]) -> None:
    output = command.required("output", OUTPUT.value)
    from sigmarep.diagnostics import report

    files = report.write(
        folders, output, most=PLOTS.value, jobs=os.cpu_count() or 1, static=STATIC.value, column=COLUMN.value
    )
    pictures = f", {len(files) - 1} pictures in {os.path.splitext(output)[0]}_plots" if STATIC.value else ""
    print(f"report: {files[0]}{pictures}")


if __name__ == "__main__":
    command.run(main, positional=True)
