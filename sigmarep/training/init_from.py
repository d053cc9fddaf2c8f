"""`config.init_from`: a run that begins from weights in place of random numbers.

The weights are read once, before the first step; the state of step 0 is the run's first checkpoint, and the digest of the
file stands in `init_from.json` in the workdir. So a run that resumes needs the file no more.
"""

import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from sigmarep import doors, tasks
from sigmarep.errors import BadInput, one_line
from sigmarep.fields import field
from sigmarep.nn import fold
from sigmarep.nn.layers import Layers
from sigmarep.training.checkpoint_files import check_path
from sigmarep.training.mesh import path_name
from sigmarep.weights import files, load, names

# Their record in the folder of a run.
FILE = "init_from.json"
FIELDS: dict[str, Any] = {
    "path": field(
        "",
        "Weights to begin from: a workdir, a safetensors or npz file, a folder of Orbax or of transformers; none: random.",
    ),
    "names": field(
        "auto",
        "Whose names its arrays have; auto: told by them. A Python name: a function from the arrays by name to arrays by "
        "the paths of this project's plain parameters.",
        choices=("auto", "sigmarep", *names.NAMES),
        also=doors.is_dotted,
        also_doc="or a dotted Python name",
    ),
    "skip": field((), "Paths of parameters that begin at random all the same, as ^head/.", pattern=True),
}


class Start(NamedTuple):
    """Weights to begin from.

    Attributes:
      params: by path, as `sigmarep.weights.load.begin` takes them.
      lines: account for every parameter of the model and every array of the file.
      files: the record of it, for the workdir.
    """

    params: dict[str, np.ndarray]
    lines: tuple[str, ...]
    files: dict[str, bytes]


def read(config: ml_collections.FrozenConfigDict, layers: Layers) -> Start:
    """The weights of `config.init_from` for the model of these layers.

    Raises:
      BadInput: the file is missing, not whole, a pickle, or of another model.
    """
    path, word = config.init_from.path, config.init_from.names
    arrays, about = _of_workdir(path) if _is_workdir(path) else _of_file(path)
    renamed: Callable[..., Mapping[str, np.ndarray]] | None = None
    if doors.is_dotted(word):
        renamed = doors.load(word, field="config.init_from.names")
    elif word == "auto":
        word = names.detected(arrays)
    weights = load.fit(arrays, layers, word=word, path=path, skip=config.init_from.skip, renamed=renamed)
    title = f"weights of {path} (names of {word}, sha256 {about['fingerprint'][:12]}):"
    record = {
        "path": os.path.abspath(path),
        **about,
        "names": word,
        "loaded": sorted(weights.params),
        "at_start": weights.at_start,
        "unused": weights.unused,
        "notes": weights.notes,
    }
    return Start(weights.params, (title, *weights.table()), {FILE: files.as_json(record)})


def _is_workdir(path: str) -> bool:
    return os.path.exists(os.path.join(path, "config.json")) and os.path.isdir(os.path.join(path, "checkpoints"))


def _of_file(path: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    arrays = files.read(path)
    try:
        return arrays, {"fingerprint": files.digest(path)}
    except OSError as error:
        raise BadInput(f"{files.FIELD} = {path!r}: cannot be read ({error.strerror or one_line(error)})") from None


def _of_workdir(folder: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Folded parameters of the newest checkpoint of a run, the averaged ones if it kept an average."""
    # It imports the trainer's own modules.
    from sigmarep.training.restore import restore

    check_path(folder)
    try:
        restored = restore(None, folder)
    except BadInput as error:
        raise BadInput(f"{files.FIELD} = {folder!r}: {error}") from error
    plain = fold(_on_host(restored.variables), layers=tasks.describe_layers(restored.task))
    leaves = jax.tree_util.tree_leaves_with_path(plain)
    arrays = {path_name(path): np.asarray(leaf) for path, leaf in leaves}
    checkpoint = os.path.join(folder, "checkpoints", str(restored.step))
    return arrays, {"fingerprint": files.digest(checkpoint), "step": restored.step}


def _on_host(variables: Any) -> Any:
    if jax.process_count() == 1:
        return jax.device_get(variables)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(variables, tiled=True)
