"""Random-access data sets by name, from TFDS or from a user's function (`supplied`).

Data sets that come with packages are prepared on first use; others by one command, which the error names. Reading never
needs TensorFlow.
"""

import contextlib
import difflib
import errno
import functools
import hashlib
import importlib
import importlib.util
import inspect
import json
import os
import re
import shutil
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from sigmarep import doors
from sigmarep.data import prepared, supplied
from sigmarep.errors import BadInput, one_line
from sigmarep.fields import field
from sigmarep.files import locked

# Fields of `config.data` that every task's data have; each declares its own default set as `name`.
FIELDS: dict[str, Any] = {
    "name": field("", "Data set: a name of sigmarep.data.sources or of TFDS, or a dotted Python name."),
    "data_dir": field(
        None,
        "Folder of prepared data sets; $TFDS_DATA_DIR, then ~/tensorflow_datasets, if None.",
        kind=str,
        optional=True,
    ),
    "train_split": field("train", "Split to train on; a slice such as train[:90%] is one too."),
    "eval_splits": field(("test",), "Splits to evaluate; () evaluates none.", order="each once"),
    "num_threads": field(2, "Threads that read and transform examples.", at_least=1, at_most=1024),
}


class Source(Protocol):
    """Random access to examples."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]: ...


class Description(NamedTuple):
    """A data set of images with classes.

    Attributes:
      num_classes: number of classes.
      image_shape: (height, width, channels), with None for sizes that vary.
      splits: number of examples by split.
      class_names: in the order of the labels; () if unknown.
      full_name: name with variant and version; "" if unknown.
      summary: one line on the files of a folder, those that were left out among them; "" for other data sets.
    """

    num_classes: int
    image_shape: tuple[int | None, ...]
    splits: dict[str, int]
    class_names: tuple[str, ...] = ()
    full_name: str = ""
    summary: str = ""


# Modules and classes of this project's builders.
OWN = {
    "digits": ("sigmarep.data.datasets.digits", "Digits"),
    "mnist5k": ("sigmarep.data.datasets.mnist5k", "Mnist5k"),
    "fashion_mnist_package": ("sigmarep.data.datasets.fashion", "FashionMnistPackage"),
    "python_docs": ("sigmarep.data.datasets.python_docs", "PythonDocs"),
    "gcide": ("sigmarep.data.datasets.gcide", "Gcide"),
    "interface_en_de": ("sigmarep.data.datasets.interface_en_de", "InterfaceEnDe"),
    "libreoffice_help_en_de": ("sigmarep.data.datasets.libreoffice_help", "LibreofficeHelpEnDe"),
    "spoken_sentences": ("sigmarep.data.datasets.spoken_sentences", "SpokenSentences"),
    "stamp_recordings": ("sigmarep.data.datasets.stamp_recordings", "StampRecordings"),
}
# Builders whose content is a folder of the user's files.
FOLDERS = {
    "text_folder": ("sigmarep.data.datasets.text_folder", "TextFolder"),
    "speech_folder": ("sigmarep.data.datasets.speech_folder", "SpeechFolder"),
    "image_folder": ("sigmarep.data.datasets.image_folder", "ImageFolder"),
}
# Reasons for which a folder cannot be written.
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)
NAME = re.compile(r"[A-Za-z]\w*(/[\w.+-]+)?(:\d+\.\d+\.\d+)?")
# File formats of TFDS with random access.
RANDOM_ACCESS = {"array_record", "parquet"}
# Data sets of TFDS whose preparation decodes audio files.
SPOKEN = ("librispeech", "tedlium")
# Names that errors suggest; every other name of TFDS works as well.
KNOWN = (
    *OWN,
    *FOLDERS,
    *("cifar10", "cifar100", "imagenette", "imagenet2012", "mnist", "fashion_mnist"),
    *("wmt17_translate", "lm1b", "c4"),
    *SPOKEN,
)


PUBLISHED = {
    "imagenet2012": Description(1000, (None, None, 3), {"train": 1_281_167, "validation": 50_000}),
    "cifar10": Description(10, (32, 32, 3), {"train": 50_000, "test": 10_000}),
    "cifar100": Description(100, (32, 32, 3), {"train": 50_000, "test": 10_000}),
    "digits": Description(10, (8, 8, 1), {"train": 1_437, "test": 360}),
    "fashion_mnist_package": Description(10, (28, 28, 1), {"train": 60_000, "test": 10_000}),
}


def data_folder(data_dir: str | None) -> str:
    """Folder of data sets: `data_dir`, else $TFDS_DATA_DIR, else ~/tensorflow_datasets.

    Raises:
      BadInput: it begins with ~, and no home folder is known.
    """
    folder = os.path.expanduser(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")
    if folder.startswith("~"):
        raise BadInput(
            f"config.data.data_dir = {data_dir!r}: {folder.split('/')[0]} is no known home folder; set $HOME, "
            "$TFDS_DATA_DIR or --config.data.data_dir"
        )
    return folder


def builder(name: str, *, data_dir: str | None = None, folder: str = "", **options: Any):
    """Returns the prepared TFDS builder of a data set.

    Args:
      name: name of the data set, `dataset[/variant][:version]`; without a version the newest prepared one is taken.
      data_dir: see `data_folder`.
      folder: files of "text_folder", "speech_folder" and "image_folder" (see the modules of these names).
      **options: further arguments of their builders, such as `held_out` of "image_folder"; other data sets ignore them.

    Raises:
      BadInput: there is no such data set, it is not prepared, or the prepared files cannot be read.
    """
    root = data_folder(data_dir)
    if "://" in root:
        raise BadInput(f"config.data.data_dir = {root!r}: expected a folder; mount the bucket, as docs/data.md shows")
    place = os.path.join(root, name.partition(":")[0])
    try:
        if _is_own(name) or name in FOLDERS or doors.is_dotted(name):
            dataset = _own(name, root, folder, options)
        else:
            # Reads the folder alone: TFDS's own code for the data set may need TensorFlow or have another version.
            if not NAME.fullmatch(name):
                raise BadInput(_unknown(name))
            dataset = prepared.opened(prepared.newest(name, root) or _missing(name, root))
        place = str(dataset.data_dir)
        if not dataset.info.splits:
            raise ValueError("its dataset_info.json is missing or names no splits")
    except BadInput:
        raise
    except Exception as error:
        raise BadInput(_damaged(name, place, error)) from error
    formats = sorted(each.value for each in dataset.info.available_file_formats())
    if not set(formats) & RANDOM_ACCESS:
        raise BadInput(
            f"config.data.name = {name!r}: is prepared in {dataset.data_dir} as {', '.join(formats)}, which has no random "
            f"access; run: tfds convert_format --dataset_version_dir={dataset.data_dir} --out_file_format=array_record"
        )
    return dataset


def prepare(name: str, *, data_dir: str | None = None) -> str:
    """Prepares a data set as array_record files and returns its folder.

    Raises:
      BadInput: there is no such data set, a program or package is missing, or a file must be downloaded by hand.
    """
    root = data_folder(data_dir)
    if _is_own(name):
        return str(_own(name, root).data_dir)
    import tensorflow_datasets as tfds

    try:
        dataset = tfds.builder(name, data_dir=root, file_format="array_record")
    except tfds.core.registered.DatasetNotFoundError:
        raise BadInput(_unknown(name)) from None
    # Checked here because some data sets would fail only after hours of downloading.
    if not dataset.is_prepared() and importlib.util.find_spec("tensorflow") is None:
        raise BadInput(f'--name {name}: preparing it needs TensorFlow; pip install "sigmarep[tf]"')
    if name.split("/")[0] in SPOKEN and not dataset.is_prepared():
        if importlib.util.find_spec("pydub") is None:
            raise BadInput(f'--name {name}: preparing it needs pydub; pip install "sigmarep[tf]"')
        if shutil.which("ffmpeg") is None:
            raise BadInput(f"--name {name}: preparing it needs the program ffmpeg; apt-get install ffmpeg")
    try:
        dataset.download_and_prepare()
    except Exception as error:
        raise BadInput(f"--name {name}: could not be prepared ({one_line(error)})") from error
    builder(name, data_dir=root)
    return str(dataset.data_dir)


def open_source(name: str, split: str, *, data_dir: str | None = None, folder: str = "", **options: Any) -> Source:
    """Opens the examples of a split, which may be a TFDS expression such as "train[:90%]" or "train+test".

    Pictures are uint8 (height, width, 1 or 3), decoded by `sigmarep.data.images.files`. Arguments as of `builder`.

    Raises:
      BadInput: see `builder`; or there is no such split, or it is empty.
    """
    if is_supplied(name):
        return supplied.open_source(name, split, data_dir=data_dir, folder=folder)
    dataset = builder(name, data_dir=data_dir, folder=folder, **options)
    splits = dataset.info.splits
    try:
        count = splits[split].num_examples
    except Exception:
        count = 0
    if not count:
        examples = ", ".join(f"{each} {details.num_examples}" for each, details in splits.items())
        raise BadInput(
            f"config.data: {name} has no split {split!r}; expected one of {', '.join(splits)}, "
            f"or a slice such as train[:90%] that holds an example (examples: {examples})"
        )
    try:
        source = _opened(dataset, split, name)
        source[0]
    except BadInput:
        raise
    except Exception as error:
        raise BadInput(_damaged(name, str(dataset.data_dir), error)) from error
    return source


def _opened(dataset: Any, split: str, name: str) -> Source:
    from sigmarep.data.images import stored

    pictures = stored.picture_features(dataset.info.features)
    return stored.DecodedPictures(dataset, split, pictures, name) if pictures else dataset.as_data_source(split)


def fingerprint(name: str, split: str, *, data_dir: str | None = None, folder: str = "", **options: Any) -> str:
    """Fingerprint of the examples of a split; it differs between versions, files and splits. Arguments as of `builder`.

    Raises:
      BadInput: see `builder`.
    """
    if is_supplied(name):
        return supplied.fingerprint(name, split, open_source(name, split, data_dir=data_dir, folder=folder))
    info = builder(name, data_dir=data_dir, folder=folder, **options).info
    sizes = {each: (details.num_examples, details.num_bytes) for each, details in info.splits.items()}
    return hashlib.sha256(f"{info.full_name}|{split}|{sorted(sizes.items())}".encode()).hexdigest()


def sample_rate(name: str, feature: str, *, data_dir: str | None = None, folder: str = "") -> int | None:
    """Sample rate of a data set's audio in Hz, None if unknown; this project's own data sets have 16,000.

    Raises:
      BadInput: see `builder`.
    """
    if _is_own(name) or name in FOLDERS:
        return 16_000
    if is_supplied(name):
        return getattr(supplied.load(name), "sample_rate", None)
    directory = str(builder(name, data_dir=data_dir, folder=folder).data_dir)
    with open(os.path.join(directory, "features.json")) as file:
        features = json.load(file).get("featuresDict", {}).get("features", {})
    return int(features.get(feature, {}).get("audio", {}).get("sampleRate", 0)) or None


def is_supplied(name: str) -> bool:
    """True if the data set comes from a user's function."""
    return doors.is_dotted(name) and not _is_builder(supplied.load(name))


