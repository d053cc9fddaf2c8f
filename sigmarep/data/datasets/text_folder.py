"""Text files of a folder as a TFDS data set.

The splits are train, validation (or valid, dev) and test; only training needs train. A split is one of these, possibly
gzipped (`.gz`):

- `train.txt`: documents, separated by empty lines. (`wiki.train.tokens` and `wiki.train.raw`, WikiText's own files, are
  read too; in them a line ` = Title = ` begins a document.)
- `train.tsv`: on each line a source, a tab and its translation.
- `train.en` and `train.de`: translations line by line.

The prepared data set is stored under a hash of the files' contents, so that a changed file gives a new data set.
"""

import gzip
import hashlib
import os
import re
import unicodedata
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import tensorflow_datasets as tfds

from sigmarep.errors import BadInput, one_line

SPLITS = {"train": "train", "validation": "validation", "valid": "validation", "dev": "validation", "test": "test"}
PLAIN = ("txt", "tokens", "raw")
TITLE = re.compile(r" = [^=].*[^=] = \s*")


class TextFolder(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of the text files of a folder; see the module docstring."""

    name = "text_folder"
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First."}  # noqa: RUF012
    SKIP_REGISTERING = True

    def __init__(self, *, folder: str, **options):
        """Finds the files.

        Raises:
          BadInput: see `find_files`.
        """
        self._files = find_files(folder)
        # Names the way in which files are read: byte-order marks are left out, characters in normal form C.
        digest = hashlib.sha256(b"NFC")
        for split, paths in sorted(self._files.items()):
            for path in paths:
                digest.update(f"{split} {os.path.basename(path)} ".encode())
                try:
                    with open(path, "rb") as file:
                        while block := file.read(1 << 20):
                            digest.update(block)
                except OSError as error:
                    raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
        super().__init__(config=tfds.core.BuilderConfig(name=digest.hexdigest()[:20]), **options)

    def _info(self):
        names = {language_of(path) for paths in self._files.values() for path in paths}
        columns = sorted(names) if len(names) == 2 else ["source", "target"] if names == {"tsv"} else ["text"]
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict({name: tfds.features.Text() for name in columns}),
            # Texts stay in the order of the file, so that they can be read as one stream.
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(paths) for split, paths in self._files.items()}

    def _generate_examples(self, paths):
        if len(paths) == 2:
            yield from enumerate(aligned(*paths))
        elif language_of(paths[0]) == "tsv":
            yield from enumerate(columns_of(paths[0]))
        else:
            yield from ((i, {"text": text}) for i, text in enumerate(documents(paths[0])))


def find_files(folder: str) -> dict[str, list[str]]:
    """Finds the file, or the two aligned files, of each split.

    Raises:
      BadInput: there is no such folder, no file of a split in it, or a split has several files that do not belong together.
    """
    if not folder or not os.path.isdir(os.path.expanduser(folder)):
        raise BadInput(f"config.data.folder = {folder!r}: there is no such folder")
    folder = os.path.expanduser(folder)
    files: dict[str, list[str]] = {}
    for name in sorted(os.listdir(folder)):
        match = re.fullmatch(r"(?:wiki\.)?(\w+)\.([A-Za-z_-]+)(\.gz)?", name)
        if match and match[1] in SPLITS:
            files.setdefault(SPLITS[match[1]], []).append(os.path.join(folder, name))
    if not files:
        raise BadInput(
            f"config.data.folder = {folder!r}: has no train.txt, no train.tsv and no pair such as train.en and train.de"
        )
    for split, paths in files.items():
        if len(paths) > 2 or (len(paths) == 2 and {language_of(path) for path in paths} & {*PLAIN, "tsv"}):
            names = ", ".join(os.path.basename(path) for path in paths)
            raise BadInput(
                f"config.data.folder = {folder!r}: has several files of the split {split}: {names}; keep one"
            )
        if len(paths) == 1 and language_of(paths[0]) not in (*PLAIN, "tsv"):
            raise BadInput(
                f"{paths[0]}: is alone; expected a pair such as {split}.en and {split}.de, or {split}.tsv, or {split}.txt"
            )
    return files


def language_of(path: str) -> str:
    """Extension of a file's name without the dot, and before ".gz": the language in `train.en`."""
    return os.path.basename(path).removesuffix(".gz").rpartition(".")[2]


def lines(path: str) -> Iterator[str]:
    """Yields the lines of a text file without their line ends, in Unicode's normal form C, without a byte-order mark.

    Raises:
      BadInput: the file is empty or cannot be read, or a line is not UTF-8; the message names file and line.
    """
    number = 0
    try:
        with gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                text = line.decode("utf-8" if number > 1 else "utf-8-sig")
                yield unicodedata.normalize("NFC", text.rstrip("\r\n"))
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}:{number}: is not UTF-8 (byte {error.start + 1} of the line)") from None
    except (OSError, EOFError, zlib.error) as error:
        raise BadInput(f"{path}:{number + 1}: cannot be read ({_reason(error)})") from None
    if not number:
        raise BadInput(f"{path}: is empty")


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or one_line(error)


def documents(path: str) -> Iterator[str]:
    """Yields the documents of a plain text file.

    Raises:
      BadInput: see `lines`; or the file has nothing but white space.
    """
    wikitext = language_of(path) in ("tokens", "raw")
    gathered: list[str] = []
    count = 0
    for line in lines(path):
        ends = TITLE.fullmatch(line) if wikitext else not line.strip()
        if ends and any(each.strip() for each in gathered):
            count += 1
            yield "\n".join(gathered)
        if ends:
            gathered = []
        if wikitext or not ends:
            gathered.append(line)
    if any(each.strip() for each in gathered):
        count += 1
        yield "\n".join(gathered)
    if not count:
        raise BadInput(f"{path}: has no text")


def columns_of(path: str) -> Iterator[dict[str, str]]:
    """Yields `source` and `target` of every line of a table; empty lines are passed over.

    Raises:
      BadInput: see `lines`; or a line does not have exactly one tab.
    """
    for number, line in enumerate(lines(path), 1):
        if not line.strip(" "):
            continue
        columns = line.split("\t")
        if len(columns) != 2:
            raise BadInput(
                f"{path}:{number}: has {len(columns) - 1} tabs; expected a source, one tab and its translation"
            )
        yield {"source": columns[0], "target": columns[1]}


def aligned(first: str, second: str) -> Iterator[dict[str, str]]:
    """Yields the pairs of lines of two files, by the files' languages; one may have more empty lines at its end.

    Raises:
      BadInput: see `lines`; or the files have different numbers of lines.
    """
    counts = [_counts(path) for path in (first, second)]
    # Without the empty lines at their ends if only one file has them.
    if len({count.all for count in counts}) > 1 and len({count.filled for count in counts}) > 1:
        raise BadInput(
            f"{first}: has {counts[0].all} lines, and {second} has {counts[1].all}; they must be translations line by line"
        )
    names = [language_of(path) for path in (first, second)]
    for pair in zip(lines(first), lines(second), strict=False):
        yield dict(zip(names, pair, strict=True))


class _Counts(NamedTuple):
    """Numbers of lines of a file, and of those up to the last that is not empty."""

    all: int
    filled: int


def _counts(path: str) -> _Counts:
    count = filled = 0
    for count, line in enumerate(lines(path), 1):
        filled = count if line.strip() else filled
    return _Counts(count, filled)
