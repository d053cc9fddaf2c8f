"""Utterances and transcripts for speech recognition, in batches of few shapes whose size is in seconds of audio."""

import collections
import functools
import io
import json
import math
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from sigmarep import configuration
from sigmarep.data import sources, token_cache
from sigmarep.data.audio import labels as label_sets
from sigmarep.data.audio.features import LogMel, spec_augment
from sigmarep.data.audio.labels import Encoded, Labels
from sigmarep.data.buckets import Buckets, Share, checked, planned_rows
from sigmarep.data.datasets.speech_folder import problems
from sigmarep.errors import BadInput
from sigmarep.fields import field, with_defaults
from sigmarep.files import write_atomically

# Letters per second of fast speech.
LABELS_PER_SECOND = 20
# Number of utterances that a report names per kind of fault.
NAMED = 20


FIELDS: dict[str, Any] = {
    **with_defaults(sources.FIELDS, name="spoken_sentences"),
    "folder": field("", "Recordings of the data set speech_folder."),
    "audio_feature": field("audio", "Feature of the data set that holds the samples."),
    "text_feature": field("text", "Feature that holds the transcript."),
    "ignored_texts": field(
        ("ignore_time_segment_in_scoring",),
        "Utterances with these transcripts are left out, as TED-LIUM's unscored segments.",
    ),
    "speaker_feature": field("speaker", "Feature that names the speaker, if there is one."),
    "id_feature": field("id", "Feature that names the utterance, if there is one."),
    "sample_rate": field(16_000, "Samples a second of the data set's audio.", at_least=1, at_most=10**7),
    "num_filters": field(80, "Mel filters.", at_least=1, at_most=2**14),
    "window_seconds": field(0.025, "Length of a spectrum's window in seconds.", above=0, at_most=60),
    "hop_seconds": field(0.010, "Seconds from one spectrum to the next.", above=0, at_most=60),
    "buckets": field(
        (2.0, 4.0, 8.0, 16.0, 24.0, 36.0),
        "Longest utterances of batches in seconds; longer training utterances are left out.",
        nonempty=True,
        above=0,
        at_most=1e5,
        order="rising",
    ),
    "rows_multiple": field(
        8,
        "Rows of a batch are a multiple of this, so that they divide over devices, processes and microbatches.",
        at_least=1,
        at_most=2**20,
    ),
    "labels": label_sets.FIELDS,
    "spec_augment": {
        "start_step": field(0, "SpecAugment masks from this update on.", at_least=0),
        "freq_masks": field(0, "Masks over filters.", at_least=0, at_most=1000),
        "freq_width": field(27, "Largest width of one, in filters.", at_least=0, at_most=2**14),
        "time_masks": field(0, "Masks over time.", at_least=0, at_most=1000),
        "time_width": field(50, "Largest width of one, in frames.", at_least=0, at_most=2**20),
        "time_fraction": field(
            0.1, "Largest fraction of an utterance under one mask over time.", at_least=0, at_most=1
        ),
    },
    "in_memory": field(False, "Keeps the spectra of all utterances in memory: 115 MB an hour with 80 filters."),
}


def default_config() -> ml_collections.ConfigDict:
    """The section `config.data` of speech recognition."""
    return configuration.make(FIELDS)


def open_labels(data: ml_collections.ConfigDict) -> Labels:
    """Opens the labels of `config.data.labels`; see `labels.obtain`."""
    folder = os.path.join(sources.data_folder(data.data_dir), "vocabularies")
    key = f"{_fingerprint(data, data.train_split)}|{data.text_feature}|{tuple(data.ignored_texts)}"

    def texts():
        return [text for text in _index(data, data.train_split).texts if not _ignored(data, text)]

    return label_sets.obtain(data.labels, texts, cache_dir=folder, key=key)


def _ignored(data: ml_collections.ConfigDict, text: str) -> bool:
    return text.strip() in data.ignored_texts


def filterbank(data: ml_collections.ConfigDict) -> LogMel:
    """The filterbank that `config.data` configures.

    Raises:
      BadInput: the fields do not fit together.
    """
    try:
        return LogMel(
            sample_rate=data.sample_rate,
            num_filters=data.num_filters,
            window_seconds=data.window_seconds,
            hop_seconds=data.hop_seconds,
        )
    except ValueError as error:
        raise BadInput(f"config.data.{error}") from error


class Index(NamedTuple):
    """The utterances of a split without their audio.

    Attributes:
      samples: (n,) int64, number of samples of each.
      texts: transcripts.
      speakers, ids: "" where the data set has none.
    """

    samples: np.ndarray
    texts: list[str]
    speakers: list[str]
    ids: list[str]


