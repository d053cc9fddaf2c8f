"""Recordings of people who describe the pictures of the drawing program Tux Paint, in six languages (GPL 2).

They come with the Debian package `tuxpaint-stamps-default` (161 MB): `picture_desc_es.ogg` is the Spanish text that
follows `es.utf8=` in `picture.txt`. Each language is a variant of the data set; the variant "latin" has all languages in
Latin script. Each language has a few readers, one of whom reads most of it; the reader of a recording is not known, so
`speaker` is the language.

Transcripts are in lower case and in Unicode's composed form, with the apostrophe and the Catalan middle dot as their only
punctuation. Left out are transcripts with digits, currency signs, brackets or letters of another script, because they can
be read in several ways; recordings without a transcript; all but the first of identical files; and recordings whose
length is not between 0.55 and 1.8 times the length expected from the number of letters (a Theil-Sen fit over the
language's recordings), because they are truncated or say something else.

The split is by a hash of the transcript: an eighth for "test", a sixteenth for "dev", for choosing decoding options. All
recordings of a transcript are in one split, in the variant "latin" across languages too. The splits share speakers,
words, and phrases that differ in a word.
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
# Upper ends of the splits' ranges of `splitting.fraction`.
SPLITS = {"test": 1 / 8, "dev": 3 / 16, "train": 1.0}
LANGUAGES = ("fr", "es", "ro", "ca", "ru", "bg")
CYRILLIC = ("ru", "bg")
# Accepted lengths, as multiples of the length expected from the number of letters.
FITTING = (0.55, 1.8)
# Unifies apostrophes, Romanian letters written with Turkish cedillas, and the Catalan ŀ.
SPELLING = str.maketrans({"’": "'", "‘": "'", "ş": "ș", "ţ": "ț", "ŀ": "l·"})


class StampRecording(NamedTuple):
    """A sound file, its transcript and language, and its length in seconds."""

    path: str
    text: str
    language: str
    seconds: float


class StampRecordings(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of the recordings, from the installed package or from a package unpacked into downloads/stamps."""

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
        of_language = [recordings(root, language) for language in languages] if root else []
        rows = [row for usable, _ in of_language for row in usable]
        if not rows:
            raise BadInput(
                f"config.data.name = 'stamp_recordings/{variant}': has no recordings in {INSTALLED} nor under "
                f"{self._unpacked}; run: apt-get install tuxpaint-stamps-default, or: apt-get download "
                f"tuxpaint-stamps-default && dpkg -x tuxpaint-stamps-default_*.deb {self._unpacked}"
            )
        self._left_out = {language: names for language, (_, names) in zip(languages, of_language, strict=True)}
        members: dict[str, list[StampRecording]] = {split: [] for split in SPLITS}
        for row in rows:
            hashed = splitting.fraction(row.text)
            members[next(split for split, end in SPLITS.items() if hashed < end)].append(row)
        return {split: self._generate_examples(root, members[split]) for split in ("train", "dev", "test")}

    def _generate_examples(self, root, rows):
        for row in rows:
            name = os.path.relpath(row.path, root).removesuffix(".ogg")
            read = features.read(row.path)
            samples = features.to_int16(features.resampled(read.samples, read.rate, RATE))
            example = {"audio": samples, "text": row.text, "speaker": row.language, "language": row.language}
            yield name, {**example, "id": name}
        # `speech_folder.problems` reads this file.
        with open(os.path.join(str(self.data_dir), speech_folder.REPORT), "w", encoding="utf-8") as file:
            json.dump(self._left_out, file, indent=1, ensure_ascii=False)


def find_stamps(roots: list[str]) -> str | None:
    """Finds the folder of the pictures, in the first root that has recordings; None without any."""
    for root in roots:
        unpacked = glob.glob(os.path.join(glob.escape(root), "**", "tuxpaint", "stamps"), recursive=True)
        for start in (*sorted(unpacked), root):
            if glob.glob(os.path.join(glob.escape(start), "**", "*_desc_*.ogg"), recursive=True):
                return start
    return None


def recordings(root: str, language: str) -> tuple[list[StampRecording], dict[str, list[str]]]:
    """Returns the usable recordings of a language, sorted by name, and the names of the others by reason."""
    candidates: list[StampRecording] = []
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
            candidates.append(StampRecording(path, text, language, len(read.samples) / read.rate))
    usable = fitting(candidates)
    paths = {row.path for row in usable}
    left_out["length"] = [os.path.relpath(row.path, root) for row in candidates if row.path not in paths]
    return usable, left_out


def description(path: str, language: str) -> str:
    """Text after `<language>.utf8=` in a picture's text file; "" unless there is exactly one such line."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            texts = re.findall(rf"^{language}\.utf8=(.*)$", file.read(), re.MULTILINE)
    except OSError:
        return ""
    return texts[0] if len(texts) == 1 else ""


def transcript(text: str, language: str) -> str:
    """Normalizes a text to a transcript; "" if it cannot be one (see the module docstring)."""
    text = unicodedata.normalize("NFC", text).lower().translate(SPELLING)
    # Symbols such as currency signs are spoken.
    if re.search(r"[\d()\[\]{}<>/@&%\ufffd]", text) or any(unicodedata.category(each)[0] == "S" for each in text):
        return ""
    words = re.sub(r"[^\w'·]|_", " ", text).split()
    text = " ".join(word for word in (word.strip("'·") for word in words) if word)
    script = "CYRILLIC" if language in CYRILLIC else "LATIN"
    return text if all(script in unicodedata.name(each, "") for each in text if each not in " '·") else ""


def fitting(rows: list[StampRecording]) -> list[StampRecording]:
    """Recordings whose length is in proportion to that of their transcript (see the module docstring)."""
    if len(rows) < 2:
        return rows
    letters = np.array([len(row.text) for row in rows], float)
    seconds = np.array([row.seconds for row in rows])
    first, second = np.triu_indices(len(rows), 1)
    apart = letters[first] != letters[second]
    rises = (seconds[first] - seconds[second])[apart] / (letters[first] - letters[second])[apart]
    slope = np.median(rises) if len(rises) else 0.0
    expected = slope * letters + np.median(seconds - slope * letters)
    ratio = seconds / np.maximum(expected, 1e-3)
    return [row for row, each in zip(rows, ratio, strict=True) if FITTING[0] <= each <= FITTING[1]]