def describe(name: str, *, data_dir: str | None = None, folder: str = "", **options: Any) -> Description:
    """Describes a prepared data set of images; arguments as of `builder`.

    Raises:
      BadInput: see `builder`; or it has no images with labels.
    """
    if is_supplied(name):
        classes = supplied.class_names(name)
        return Description(len(classes), (None, None, None), {}, classes, name)
    dataset = builder(name, data_dir=data_dir, folder=folder, **options)
    info, features = dataset.info, dataset.info.features
    if not {"image", "label"} <= set(features) or not hasattr(features["label"], "num_classes"):
        raise BadInput(
            f"config.data.name = {name!r}: has no image with one class as its label; its features are "
            f"{', '.join(features)}"
        )
    splits = {split: details.num_examples for split, details in info.splits.items()}
    label = features["label"]
    return Description(
        num_classes=label.num_classes,
        image_shape=tuple(features["image"].shape),
        splits=splits,
        class_names=tuple(map(str, label.names)),
        full_name=info.full_name,
        summary=dataset.summary() if name == "image_folder" else "",
    )


def published(name: str, *, data_dir: str | None = None, folder: str = "", **options: Any) -> Description:
    """Describes a well-known data set by published figures, without preparing it; any other by `describe`.

    The classes of "image_folder" without a folder are made up.

    Raises:
      BadInput: see `describe`.
    """
    if name == "image_folder" and not folder:
        return Description(10, (None, None, 3), {})
    return PUBLISHED.get(name) or describe(name, data_dir=data_dir, folder=folder, **options)