def _open(data, split):
    return sources.open_source(data.name, split, data_dir=data.data_dir, folder=data.folder)


def _fingerprint(data, split):
    return sources.fingerprint(data.name, split, data_dir=data.data_dir, folder=data.folder)


def _index(data: ml_collections.ConfigDict, split: str) -> Index:
    """Index of a split, from the cache in the data sets' folder; reads every utterance the first time."""
    names = (data.audio_feature, data.text_feature, data.speaker_feature, data.id_feature)
    key = token_cache.key_digest(f"{_fingerprint(data, split)}|{names}")
    path = os.path.join(sources.data_folder(data.data_dir), "utterances", f"{key}.npz")

    def create() -> None:
        index = _read_all(data, split)
        content = io.BytesIO()
        words = json.dumps([index.texts, index.speakers, index.ids]).encode()
        np.savez(content, samples=index.samples, words=np.frombuffer(words, np.uint8))
        write_atomically(path, content.getvalue())

    token_cache.create_once(path, create)
    with np.load(path) as stored:
        return Index(stored["samples"], *json.loads(stored["words"].tobytes()))


def _read_all(data, split) -> Index:
    source = _open(data, split)
    lengths: list[int] = []
    texts: list[str] = []
    speakers: list[str] = []
    ids: list[str] = []
    for i in range(len(source)):
        example = source[i]
        lengths.append(len(_audio(data, example)))
        texts.append(token_cache.feature(example, data.text_feature, "text_feature"))
        for name, values in ((data.speaker_feature, speakers), (data.id_feature, ids)):
            values.append(token_cache.feature(example, name, "") if name in example else "")
    return Index(np.array(lengths, np.int64), texts, speakers, ids)


def _audio(data, example) -> np.ndarray:
    if data.audio_feature not in example:
        raise BadInput(
            f"config.data.audio_feature = {data.audio_feature!r}: the data set has no such feature; it has "
            f"{', '.join(example)}"
        )
    samples = np.asarray(example[data.audio_feature])
    if samples.ndim != 1:
        raise BadInput(f"config.data.audio_feature = {data.audio_feature!r}: expected one channel of samples")
    return samples.astype(np.float32) / 32768 if samples.dtype.kind in "iu" else samples.astype(np.float32)


