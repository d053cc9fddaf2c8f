"""Runs notebooks in this process and stores what their cells show, without Jupyter.

    python docs/notebooks/run.py docs/notebooks/*.ipynb

Each notebook runs in an empty folder, as a reader's would in a new one. Stored are printed text, the value of a cell's last
line, and matplotlib's figures as PNG. A value whose HTML has more than 100 kB, as the page of a report, is stored as a line
of text.
"""

import ast
import base64
import contextlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

LARGEST = 100_000


def run(path: str, folder: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Executes the code cells of a notebook in `folder`.

    Returns:
      The notebook with its new outputs, and the names that its cells have defined.
    """
    import matplotlib

    matplotlib.use("agg")
    with open(path, encoding="utf-8") as file:
        notebook = json.load(file)
    names: dict[str, Any] = {"__name__": "__main__"}
    number = 0
    with contextlib.chdir(folder):
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                number += 1
                cell["execution_count"] = number
                cell["outputs"] = _outputs("".join(cell["source"]), names, number)
    return notebook, names


def _outputs(source: str, names: dict[str, Any], number: int) -> list[dict[str, Any]]:
    from matplotlib import pyplot

    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        parsed = ast.parse(source)
        last = parsed.body.pop() if parsed.body and isinstance(parsed.body[-1], ast.Expr) else None
        exec(compile(parsed, f"cell {number}", "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), names)
    # As in Jupyter a semicolon at the end hides the value.
    value = None if source.rstrip().endswith(";") else value
    outputs: list[dict[str, Any]] = []
    if printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": _lines(printed.getvalue())})
    if value is not None:
        outputs.append(
            {"output_type": "execute_result", "execution_count": number, "metadata": {}, "data": _data(value)}
        )
    for each in pyplot.get_fignums():
        buffer = io.BytesIO()
        pyplot.figure(each).savefig(buffer, format="png", dpi=72, bbox_inches="tight")
        image = base64.b64encode(buffer.getvalue()).decode()
        outputs.append({"output_type": "display_data", "metadata": {}, "data": {"image/png": image}})
    pyplot.close("all")
    return outputs


def _data(value: Any) -> dict[str, Any]:
    html = value._repr_html_() if hasattr(value, "_repr_html_") else ""
    if len(html) > LARGEST:
        return {"text/plain": [f"(a page of {len(html) // 1000} kB: shown where the notebook is run)"]}
    return {"text/plain": _lines(repr(value))} | ({"text/html": _lines(html)} if html else {})


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def main(paths: Sequence[str]) -> None:
    for path in paths:
        with tempfile.TemporaryDirectory() as folder:
            notebook, _ = run(os.path.abspath(path), folder)
        with open(path, "w", encoding="utf-8") as file:
            json.dump(notebook, file, indent=1, ensure_ascii=False)
            file.write("\n")
        print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
