"""Recordings of a folder and their transcripts, as a TFDS data set.

Two layouts are supported:

- LibriSpeech's: `<split>/<speaker>/<chapter>/<speaker>-<chapter>.trans.txt`, with an utterance's id, a space and its text
  on each line, and `<id>.flac` (or .wav, .ogg) in the same folder. Splits are named after the folders, with "_" for "-"
  (train_clean_100).
- One table per split, `train.tsv`, `validation.tsv` (or valid, dev) and `test.tsv`: on each line the path of an audio file
  relative to the folder, a tab, its text and, optionally, a tab and the speaker.

Audio is resampled to 16 kHz and averaged over channels. Unusable files and lines are left out; `problems` lists them.

The prepared data set is stored under a hash of the transcripts and of the names and sizes of the audio files, so that a
changed folder gives a new data set.
"""

import glob
import hashlib
import json
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from sigmarep.data.audio import features
from sigmarep.data.datasets import text_folder
from sigmarep.errors import BadInput

RATE = 16000
EXTENSIONS = (".flac", ".wav", ".ogg")
REPORT = "problems.json"
# Number of files named in an error.
NAMED = 3


class Entry(NamedTuple):
    """An utterance of a transcript or table.

    Attributes:
      path: the audio file.
      text: the transcript.
      speaker: "" if unknown.
      name: id of the utterance.
      problem: kind of the fault that makes it unusable, a key of `problems`; "" for none.
      reason: the fault in words.
    """

    path: str
    text: str
    speaker: str
    name: str
    problem: str = ""
    reason: str = ""


