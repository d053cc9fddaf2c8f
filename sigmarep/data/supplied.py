"""A data set that a function of the user's gives: `config.data.name = "my_package.my_data:open_split"`.

The function is called as `open_split(split)`, with `data_dir` and `folder` of `config.data` too if it takes them by these
names, and returns a sequence of examples: `len(source)` of them, `source[i]` a mapping from features to arrays or text,
the same at every reading. Pictures with classes are the features `image`, uint8 (height, width, channels), and `label`.

The function may have the attributes `class_names`, of the labels in their order, which pictures with classes need, and
`sample_rate`, of audio in Hz. A source may have `fingerprint`, text that names its examples, for which some of them stand
otherwise.

A class is such a function; one of TFDS's builders is opened as TFDS's own sets are (`sigmarep.data.sources`).
"""

import hashlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from sigmarep import doors
from sigmarep.errors import BadInput

# So many examples, evenly spread, stand for all in a fingerprint.
SAMPLED = 64


def load(name: str) -> Callable[..., Any]:
    """The function or the class of TFDS's that a dotted name stands for.

    Raises:
      BadInput: there is none.
    """
    opener = doors.load(name, field="config.data.name")
    if not callable(opener):
        raise BadInput(
            f"config.data.name = {name!r}: is a {type(opener).__name__}; expected a function that is given a split and "
            "returns its examples, or a class of TFDS's"
        )
    return opener


def open_source(name: str, split: str, *, data_dir: str | None, folder: str) -> Any:
    """The examples of a split.

    Raises:
      BadInput: the function fails, or what it returns is no sequence of examples, or is empty.
    """
    opener = load(name)
    options = {"data_dir": data_dir, "folder": folder}
    taken = inspect.signature(opener).parameters
    try:
        source = opener(split, **{option: value for option, value in options.items() if option in taken})
        example = source[0] if len(source) else None
    except BadInput:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        raise BadInput(
            f"config.data.name = {name!r}: fails to open the split {split!r} ({type(error).__name__}: {text})"
        ) from error
    if not isinstance(example, Mapping):
        problem = "is empty" if example is None else f"has examples of type {type(example).__name__}"
        raise BadInput(
            f"config.data.name = {name!r}: the split {split!r} {problem}; expected examples that map features to values"
        )
    return source


def fingerprint(name: str, split: str, source: Any) -> str:
    """Names the examples of a source, by its own attribute or by their number and some of them."""
    digest = hashlib.sha256(f"{name}|{split}|{len(source)}".encode())
    if hasattr(source, "fingerprint"):
        digest.update(str(source.fingerprint).encode())
        return digest.hexdigest()
    for i in np.unique(np.linspace(0, len(source) - 1, SAMPLED).astype(int)):
        for feature, value in sorted(source[int(i)].items()):
            digest.update(feature.encode())
            digest.update(value.encode() if isinstance(value, str) else np.asarray(value).tobytes())
    return digest.hexdigest()


def class_names(name: str) -> tuple[str, ...]:
    """The classes of pictures.

    Raises:
      BadInput: the function does not name them.
    """
    opener = load(name)
    if not hasattr(opener, "class_names"):
        raise BadInput(f"config.data.name = {name!r}: has no attribute class_names, the names of the classes in order")
    return tuple(map(str, opener.class_names))
