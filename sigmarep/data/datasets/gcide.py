"""The Collaborative International Dictionary of English: Webster's of 1913 with additions (GPL 2 or later).

It comes with the Debian package `dict-gcide` (15 MB) and has 4.8 million words in 126,000 entries. A document is the entry
of a headword: the headword, then its definitions and quotations, one paragraph a line. Left out are the marks of an entry's
sources such as [1913 Webster], braces around references, pronunciations, and the notices about the dictionary itself.
Characters that the dictionary spells in brackets, such as [ae], are as they are there. Of equal entries the first is used.

The split is by a hash of the headword in lower case, so that all entries of a word are in one: a twentieth of the words
each for validation and testing. The entries of a split are in no order: a slice such as test[:10%] is a fair sample. The
splits share the dictionary's abbreviations, its set phrases, and quotations that stand at several words.
"""

import gzip
import os
import re
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from sigmarep.data import splitting
from sigmarep.data.datasets import debian_package

INSTALLED = "/usr/share/dictd"
FILE = "gcide.dict.dz"
# Upper ends of the splits' ranges of `splitting.fraction`; training has the rest.
HELD_OUT = {"test": 0.05, "validation": 0.1}
SOURCE = re.compile(r"\[(?:[^][]*\b(?:1913 Webster|Webster 1913|WordNet|PJC|Century Dict)\b[^][]*)\]")
# The headword's syllables between backslashes, and in parentheses its sounds.
PRONUNCIATION = re.compile(r"\\[^\\]*\\(?:\s*\([^()]*\))?")
# The dictionary's first entry; notices about it stand before.
FIRST = re.compile(r"^A \\A", re.MULTILINE)


class Gcide(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of the dictionary, from the installed package or from a package unpacked into downloads/gcide."""

    name = "gcide"
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First."}  # noqa: RUF012

    def __init__(self, *, data_dir: str, **options: Any):
        self._unpacked = os.path.join(data_dir, "downloads", "gcide")
        super().__init__(data_dir=data_dir, **options)

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict({name: tfds.features.Text() for name in ("text", "headword")}),
            homepage="https://gcide.gnu.org.ua/",
        )

    def _split_generators(self, dl_manager):
        path = debian_package.find_file([INSTALLED, self._unpacked], FILE)
        if path is None:
            raise debian_package.missing(self.name, "dict-gcide", INSTALLED, self._unpacked)
        with gzip.open(path, "rt", encoding="utf-8", errors="replace") as file:
            rows = split(file.read())
        return {name: self._generate_examples(rows[name]) for name in ("train", "validation", "test")}

    def _generate_examples(self, rows):
        for i, (headword, text) in enumerate(rows):
            yield i, {"text": text, "headword": headword}


def split(content: str) -> dict[str, list[tuple[str, str]]]:
    """(headword, text) of the distinct entries, by split."""
    rows: dict[str, list[tuple[str, str]]] = {"train": [], "validation": [], "test": []}
    seen: set[str] = set()
    for headword, text in entries(content):
        if text in seen:
            continue
        seen.add(text)
        place = splitting.fraction(headword.lower())
        rows[next((name for name, end in HELD_OUT.items() if place < end), "train")].append((headword, text))
    return rows


def entries(content: str) -> Iterator[tuple[str, str]]:
    """Yields headword and text of every entry: it begins at a line's start, and its other lines are indented.

    What stands before the letter A, where the dictionary has its notices, is left out.
    """
    first = FIRST.search(content)
    for entry in re.split(r"\n+(?=\S)", content[first.start() if first else 0 :]):
        headword = re.split(r"\s*[\\\n(,]", entry.strip(), maxsplit=1)[0]
        head, *others = re.split(r"\n\s*\n", entry)
        paragraphs = [PRONUNCIATION.sub("", head, count=1), *others]
        cleaned = (" ".join(re.sub(r"[{}]", "", SOURCE.sub("", each)).split()) for each in paragraphs)
        text = "\n".join(re.sub(r" (?=[,.;])", "", each) for each in cleaned if each)
        # A headword alone has nothing to be read.
        if headword and len(text) > len(headword):
            yield headword, text