def _is_builder(opener: Any) -> bool:
    import tensorflow_datasets as tfds

    return isinstance(opener, type) and issubclass(opener, tfds.core.DatasetBuilder)


def _is_own(name: str) -> bool:
    """True for a builder of this project, with or without a variant, but not for a name with a version."""
    return name.split("/")[0] in OWN and ":" not in name


def _own(name: str, root: str, folder: str = "", options: Mapping[str, Any] | None = None):
    if doors.is_dotted(name):
        make = supplied.load(name)
        if "folder" in inspect.signature(make).parameters:
            make = functools.partial(make, folder=folder)
    else:
        base, _, variant = name.partition("/")
        module, attribute = {**OWN, **FOLDERS}[base]
        make = getattr(importlib.import_module(module), attribute)
        variants = [config.name for config in make.BUILDER_CONFIGS]
        if variant not in (variants or [""]):
            expected = ", ".join(f"{base}/{each}" for each in variants) or base
            raise BadInput(f"config.data.name = {name!r}: there is no such variant; expected one of {expected}")
        if variants:
            make = functools.partial(make, config=variant)
        if base in FOLDERS:
            make = functools.partial(make, folder=folder, **(options or {}))
    dataset = make(data_dir=root, file_format="array_record")
    if dataset.is_prepared():
        return dataset
    with contextlib.ExitStack() as stack:
        try:
            # Several processes may want to prepare it at once.
            stack.enter_context(locked(os.path.join(root, f".{name.replace('/', '-')}")))
        except OSError as error:
            raise BadInput(_unwritable(root, error)) from error
        dataset = make(data_dir=root, file_format="array_record")
        if not dataset.is_prepared():
            _prepare(dataset, name, root)
    return dataset