class SpeechFolder(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of the recordings of a folder; see the module docstring."""

    name = "speech_folder"
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First."}  # noqa: RUF012
    SKIP_REGISTERING = True

    def __init__(self, *, folder: str, **options: Any):
        """Finds the recordings.

        Raises:
          BadInput: see `find_splits`.
        """
        self._folder = os.path.expanduser(folder)
        splits = find_splits(folder)
        self._splits = {split: list(_entries(self._folder, paths)) for split, paths in splits.items()}
        tables = [split for split, paths in splits.items() if paths[0].endswith(".tsv")]
        for split, entries in self._splits.items():
            entries += self._without_text(split, tables)
        self._problems: dict[str, Any] = {}
        digest = hashlib.sha256()
        for split, entries in sorted(self._splits.items()):
            for entry in entries:
                size = os.path.getsize(entry.path) if os.path.isfile(entry.path) else -1
                named = os.path.relpath(entry.path, self._folder)
                digest.update(json.dumps([split, named, size, entry.text, entry.speaker, entry.reason]).encode())
        super().__init__(config=tfds.core.BuilderConfig(name=digest.hexdigest()[:20]), **options)

    def _without_text(self, split: str, tables: list[str]) -> list[Entry]:
        """Audio files that have no transcript, as unusable entries.

        In LibriSpeech's layout these are the files of chapters without a transcript; in tables the files that no table
        names, which are reported with the first split.
        """
        if split not in tables:
            roots = [name for name in os.listdir(self._folder) if re.sub(r"\W", "_", name) == split]
            known = {os.path.dirname(entry.path) for entry in self._splits[split]}
            unnamed = [path for path in _audio_below(self._folder, roots) if os.path.dirname(path) not in known]
        elif split == tables[0]:
            known = {os.path.normpath(entry.path) for name in tables for entry in self._splits[name]}
            tops = {os.path.relpath(os.path.dirname(path), self._folder).split(os.sep)[0] for path in known}
            # A table may name files outside the folder; other files there are none of this data set's business.
            unnamed = [path for path in _audio_below(self._folder, sorted(tops - {".."})) if path not in known]
        else:
            return []
        return [Entry(path, "", "", "", "no_text", "has no transcript") for path in unnamed]

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "audio": tfds.features.Tensor(shape=(None,), dtype=np.int16),
                    **{name: tfds.features.Text() for name in ("text", "speaker", "id")},
                }
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        self._problems = {}
        return {split: self._generate_examples(split, entries) for split, entries in self._splits.items()}

    def _generate_examples(self, split, entries):
        number = 0
        dropped: list[str] = []
        for entry in entries:
            samples = self._samples(entry, dropped)
            if samples is not None:
                yield number, {"audio": samples, "text": entry.text, "speaker": entry.speaker, "id": entry.name}
                number += 1
        if not number:
            shown = "; ".join(dropped[:NAMED])
            raise BadInput(
                f"config.data.folder = {self._folder!r}: nothing of the split {split!r} can be used "
                f"(left out {len(dropped)}): {shown}"
            )
        # While TFDS prepares, data_dir is a temporary folder that is renamed when the data set is complete.
        with open(os.path.join(str(self.data_dir), REPORT), "w", encoding="utf-8") as file:
            json.dump(self._problems, file, indent=1, ensure_ascii=False)

    def _samples(self, entry: Entry, dropped: list[str]) -> np.ndarray | None:
        """Samples int16 (n,) at 16 kHz; None for an unusable entry, whose reason is added to `dropped`."""
        named = os.path.relpath(entry.path, self._folder)
        kind, reason = entry.problem, f"{named}: {entry.reason}"
        if not kind:
            try:
                read = features.read(entry.path)
            except features.AudioError as error:
                reason = str(error).replace(entry.path, named)
                kind = "empty_audio" if "holds no samples" in reason else "unreadable"
        if kind:
            self._problems.setdefault(kind, []).append(reason)
            dropped.append(reason)
            return None
        if read.rate != RATE:
            self._problems.setdefault("resampled", []).append(f"{named}: {read.rate} Hz")
        if read.channels > 1:
            self._problems.setdefault("averaged", []).append(f"{named}: {read.channels} channels")
        return features.to_int16(features.resampled(read.samples, read.rate, RATE))


def problems(builder: tfds.core.DatasetBuilder) -> dict[str, Any]:
    """Faults of the files of a prepared data set; {} if there are none, and for data sets that do not record them.

    Lists of "file: reason" by kind. Left out of the data set are `missing` (no audio file), `unreadable`, `empty_audio`,
    `empty_text`, `no_text` (audio without a transcript), `repeated` (another format of the same recording) and
    `malformed` (lines that do not follow the layout). Part of the data set are `resampled` and `averaged` (several
    channels).
    """
    path = os.path.join(str(builder.data_dir), REPORT)
    if not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def find_splits(folder: str) -> dict[str, list[str]]:
    """Finds the paths of each split's transcripts, or of its table.

    Raises:
      BadInput: there is no such folder, it has neither layout, or a split has two tables, or a table and transcripts.
    """
    if not folder or not os.path.isdir(os.path.expanduser(folder)):
        raise BadInput(f"config.data.folder = {folder!r}: there is no such folder")
    root = os.path.expanduser(folder)
    files: dict[str, list[str]] = {}
    for path in sorted(glob.glob(os.path.join(glob.escape(root), "*.tsv"))):
        stem = re.sub(r"\W", "_", os.path.basename(path).removesuffix(".tsv"))
        files.setdefault(text_folder.SPLITS.get(stem, stem), []).append(path)
    for split, paths in files.items():
        if len(paths) > 1:
            names = ", ".join(os.path.basename(path) for path in paths)
            raise BadInput(
                f"config.data.folder = {folder!r}: has several files of the split {split}: {names}; keep one"
            )
    for path in sorted(glob.glob(os.path.join(glob.escape(root), "*", "*", "*", "*.trans.txt"))):
        split = re.sub(r"\W", "_", os.path.relpath(path, root).split(os.sep)[0])
        if files.get(split, [""])[0].endswith(".tsv"):
            raise BadInput(f"config.data.folder = {folder!r}: has a table and a folder of the split {split}; keep one")
        files.setdefault(split, []).append(path)
    if not files:
        raise BadInput(
            f"config.data.folder = {folder!r}: has no train.tsv (audio, tab, text on each line) and no transcripts such as "
            "train-clean-100/103/1240/103-1240.trans.txt"
        )
    return files


def _entries(folder: str, paths: list[str]) -> Iterator[Entry]:
    for path in paths:
        yield from (_rows(folder, path) if path.endswith(".tsv") else _chapter(path))


def _rows(folder: str, path: str) -> Iterator[Entry]:
    """Yields the entries of a table."""
    for number, line in enumerate(text_folder.lines(path), 1):
        columns = [column.strip() for column in line.split("\t")]
        if not any(columns):
            continue
        if len(columns) not in (2, 3) or not columns[0]:
            reason = (
                f"line {number} has {len(columns) - 1} tabs; expected a file, a tab, its text" if columns[0] else ""
            )
            yield Entry(path, "", "", "", "malformed", reason or f"line {number} names no file")
            continue
        speaker = columns[2] if len(columns) == 3 else ""
        yield _checked(Entry(os.path.join(folder, columns[0]), columns[1], speaker, columns[0]))


def _chapter(path: str) -> Iterator[Entry]:
    """Yields the entries of a transcript, then audio files of its folder that it does not name."""
    here = os.path.dirname(path)
    speaker = os.path.basename(os.path.dirname(here))
    audio_files: dict[str, str] = {}
    for name in sorted(os.listdir(here)):
        stem, extension = os.path.splitext(name)
        if extension.lower() not in EXTENSIONS:
            continue
        if stem in audio_files:
            reason = f"{os.path.basename(audio_files[stem])} is taken"
            yield Entry(os.path.join(here, name), "", speaker, stem, "repeated", reason)
        else:
            audio_files[stem] = os.path.join(here, name)
    spoken = set()
    for line in text_folder.lines(path):
        name, _, text = line.strip().partition(" ")
        if name:
            spoken.add(name)
            yield _checked(
                Entry(audio_files.get(name, os.path.join(here, f"{name}.flac")), text.strip(), speaker, name)
            )
    for name in sorted(set(audio_files) - spoken):
        yield Entry(audio_files[name], "", speaker, name, "no_text", "no line of the transcript names it")


def _audio_below(folder: str, roots: list[str]) -> list[str]:
    """Audio files in subfolders `roots` of `folder` and below; the root "." is `folder` itself without subfolders."""
    paths = []
    for root in roots:
        for here, _, names in os.walk(os.path.normpath(os.path.join(folder, root))):
            paths += [os.path.join(here, name) for name in names if os.path.splitext(name)[1].lower() in EXTENSIONS]
            if root == ".":
                break
    return sorted(set(paths))


def _checked(entry: Entry) -> Entry:
    if not os.path.isfile(entry.path):
        return entry._replace(problem="missing", reason="there is no such file")
    return entry if entry.text else entry._replace(problem="empty_text", reason="has no text")
