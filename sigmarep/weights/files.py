"""Files of weights, read as data: safetensors, npz, and folders of Orbax or of transformers. Nothing is unpickled."""

import hashlib
import json
import os
import zipfile
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from sigmarep.errors import BadInput, one_line
from sigmarep.files import read_json

FIELD = "config.init_from.path"
# Files of a folder that transformers has saved.
SAVED, INDEX = "model.safetensors", "model.safetensors.index.json"
# Files that Orbax writes into the folder of a checkpoint.
ORBAX = ("_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt", "_sharding")
CONVERT = (
    'python -c "import torch, sys; from safetensors.torch import save_file as s; w = torch.load(sys.argv[1], '
    "weights_only=True); s({k: v.contiguous().clone() for k, v in w.get('model', w).items()}, sys.argv[2])\""
)


def read(path: str) -> dict[str, np.ndarray]:
    """The arrays of a file or folder by name; names of nested ones are joined by "/".

    Raises:
      BadInput: there is none, it is of another kind, not whole, or a pickle.
    """
    try:
        return _read_folder(path) if os.path.isdir(path) else _read_file(path)
    except FileNotFoundError as error:
        raise BadInput(f"{FIELD} = {path!r}: there is no {error.filename or 'such file'}") from None
    except OSError as error:
        raise BadInput(f"{FIELD} = {path!r}: cannot be read ({error.strerror or one_line(error)})") from None
    except ValueError as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{FIELD} = {path!r}: cannot be read ({one_line(error)})") from None


def digest(path: str) -> str:
    """SHA-256 of a file, or of the names and contents of all files in a folder, in hexadecimal digits."""
    if not os.path.isdir(path):
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    names = sorted(
        os.path.relpath(os.path.join(folder, name), path) for folder, _, all in os.walk(path) for name in all
    )
    whole = hashlib.sha256()
    for name in names:
        whole.update(f"{name}\0{digest(os.path.join(path, name))}\n".encode())
    return whole.hexdigest()


def flattened(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of nested mappings and sequences by "/"-joined name."""
    if isinstance(tree, Mapping):
        items = [(str(name), value) for name, value in tree.items()]
    elif isinstance(tree, list | tuple):
        items = [(str(number), value) for number, value in enumerate(tree)]
    else:
        return {prefix.removesuffix("/"): tree}
    return {path: leaf for name, value in items for path, leaf in flattened(value, f"{prefix}{name}/").items()}


def _read_file(path: str) -> dict[str, np.ndarray]:
    if os.path.lexists(path) and not os.path.isfile(path):
        raise ValueError("it is no file")
    with open(path, "rb") as file:
        start = file.read(2)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if not all(name.endswith(".npy") for name in names):
            raise BadInput(_pickled(path))
        return _read_npz(path)
    # The protocol of a pickle is told by its first two bytes.
    if start[:1] == b"\x80" and not path.endswith(".safetensors"):
        raise BadInput(_pickled(path))
    return _read_safetensors(path)


def _read_safetensors(path: str) -> dict[str, np.ndarray]:
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"it is no safetensors file that is whole: {one_line(error)}") from None


def _pickled(path: str) -> str:
    return (
        f"{FIELD} = {path!r}: is a pickle, which runs whatever code it holds and is never opened here; convert it once, "
        f"where you trust it: {CONVERT} IN OUT.safetensors"
    )


def _read_npz(path: str) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    # NumPy itself has no bfloat16.
    return {name: x.view(ml_dtypes.bfloat16) if x.dtype == np.dtype("V2") else x for name, x in arrays.items()}


def _read_folder(path: str) -> dict[str, np.ndarray]:
    if os.path.exists(os.path.join(path, INDEX)):
        return _read_shards(path)
    if os.path.exists(os.path.join(path, SAVED)):
        return _read_safetensors(os.path.join(path, SAVED))
    if any(os.path.exists(os.path.join(path, name)) for name in ORBAX):
        return _read_orbax(path)
    raise BadInput(
        f"{FIELD} = {path!r}: expected a workdir, a checkpoint of Orbax, or a folder with {SAVED}; this one has "
        f"{', '.join(sorted(os.listdir(path))[:5]) or 'nothing'}"
    )


def _read_shards(path: str) -> dict[str, np.ndarray]:
    index = read_json(os.path.join(path, INDEX))
    try:
        names = sorted({os.path.basename(name) for name in index["weight_map"].values()})
    except (AttributeError, KeyError, TypeError):
        raise ValueError(f"{INDEX} names no files") from None
    return {key: x for name in names for key, x in _read_safetensors(os.path.join(path, name)).items()}


def _read_orbax(path: str) -> dict[str, np.ndarray]:
    import jax
    import orbax.checkpoint as ocp

    path = os.path.abspath(path)
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            tree = checkpointer.metadata(path).item_metadata
            tree = getattr(tree, "tree", tree)
            restore = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            restored = checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=restore))
    except Exception as error:
        # Orbax raises errors of its own and of the array store.
        raise ValueError(one_line(error)) from error
    leaves = flattened(restored)
    return {name: np.asarray(x) for name, x in leaves.items() if isinstance(x, np.ndarray | np.generic | jax.Array)}


def as_json(value: Any) -> bytes:
    """The text of a JSON file."""
    return json.dumps(value, indent=2).encode() + b"\n"
