"""The configuration of an earlier run as a configuration file, for `--config RUN/config.json`."""

import os

from sigmarep.errors import BadInput


def get_config(path=""):
    """The configuration that the run in the folder of `path`, its config.json, was made with."""
    if os.path.basename(path) != "config.json":
        raise BadInput(f"--config {path}: expected a configuration file of Python, or the config.json of a run")
    # Here, not above: commands that make no run of a stored configuration need no trainer.
    from sigmarep.training.restore import restored_config

    return restored_config(os.path.dirname(path) or ".")
