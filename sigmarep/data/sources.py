"""Data sets by name, all through TFDS, as sources that can be read at any index.

Sets that packages bring are prepared on first use; the others by one command, which the error names. Reading never
needs TensorFlow.
"""

import difflib
import fcntl
import os
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from sigmarep.errors import BadInput


class Source(Protocol):
    """Random access to examples."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]: ...


class Description(NamedTuple):
    """`image_shape` (height, width, channels) has None where it varies; `splits` gives examples by split."""

    num_classes: int
    image_shape: tuple[int | None, ...]
    splits: dict[str, int]


# Builders of this project, by module.
OWN = {"digits": ("sigmarep.data.digits", "Digits")}
# Image sets of TFDS that the configurations name; any other name of TFDS works as well.
KNOWN = ("digits", "cifar10", "cifar100", "imagenette", "imagenet2012", "mnist", "fashion_mnist")


def data_folder(data_dir: str | None) -> str:
    """Where data sets lie: `data_dir`, else $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    return os.path.expanduser(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")


def builder(name: str, *, data_dir: str | None = None):
    """The prepared TFDS builder of a data set.

    Raises:
      BadInput: there is no such set, it is not prepared, or what is prepared cannot be read.
    """
    import tensorflow_datasets as tfds

    folder = data_folder(data_dir)
    if name in OWN:
        return _own(name, folder)
    try:
        return (
            tfds.builder(name, data_dir=folder, try_gcs=False) if _is_prepared(name, folder) else _missing(name, folder)
        )
    except BadInput:
        raise
    except Exception as error:
        raise BadInput(_damaged(name, folder, error)) from error


def prepare(name: str, *, data_dir: str | None = None) -> str:
    """Prepares a data set as array_record files and returns its folder.

    Raises:
      BadInput: there is no such set, TensorFlow is needed and missing, or a file must be fetched by hand.
    """
    folder = data_folder(data_dir)
    if name in OWN:
        return str(_own(name, folder).data_dir)
    import tensorflow_datasets as tfds

    try:
        found = tfds.builder(name, data_dir=folder, file_format="array_record")
    except tfds.core.registered.DatasetNotFoundError:
        raise BadInput(_unknown(name)) from None
    try:
        found.download_and_prepare()
    except ImportError as error:
        raise BadInput(
            f'--name {name}: preparing it needs TensorFlow; pip install "sigmarep[tf]" ({_line(error)})'
        ) from error
    except Exception as error:
        raise BadInput(f"--name {name}: could not be prepared ({_line(error)})") from error
    return str(found.data_dir)


def open_source(name: str, split: str, *, data_dir: str | None = None) -> Source:
    """The examples of a split; TFDS's slices such as "train[:90%]" are splits too.

    Raises:
      BadInput: see `builder`; or there is no such split.
    """
    found = builder(name, data_dir=data_dir)
    if split.split("[")[0] not in found.info.splits:
        raise BadInput(
            f"config.data: {name} has no split {split!r}; expected one of {', '.join(found.info.splits)}, "
            "or a slice such as train[:90%]"
        )
    try:
        source = found.as_data_source(split)
        source[0]
    except Exception as error:
        raise BadInput(_damaged(name, data_folder(data_dir), error)) from error
    return source


def describe(name: str, *, data_dir: str | None = None) -> Description:
    """What the data set says of itself.

    Raises:
      BadInput: see `builder`; or it has no images with labels.
    """
    info = builder(name, data_dir=data_dir).info
    features = info.features
    if not {"image", "label"} <= set(features):
        raise BadInput(f"config.data.name = {name!r}: has no image and label; its features are {', '.join(features)}")
    splits = {split: details.num_examples for split, details in info.splits.items()}
    return Description(features["label"].num_classes, tuple(features["image"].shape), splits)


def _own(name: str, folder: str):
    import importlib

    module, attribute = OWN[name]
    made = getattr(importlib.import_module(module), attribute)
    try:
        os.makedirs(folder, exist_ok=True)
        # Two processes may start at once on a machine that has nothing yet.
        with open(os.path.join(folder, f".{name}.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = made(data_dir=folder, file_format="array_record")
            if not found.is_prepared():
                import tensorflow_datasets as tfds

                tfds.disable_progress_bar()
                found.download_and_prepare()
    except BadInput:
        raise
    except OSError as error:
        raise BadInput(
            f"config.data.data_dir = {folder!r}: cannot be written ({error.strerror}); set another with "
            "--config.data.data_dir"
        ) from error
    except Exception as error:
        raise BadInput(_damaged(name, folder, error)) from error
    return found


def _is_prepared(name: str, folder: str) -> bool:
    path = os.path.join(folder, *name.split(":")[0].split("/"))
    return any("dataset_info.json" in files for _, _, files in os.walk(path))


def _missing(name: str, folder: str):
    import tensorflow_datasets as tfds

    if name not in KNOWN and name not in tfds.list_builders(with_community_datasets=False):
        raise BadInput(_unknown(name))
    raise BadInput(
        f"config.data.name = {name!r}: is not prepared under {folder}; "
        f"run: python scripts/prepare_data.py --name {name} --data_dir {folder}"
    )


def _unknown(name: str) -> str:
    close = difflib.get_close_matches(name, KNOWN, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(KNOWN)} and every name of TFDS"
    return f"config.data.name = {name!r}: there is no such data set; {hint}"


def _damaged(name: str, folder: str, error: Exception) -> str:
    return (
        f"config.data.name = {name!r}: what is prepared in {os.path.join(folder, name)} cannot be read ({_line(error)}); "
        "delete that folder and prepare it again"
    )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