def _prepare(dataset: Any, name: str, root: str) -> None:
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    try:
        dataset.download_and_prepare()
    except BadInput:
        raise
    except OSError as error:
        if error.errno in UNWRITABLE:
            raise BadInput(_unwritable(root, error)) from error
        raise BadInput(f"config.data.name = {name!r}: could not be prepared ({one_line(error)})") from error
    except Exception as error:
        raise BadInput(f"config.data.name = {name!r}: could not be prepared ({one_line(error)})") from error


def _unwritable(root: str, error: OSError) -> str:
    return f"config.data.data_dir = {root!r}: cannot be written ({error.strerror}); set another with --config.data.data_dir"


def _missing(name: str, folder: str):
    import tensorflow_datasets as tfds

    dataset = re.split("[/:]", name)[0]
    if dataset not in KNOWN and dataset not in tfds.list_builders(with_community_datasets=False):
        raise BadInput(_unknown(name))
    raise BadInput(
        f"config.data.name = {name!r}: is not prepared under {folder}; "
        f"run: python scripts/prepare_data.py --name {name} --data_dir {folder}"
    )


def _unknown(name: str) -> str:
    close = difflib.get_close_matches(name, KNOWN, n=1, cutoff=0.7)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return (
        f"config.data.name = {name!r}: there is no such data set; {hint}expected one of {', '.join(KNOWN)}, another name "
        "of TFDS, or a dotted Python name (package.module:function)"
    )


def _damaged(name: str, place: str, error: Exception) -> str:
    """The message for a prepared data set in the folder `place` that raised `error`."""
    if isinstance(error, PermissionError):
        return f"config.data.name = {name!r}: the data set in {place} cannot be read ({one_line(error)})"
    if doors.is_dotted(name) and not os.path.isdir(place):
        return f"config.data.name = {name!r}: fails ({type(error).__name__}: {one_line(error)})"
    return (
        f"config.data.name = {name!r}: the data set in {place} cannot be read ({one_line(error)}); delete that folder and "
        "prepare it again"
    )
