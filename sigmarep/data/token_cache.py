"""Cache of tokenized texts on disk: one array of all tokens, and the offset of each text in it."""

import contextlib
import hashlib
import json
import os
import shutil
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from sigmarep.errors import BadInput
from sigmarep.files import locked


class Corpus:
    """Token arrays (n,) int32 of texts, read from disk on access.

    Attributes:
      offsets: (texts + 1,) int64, where each text begins among all tokens.
      counts: the counts that `encode` returned, see `obtain`.
      fingerprint: hexadecimal SHA-256 of offsets and tokens.
    """

    def __init__(self, folder: str):
        self._tokens = np.load(os.path.join(folder, "tokens.npy"), mmap_mode="r")
        self.offsets = np.load(os.path.join(folder, "offsets.npy"))
        with open(os.path.join(folder, "facts.json")) as file:
            facts = json.load(file)
        self.counts: dict[str, int] = facts["counts"]
        self.fingerprint: str = facts["fingerprint"]

    def __len__(self):
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return np.asarray(self._tokens[self.offsets[index] : self.offsets[index + 1]])


def create_once(path: str, create: Callable[[], None]) -> None:
    """Calls `create`, which makes the cached file or folder `path`, unless it exists; in one process at a time.

    Raises:
      BadInput: it does not exist, and its folder cannot be written.
    """
    # Looked for before anything is locked, since prepared data may lie in a folder that is read alone.
    if os.path.exists(path):
        return
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(path))
        except OSError as error:
            raise BadInput(
                f"config.data.data_dir: {os.path.dirname(path)} cannot be written ({error.strerror}); set another with "
                "--config.data.data_dir"
            ) from error
        if not os.path.exists(path):
            create()


def key_digest(key: str) -> str:
    """Name of the cached file or folder for `key`."""
    return hashlib.sha256(key.encode()).hexdigest()[:24]


def obtain(folder: str, key: str, encode: Callable[[], tuple[Sequence[np.ndarray], dict[str, int]]]) -> Corpus:
    """Opens the corpus cached in `folder` under `key`, creating it if necessary.

    Args:
      folder: folder of the cache.
      key: names the content.
      encode: returns the token arrays, and counts to store with them.

    Raises:
      BadInput: the folder cannot be written.
    """
    path = os.path.join(folder, key_digest(key))

    def create() -> None:
        arrays, counts = encode()
        tokens = np.concatenate([np.zeros(0, np.int32), *arrays])
        offsets = np.cumsum([0, *(len(array) for array in arrays)], dtype=np.int64)
        digest = hashlib.sha256(offsets.tobytes() + tokens.tobytes()).hexdigest()
        temporary = f"{path}.{os.getpid()}"
        os.makedirs(temporary, exist_ok=True)
        try:
            np.save(os.path.join(temporary, "tokens.npy"), tokens)
            np.save(os.path.join(temporary, "offsets.npy"), offsets)
            with open(os.path.join(temporary, "facts.json"), "w") as file:
                json.dump({"counts": counts, "fingerprint": digest}, file)
            os.replace(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    create_once(path, create)
    return Corpus(path)


def feature(example: Mapping[str, Any], name: str, field: str) -> str:
    """Returns a feature of an example as text in Unicode's normal form C, so that a character has one spelling.

    Raises:
      BadInput: there is no such feature; the message names `config.data.<field>`.
    """
    if name not in example:
        raise BadInput(f"config.data.{field} = {name!r}: the data set has no such feature; it has {', '.join(example)}")
    value = example[name]
    text = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
    return unicodedata.normalize("NFC", text)