class SpeechCorpus:
    """The utterances of a split and their labels.

    Training leaves out utterances with unknown characters, utterances longer than the last bucket, and utterances with too
    few frames for a CTC alignment. Evaluation scores all utterances; its loss leaves out those with unknown characters or
    without an alignment. Utterances whose text is one of `data.ignored_texts` are in neither.

    Attributes:
      frames: (n,) int64, number of filterbank frames of each utterance.
      seconds: (n,), duration of each.
      labels_of: labels of each.
      scored: (n,) bool, True if all characters of the transcript have a label.
      texts, speakers, names: normalized transcript, speaker and name of each.
      report: numbers and names of utterances that were left out or are unusual.
      fingerprint: identifies the content.
    """

    def __init__(self, data: ml_collections.ConfigDict, labels: Labels, split: str, *, stride: int):
        """Reads the index of a split and selects its utterances.

        Args:
          data: `config.data`.
          labels: labels of the transcripts.
          split: the split.
          stride: number of frames that the model combines into one.

        Raises:
          BadInput: a field has an invalid value, no utterance is left, or an utterance to be evaluated is longer than the
            last bucket.
        """
        checked(data.buckets)
        _check_sample_rate(data)
        self.data, self.labels = data, labels
        self._filterbank = filterbank(data)
        self._source = _open(data, split)
        index = _index(data, split)
        training = split == data.train_split
        encoded = [labels.encode(labels.normalize(text)) for text in index.texts]
        frames = np.array([self._filterbank.frames(int(n)) for n in index.samples], np.int64)
        seconds = index.samples / data.sample_rate
        odd = self._odd(index, encoded, frames, stride)
        unknown = collections.Counter(c for i in np.flatnonzero(~odd["ignored"]) for c in encoded[i].unknown)
        self.report: dict[str, Any] = {
            "utterances": len(frames),
            "hours": round(float(seconds.sum()) / 3600, 4),
            **_counted(index, odd),
            "characters_without_label": dict(unknown.most_common(NAMED)),
            **_preparation(data),
        }
        if not training:
            self._check_length(index, np.where(odd["too_long"] & ~odd["ignored"], seconds, 0), split)
        left_out = np.any(list(odd.values()), axis=0) if training else odd["ignored"]
        self._kept = np.flatnonzero(~left_out)
        if not len(self._kept):
            counts = ", ".join(f"{name} {self.report[name]['count']}" for name in odd)
            raise BadInput(f"config.data: no utterance of the split {split!r} of {data.name} is left ({counts})")
        self.report["kept"] = len(self._kept)
        self.frames, self.seconds = frames[self._kept], seconds[self._kept]
        self.labels_of = [encoded[i].labels for i in self._kept]
        self.scored = ~np.array([bool(encoded[i].unknown) for i in self._kept])
        self.texts = [labels.normalize(index.texts[i]) for i in self._kept]
        self.speakers = [index.speakers[i] for i in self._kept]
        self.names = [_name(index, int(i)) for i in self._kept]
        self.fingerprint = token_cache.key_digest(f"{_fingerprint(data, split)}|{self._filterbank}|{stride}")
        self._features = functools.cache(self._computed) if data.in_memory else self._computed

    def _odd(self, index: Index, encoded: list[Encoded], frames: np.ndarray, stride: int) -> dict[str, np.ndarray]:
        """Masks (n,) of the utterances that training leaves out, by reason."""
        needed = np.array([len(each.labels) + _repeats(each.labels) for each in encoded])
        ignored = np.array([_ignored(self.data, text) for text in index.texts])
        return {
            "unknown_characters": np.array([bool(each.unknown) for each in encoded]) & ~ignored,
            "too_long": index.samples / self.data.sample_rate > self.data.buckets[-1],
            "too_short": frames // stride < needed,
            "no_audio": frames < stride,
            "ignored": ignored,
        }

    def _check_length(self, index: Index, too_long: np.ndarray, split: str) -> None:
        """`too_long` (n,): the seconds of utterances to be evaluated that no bucket holds, else 0."""
        if too_long.any():
            longest = int(np.argmax(too_long))
            raise BadInput(
                f"config.data.buckets = {tuple(self.data.buckets)}: the utterance {_name(index, longest)} of the split "
                f"{split!r} lasts {too_long[longest]:.1f} s; the last bucket must hold it"
            )

    def __len__(self):
        return len(self._kept)

    def features(self, index: int) -> np.ndarray:
        """Filterbank features of an utterance, (frames, filters) float32."""
        return self._features(int(index))

    def _computed(self, index: int) -> np.ndarray:
        return self._filterbank(_audio(self.data, self._source[int(self._kept[index])]))


def _check_sample_rate(data: ml_collections.ConfigDict) -> None:
    rate = sources.sample_rate(data.name, data.audio_feature, data_dir=data.data_dir, folder=data.folder)
    if rate not in (None, data.sample_rate):
        raise BadInput(f"config.data.sample_rate = {data.sample_rate}: the audio of {data.name} has {rate} Hz")


