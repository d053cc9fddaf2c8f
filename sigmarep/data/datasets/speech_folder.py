"""Recordings of a folder and their transcripts, as a TFDS data set.

Four layouts are read:

- LibriSpeech's: `<split>/<speaker>/<chapter>/<speaker>-<chapter>.trans.txt`, with an utterance's id, a space and its text
  on each line, and `<id>.flac` (or .wav, .ogg) in the same folder. Splits are named after the folders, with "_" for "-"
  (train_clean_100).
- One table per split, `train.tsv`, `validation.tsv` (or valid, dev) and `test.tsv`: on each line the path of an audio file
  relative to the folder, a tab, its text and, optionally, a tab and the speaker.
- Common Voice's: tables whose first line names their columns, `path` (a file in the folder clips), `sentence` and,
  optionally, `client_id`. Of its tables train.tsv, dev.tsv and test.tsv are splits; without any of these, all that name
  sentences.
- LJSpeech's: `metadata.csv`, with an id, its text and, optionally, its normalized text, which is taken, separated by "|";
  the audio is `wavs/<id>.wav` (or .flac, .ogg, .mp3). A twentieth of the texts, chosen by a hash, is the split
  validation, and another one test.

Audio is resampled to 16 kHz and averaged over channels. Unusable files and lines are left out; `problems` lists them.

The prepared data set is stored under a hash of the transcripts and of the audio files' names and contents, so that a
changed folder gives a new data set.
"""

import hashlib
import json
import os
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from sigmarep.data.audio import features
from sigmarep.data.datasets.speech_layouts import Entry, entries_by_split
from sigmarep.data.digests import content_digests
from sigmarep.errors import BadInput

RATE = 16000
REPORT = "problems.json"
# Number of files named in an error.
NAMED = 3


class SpeechFolder(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of the recordings of a folder; see the module docstring."""

    name = "speech_folder"
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First."}  # noqa: RUF012
    SKIP_REGISTERING = True

    def __init__(self, *, folder: str, **options: Any):
        """Finds the recordings.

        Raises:
          BadInput: see `speech_layouts.entries_by_split`.
        """
        self._folder = os.path.expanduser(folder)
        self._splits = entries_by_split(folder)
        self._problems: dict[str, Any] = {}
        entries = [(split, entry) for split, members in sorted(self._splits.items()) for entry in members]
        used = sorted({entry.path for _, entry in entries if not entry.problem})
        contents = content_digests(used, _digests_of(self._folder, options.get("data_dir")))
        digest = hashlib.sha256()
        for split, entry in entries:
            named = os.path.relpath(entry.path, self._folder)
            content = contents.get(entry.path, "")
            digest.update(json.dumps([split, named, content, entry.text, entry.speaker, entry.reason]).encode())
        super().__init__(config=tfds.core.BuilderConfig(name=digest.hexdigest()[:20]), **options)

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
        if read.divisor != 1:
            self._problems.setdefault("scaled", []).append(f"{named}: floats, divided by {read.divisor:.7g}")
        return features.to_int16(features.resampled(read.samples, read.rate, RATE))


def _digests_of(folder: str, data_dir: str | None) -> str | None:
    """File in which the digests of a folder's recordings are remembered."""
    name = hashlib.sha256(os.path.abspath(folder).encode()).hexdigest()[:20]
    return os.path.join(data_dir, "digests", f"{name}.json") if data_dir else None


def problems(builder: tfds.core.DatasetBuilder) -> dict[str, Any]:
    """Faults of the files of a prepared data set; {} if there are none, and for data sets that do not record them.

    Lists of "file: reason" by kind. Left out of the data set are `missing` (no audio file), `unreadable`, `empty_audio`,
    `empty_text`, `no_text` (audio without a transcript), `repeated` (another format of the same recording) and
    `malformed` (lines that do not follow the layout). Part of the data set are `resampled`, `averaged` (several channels)
    and `scaled` (floats outside [-1, 1]).
    """
    path = os.path.join(str(builder.data_dir), REPORT)
    if not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8") as file:
        return json.load(file)
