"""Pages and pictures of runs, made from their files; nothing here steers a training."""

from typing import Any


def show(*workdirs: str, plots: int = 4, height: int = 900) -> Any:
    """The interactive page of runs as the output of a notebook's cell: `show("runs/a")`.

    Args:
      workdirs: runs, sweeps, or folders of runs.
      plots: largest number of runs that are drawn one by one.
      height: of the frame in pixels.

    Raises:
      BadInput: no folder has a run.
    """
    # Here, not above: importing the package reads no run.
    from sigmarep.diagnostics import notebook, report

    return notebook.Page(report.page(workdirs, most=plots), height=height)