def _counted(index: Index, odd: dict[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Number and first names of the utterances that each mask (n,) of `odd` marks."""
    return {
        name: {"count": int(mask.sum()), "names": [_name(index, int(i)) for i in np.flatnonzero(mask)[:NAMED]]}
        for name, mask in odd.items()
    }


def _preparation(data: ml_collections.ConfigDict) -> dict[str, Any]:
    """`preparation`: files of one's own folder that could not be read or were converted, if there are any."""
    if sources.is_supplied(data.name):
        return {}
    problem = problems(sources.builder(data.name, data_dir=data.data_dir, folder=data.folder))
    return {"preparation": problem} if problem else {}


def _repeats(labels: np.ndarray) -> int:
    return int(np.sum(labels[1:] == labels[:-1]))


def _name(index: Index, i: int) -> str:
    return index.ids[i] or f"number {i}"


def run_files(labels: Labels, corpus: SpeechCorpus) -> dict[str, bytes]:
    """Files that a run stores: the labels, and a description of the training utterances."""
    facts = {"fingerprint": corpus.fingerprint, **corpus.report}
    return {
        label_sets.FILE: labels.to_bytes(),
        "data.json": json.dumps(facts, indent=2, ensure_ascii=False).encode() + b"\n",
    }


class SpeechBatches:
    """Batches of a corpus by bucket; `config.batch_size` is the largest size of a batch in seconds, padding included.

    A batch has `features` (B, T, F) float32; `frames` (B,) int32, the number of real frames; `labels` (B, U) int32, padded
    with the blank 0; `label_lengths` (B,) int32; `index` (B,) int32, the number of each utterance, −1 for the empty rows
    that fill a bucket's last batch; and `weights` (B,) float32, 1 for utterances whose loss counts.

    Attributes:
      shapes: (B, T, U) of each bucket that has utterances.
      batches_per_epoch: the same in every epoch.
      size: of all examples, each padded to its bucket, in the unit of `config.batch_size`.
      seconds_per_batch: mean size of a batch, padding included.
    """

    def __init__(self, corpus: SpeechCorpus, *, batch_seconds: float, seed: int, stride: int):
        """Raises BadInput where the seconds of a batch hold no bucket, or a field is wrong."""
        data = corpus.data
        _check_spec_augment(data.spec_augment, data.num_filters)
        self._corpus, self._seed = corpus, seed
        self._buckets = Buckets(
            corpus.seconds,
            data.buckets,
            batch_size=batch_seconds,
            unit="seconds",
            rows_multiple=data.rows_multiple,
            seed=seed,
            num_threads=data.num_threads,
        )
        self.shapes = [
            (
                rows,
                _length(data, seconds, stride),
                # A multiple of 16, so that splits with similar transcripts share compiled programs.
                -(-max(max(len(corpus.labels_of[member]) for member in members), 1) // 16) * 16,
            )
            for (rows, seconds), members in zip(self._buckets.shapes, self._buckets.members, strict=True)
        ]
        self.batches_per_epoch = self._buckets.batches_per_epoch
        self.size = self._buckets.size
        counts = [
            -(-len(members) // rows)
            for (rows, _), members in zip(self._buckets.shapes, self._buckets.members, strict=True)
        ]
        padded = sum(
            count * rows * seconds for count, (rows, seconds) in zip(counts, self._buckets.shapes, strict=True)
        )
        self.seconds_per_batch = padded / self.batches_per_epoch

    def stream(self, *, start: int, process_index: int = 0, process_count: int = 1) -> Iterator[dict[str, np.ndarray]]:
        """See `sigmarep.data.buckets.Buckets.stream`."""
        return self._buckets.stream(self._batch, start=start, process_index=process_index, process_count=process_count)

    def evaluation(self, *, process_index: int = 0, process_count: int = 1) -> Iterator[dict[str, np.ndarray]]:
        """See `sigmarep.data.buckets.Buckets.evaluation`."""
        return self._buckets.evaluation(self._batch, process_index=process_index, process_count=process_count)

    def _batch(self, share: Share) -> dict[str, np.ndarray]:
        _, length, most = self.shapes[share.bucket]
        batch = {
            "features": np.zeros((share.rows, length, self._corpus.data.num_filters), np.float32),
            "frames": np.zeros(share.rows, np.int32),
            "labels": np.zeros((share.rows, most), np.int32),
            "label_lengths": np.zeros(share.rows, np.int32),
            "index": share.numbers(),
            "weights": np.zeros(share.rows, np.float32),
        }
        masks = self._corpus.data.spec_augment
        augmented = share.number is not None and share.number >= masks.start_step
        for row, member in enumerate(share.members):
            features, labels = self._corpus.features(member), self._corpus.labels_of[member]
            if augmented and (masks.freq_masks or masks.time_masks):
                # Seeded by the row of the global batch, so that the number of processes does not matter.
                rng = np.random.default_rng((self._seed, share.number or 0, share.first_row + row))
                options = {name: masks[name] for name in masks if name != "start_step"}
                features = spec_augment(features, rng, **options)
            batch["features"][row, : len(features)] = features
            batch["frames"][row] = len(features)
            batch["labels"][row, : len(labels)] = labels
            batch["label_lengths"][row] = len(labels)
            batch["weights"][row] = self._corpus.scored[member]
        return batch


def _length(data: ml_collections.ConfigDict, seconds: float, stride: int) -> int:
    """Number of frames of a bucket, a multiple of the model's stride."""
    return -(-filterbank(data).frames(round(seconds * data.sample_rate)) // stride) * stride


def planned_shapes(data: ml_collections.ConfigDict, *, batch_seconds: float, stride: int) -> list[tuple[int, int, int]]:
    """`SpeechBatches.shapes` from the configuration alone, for buckets that all have fast speech."""
    rows = planned_rows(checked(data.buckets), batch_seconds, data.rows_multiple)
    return [
        (count, _length(data, seconds, stride), math.ceil(seconds * LABELS_PER_SECOND))
        for count, seconds in zip(rows, data.buckets, strict=True)
    ]


def _check_spec_augment(masks: ml_collections.ConfigDict, filters: int) -> None:
    if masks.freq_masks and masks.freq_width > filters:
        raise BadInput(
            f"config.data.spec_augment.freq_width = {masks.freq_width}: expected at most config.data.num_filters = "
            f"{filters}"
        )
