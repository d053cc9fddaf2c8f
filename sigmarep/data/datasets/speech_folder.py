"""Recordings of a folder, with what is said in them, as a TFDS data set.

Two layouts are read. LibriSpeech's: `<split>/<speaker>/<chapter>/<speaker>-<chapter>.trans.txt`, of which each line is an
utterance's id, a space and its text, with `<id>.flac` (or .wav, .ogg) beside it; splits have the names of the folders with
"_" for "-" (train_clean_100). Or a table for each split, `train.tsv`, `validation.tsv` (or valid, dev), `test.tsv`: on
each line an audio file's path from the folder, a tab and its text, then, if wanted, a tab and the speaker.

Audio of any sampling rate becomes 16 kHz, several channels their mean. Files and lines that cannot be used are left out;
`problems` names them.

What is prepared is kept under the hash of the transcripts and of the names and sizes of the audio files: a changed folder
is another data set.
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
# Files that an error names.
NAMED = 3


class Entry(NamedTuple):
    """An utterance of a transcript or table; `problem` and `reason` say why it cannot be used, "" if it can."""

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
        """Raises BadInput where there is no such folder, or nothing of either layout in it."""
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
        """The audio of a folder's split in chapters that have no transcript; of tables the audio that none of them names,
        told with the split that comes first."""
        if split not in tables:
            roots = [name for name in os.listdir(self._folder) if re.sub(r"\W", "_", name) == split]
            known = {os.path.dirname(entry.path) for entry in self._splits[split]}
            unnamed = [path for path in _audio_below(self._folder, roots) if os.path.dirname(path) not in known]
        elif split == tables[0]:
            known = {os.path.normpath(entry.path) for name in tables for entry in self._splits[name]}
            tops = {os.path.relpath(os.path.dirname(path), self._folder).split(os.sep)[0] for path in known}
            # A table may name files outside the folder; what else is there is none of its business.
            unnamed = [path for path in _audio_below(self._folder, sorted(tops - {".."})) if path not in known]
        else:
            return []
        return [Entry(path, "", "", "", "no_text", "nothing says what is spoken") for path in unnamed]

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
        # While TFDS prepares, data_dir is a folder that becomes the data set's when all of it is there.
        with open(os.path.join(str(self.data_dir), REPORT), "w", encoding="utf-8") as file:
            json.dump(self._problems, file, indent=1, ensure_ascii=False)

    def _samples(self, entry: Entry, dropped: list[str]) -> np.ndarray | None:
        """int16 (n,) at 16 kHz, or None with the reason noted."""
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
    """What was wrong with the files of a prepared folder; {} if nothing was, and for other data sets.

    Lists of "file: reason" under `missing` (no such audio), `unreadable`, `empty_audio`, `empty_text`, `no_text` (audio
    without a line), `repeated` (another format of the same recording) and `malformed` (lines that are not of the layout):
    these were left out. Those under `resampled` and `averaged` (several channels) are in the data set.
    """
    path = os.path.join(str(builder.data_dir), REPORT)
    if not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def find_splits(folder: str) -> dict[str, list[str]]:
    """The transcripts of each split, or its one table, as paths.

    Raises:
      BadInput: there is no such folder, nothing of either layout in it, or two files of one split.
    """
    if not folder or not os.path.isdir(os.path.expanduser(folder)):
        raise BadInput(f"config.data.folder = {folder!r}: there is no such folder")
    root = os.path.expanduser(folder)
    found: dict[str, list[str]] = {}
    for path in sorted(glob.glob(os.path.join(glob.escape(root), "*.tsv"))):
        stem = re.sub(r"\W", "_", os.path.basename(path).removesuffix(".tsv"))
        found.setdefault(text_folder.SPLITS.get(stem, stem), []).append(path)
    for split, paths in found.items():
        if len(paths) > 1:
            names = ", ".join(os.path.basename(path) for path in paths)
            raise BadInput(
                f"config.data.folder = {folder!r}: has several files of the split {split}: {names}; keep one"
            )
    for path in sorted(glob.glob(os.path.join(glob.escape(root), "*", "*", "*", "*.trans.txt"))):
        split = re.sub(r"\W", "_", os.path.relpath(path, root).split(os.sep)[0])
        if found.get(split, [""])[0].endswith(".tsv"):
            raise BadInput(f"config.data.folder = {folder!r}: has a table and a folder of the split {split}; keep one")
        found.setdefault(split, []).append(path)
    if not found:
        raise BadInput(
            f"config.data.folder = {folder!r}: has no train.tsv (audio, tab, text on each line) and no transcripts such as "
            "train-clean-100/103/1240/103-1240.trans.txt"
        )
    return found


def _entries(folder: str, paths: list[str]) -> Iterator[Entry]:
    for path in paths:
        yield from (_rows(folder, path) if path.endswith(".tsv") else _chapter(path))


def _rows(folder: str, path: str) -> Iterator[Entry]:
    """The entries of a table."""
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
    """The entries of a transcript, and the audio beside it that no line names."""
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
    """Audio files in the folders `roots` of `folder`, and in those below them; "." is the folder alone."""
    found = []
    for root in roots:
        for here, _, names in os.walk(os.path.normpath(os.path.join(folder, root))):
            found += [os.path.join(here, name) for name in names if os.path.splitext(name)[1].lower() in EXTENSIONS]
            if root == ".":
                break
    return sorted(set(found))


def _checked(entry: Entry) -> Entry:
    if not os.path.isfile(entry.path):
        return entry._replace(problem="missing", reason="there is no such file")
    return entry if entry.text else entry._replace(problem="empty_text", reason="has no text")
