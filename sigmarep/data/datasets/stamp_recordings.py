"""Recordings of people who describe the pictures of the drawing program Tux Paint, in six languages (GPL 2).

The package `tuxpaint-stamps-default` of Debian (161 MB) brings them: `picture_desc_es.ogg` says in Spanish what stands
behind `es.utf8=` in `picture.txt`. Each language is a variant of the set, "latin" holds those of the Latin script
together. A few people read each language, most of it one person; who reads what is not known, so that `speaker` is the
language.

Transcripts are in lower case, in the composed form of Unicode, without punctuation but for the apostrophe and the
Catalan middle dot. Left out are transcripts with digits, currency signs, brackets or letters of another script, which
may be read in several ways; recordings without a transcript; files of equal contents but for the first; and recordings
whose length does not fit: outside 0.55 to 1.8 times the line through length and letters of the language's recordings
(Theil and Sen's fit), which are cut off or say something else.

The split is by transcript, by its hash an eighth for "test" and a sixteenth for "dev", on which to choose how to decode:
all recordings of a transcript are in one split, in the variant "latin" across languages too. Shared are the speakers,
the words, and phrases that differ in a word.
"""

import glob
import hashlib
import json
import os
import re
import unicodedata
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from sigmarep.data import splitting
from sigmarep.data.audio import features
from sigmarep.data.datasets import speech_folder
from sigmarep.errors import BadInput

RATE = 16000
INSTALLED = "/usr/share/tuxpaint/stamps"
# Of the transcripts, the parts below these hashes that are no other split's.
SPLITS = {"test": 1 / 8, "dev": 3 / 16, "train": 1.0}
LANGUAGES = ("fr", "es", "ro", "ca", "ru", "bg")
CYRILLIC = ("ru", "bg")
# Lengths that fit, as multiples of what the letters let expect.
FITTING = (0.55, 1.8)
# Romanian is often written with the cedillas of Turkish.
SPELLING = str.maketrans({"’": "'", "‘": "'", "ş": "ș", "ţ": "ț", "ŀ": "l·"})


class Recording(NamedTuple):
    """A sound file and what it says; `seconds` is its length."""

    path: str
    text: str
    language: str
    seconds: float


class StampRecordings(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of the recordings, from the installed package or from what was unpacked into downloads/stamps."""

    name = "stamp_recordings"
    VERSION = tfds.core.Version("1.1.0")
    RELEASE_NOTES = {"1.1.0": "The split dev."}  # noqa: RUF012
    BUILDER_CONFIGS = [  # noqa: RUF012
        *(tfds.core.BuilderConfig(name=language, description=f"Recordings in {language}.") for language in LANGUAGES),
        tfds.core.BuilderConfig(name="latin", description="The languages of the Latin script together."),
    ]

    def __init__(self, *, data_dir: str, **options: Any):
        self._unpacked = os.path.join(data_dir, "downloads", "stamps")
        super().__init__(data_dir=data_dir, **options)

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "audio": tfds.features.Tensor(shape=(None,), dtype=np.int16),
                    **{name: tfds.features.Text() for name in ("text", "speaker", "language", "id")},
                }
            ),
            homepage="https://tuxpaint.org/stamps/",
        )

    def _split_generators(self, dl_manager):
        variant = self.builder_config.name
        languages = (
            [language for language in LANGUAGES if language not in CYRILLIC] if variant == "latin" else [variant]
        )
        root = find_stamps([INSTALLED, self._unpacked])
        found = [recordings(root, language) for language in languages] if root else []
        rows = [row for kept, _ in found for row in kept]
        if not rows:
            raise BadInput(
                f"config.data.name = 'stamp_recordings/{variant}': has no recordings in {INSTALLED} nor under "
                f"{self._unpacked}; run: apt-get install tuxpaint-stamps-default, or: apt-get download "
                f"tuxpaint-stamps-default && dpkg -x tuxpaint-stamps-default_*.deb {self._unpacked}"
            )
        self._left_out = {language: names for language, (_, names) in zip(languages, found, strict=True)}
        sides: dict[str, list[Recording]] = {split: [] for split in SPLITS}
        for row in rows:
            hashed = splitting.fraction(row.text)
            sides[next(split for split, end in SPLITS.items() if hashed < end)].append(row)
        return {split: self._generate_examples(root, sides[split]) for split in ("train", "dev", "test")}

    def _generate_examples(self, root, rows):
        for row in rows:
            name = os.path.relpath(row.path, root).removesuffix(".ogg")
            read = features.read(row.path)
            samples = features.to_int16(features.resampled(read.samples, read.rate, RATE))
            example = {"audio": samples, "text": row.text, "speaker": row.language, "language": row.language}
            yield name, {**example, "id": name}
        # Beside the records, where `speech_folder.problems` looks for it.
        with open(os.path.join(str(self.data_dir), speech_folder.REPORT), "w", encoding="utf-8") as file:
            json.dump(self._left_out, file, indent=1, ensure_ascii=False)


def find_stamps(roots: list[str]) -> str | None:
    """The folder of the pictures within the first of the roots that has any."""
    for root in roots:
        unpacked = glob.glob(os.path.join(glob.escape(root), "**", "tuxpaint", "stamps"), recursive=True)
        for start in (*sorted(unpacked), root):
            if glob.glob(os.path.join(glob.escape(start), "**", "*_desc_*.ogg"), recursive=True):
                return start
    return None


def recordings(root: str, language: str) -> tuple[list[Recording], dict[str, list[str]]]:
    """The recordings of a language that are kept, in the order of their names, and those left out, by reason."""
    found: list[Recording] = []
    left_out: dict[str, list[str]] = {"transcript": [], "repeated": [], "unreadable": [], "length": []}
    contents: set[bytes] = set()
    ending = f"_desc_{language}.ogg"
    for path in sorted(glob.glob(os.path.join(glob.escape(root), "**", f"*{ending}"), recursive=True)):
        with open(path, "rb") as file:
            digest = hashlib.sha256(file.read()).digest()
        text = transcript(description(path.removesuffix(ending) + ".txt", language), language)
        if not text:
            left_out["transcript"].append(os.path.relpath(path, root))
        elif digest in contents:
            left_out["repeated"].append(os.path.relpath(path, root))
        else:
            contents.add(digest)
            try:
                read = features.read(path)
            except features.AudioError as error:
                left_out["unreadable"].append(str(error).replace(path, os.path.relpath(path, root)))
                continue
            found.append(Recording(path, text, language, len(read.samples) / read.rate))
    kept = fitting(found)
    fits = {row.path for row in kept}
    left_out["length"] = [os.path.relpath(row.path, root) for row in found if row.path not in fits]
    return kept, left_out


def description(path: str, language: str) -> str:
    """What stands behind `<language>.utf8=` in a picture's text file, "" if it stands there not once."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            found = re.findall(rf"^{language}\.utf8=(.*)$", file.read(), re.MULTILINE)
    except OSError:
        return ""
    return found[0] if len(found) == 1 else ""


def transcript(text: str, language: str) -> str:
    """The text as transcripts are written here, "" if it cannot be one (see the module docstring)."""
    text = unicodedata.normalize("NFC", text).lower().translate(SPELLING)
    # Symbols such as currency signs are spoken.
    if re.search(r"[\d()\[\]{}<>/@&%\ufffd]", text) or any(unicodedata.category(each)[0] == "S" for each in text):
        return ""
    words = re.sub(r"[^\w'·]|_", " ", text).split()
    text = " ".join(word for word in (word.strip("'·") for word in words) if word)
    script = "CYRILLIC" if language in CYRILLIC else "LATIN"
    return text if all(script in unicodedata.name(each, "") for each in text if each not in " '·") else ""


def fitting(found: list[Recording]) -> list[Recording]:
    """The recordings whose length is in proportion to their transcript's (see the module docstring)."""
    if len(found) < 2:
        return found
    letters = np.array([len(row.text) for row in found], float)
    seconds = np.array([row.seconds for row in found])
    first, second = np.triu_indices(len(found), 1)
    apart = letters[first] != letters[second]
    rises = (seconds[first] - seconds[second])[apart] / (letters[first] - letters[second])[apart]
    slope = np.median(rises) if len(rises) else 0.0
    expected = slope * letters + np.median(seconds - slope * letters)
    ratio = seconds / np.maximum(expected, 1e-3)
    return [row for row, each in zip(found, ratio, strict=True) if FITTING[0] <= each <= FITTING[1]]
