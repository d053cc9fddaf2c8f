"""Sentence pairs for translation, in batches of few shapes whose size is a number of tokens.

A pair belongs to the smallest bucket that holds both sides. A bucket's batches have as many rows as fit into the batch
size, padding included.
"""

import json
import os
from collections.abc import Iterator
from typing import Any

import ml_collections
import numpy as np

from sigmarep import configuration
from sigmarep.data import sources, token_cache
from sigmarep.data.buckets import Buckets, Share
from sigmarep.data.text import vocabulary
from sigmarep.data.text.vocabulary import BOS, EOS, PAD, Vocabulary
from sigmarep.errors import BadInput
from sigmarep.fields import field, with_defaults

_ROWS = "Rows of a batch are a multiple of this, so that they divide over devices, processes and microbatches."
FIELDS: dict[str, Any] = {
    **with_defaults(sources.FIELDS, name="interface_en_de"),
    "folder": field("", "Files of the data set text_folder."),
    "source_feature": field("en", "Feature of the data set that holds a sentence."),
    "target_feature": field("de", "Feature of the data set that holds its translation."),
    "max_source_length": field(
        128, "Tokens of a source with its end; longer training pairs are left out.", at_least=2, at_most=2**20
    ),
    "max_target_length": field(128, "Tokens of a target with its end.", at_least=2, at_most=2**20),
    "buckets": field((16, 32, 64, 128), "Lengths of batches, in tokens.", nonempty=True, at_least=1, order="rising"),
    "rows_multiple": field(8, _ROWS, at_least=1, at_most=2**20),
    # One vocabulary for both languages.
    "vocabulary": vocabulary.FIELDS,
}


def default_config() -> ml_collections.ConfigDict:
    """The section `config.data` of translation."""
    return configuration.make(FIELDS)


def pairs(data: ml_collections.ConfigDict, split: str) -> Iterator[tuple[str, str]]:
    """Yields the sentence pairs of a split.

    Raises:
      BadInput: see `sources.open_source`; or the data set does not have the features.
    """
    source = sources.open_source(data.name, split, data_dir=data.data_dir, folder=data.folder)
    for i in range(len(source)):
        yield _texts(data, source[i])


def texts(data: ml_collections.ConfigDict, split: str) -> Iterator[str]:
    """Yields the sentences of both languages."""
    return (text for pair in pairs(data, split) for text in pair)


def _texts(data, example) -> tuple[str, str]:
    return (
        token_cache.feature(example, data.source_feature, "source_feature"),
        token_cache.feature(example, data.target_feature, "target_feature"),
    )


def open_vocabulary(data: ml_collections.ConfigDict) -> Vocabulary:
    """Opens the vocabulary of `config.data`, which both languages share; see `vocabulary.obtain`."""
    folder = os.path.join(sources.data_folder(data.data_dir), "vocabularies")

    key = f"{_fingerprint(data, data.train_split)}|{data.source_feature}|{data.target_feature}"
    return vocabulary.obtain(data.vocabulary, lambda: texts(data, data.train_split), cache_dir=folder, key=key)


def _fingerprint(data, split):
    return sources.fingerprint(data.name, split, data_dir=data.data_dir, folder=data.folder)


def run_files(vocab: Vocabulary, corpus: "PairCorpus") -> dict[str, bytes]:
    """Files that a run stores: the vocabulary, and a description of the training pairs."""
    facts = {"fingerprint": corpus.fingerprint, **corpus.report}
    return {vocabulary.FILE: vocab.to_bytes(), "data.json": json.dumps(facts, indent=2).encode() + b"\n"}


class PairCorpus:
    """The tokenized pairs of a split.

    Attributes:
      lengths: (pairs, 2), tokens of source and translation, each with its end.
      report: numbers of all `pairs`, of `empty` ones, which are left out, and of `too_long` ones, which are left out in
        training and truncated in evaluation.
      fingerprint: identifies the content.
    """

    def __init__(self, data: ml_collections.ConfigDict, vocab: Vocabulary, split: str):
        """Tokenizes a split, or reads it from the cache.

        Raises:
          BadInput: see `sources.open_source`; or no pair is left.
        """
        self.data = data
        self._limits = (data.max_source_length, data.max_target_length)
        self._source = sources.open_source(data.name, split, data_dir=data.data_dir, folder=data.folder)
        key = f"{_fingerprint(data, split)}|{data.source_feature}|{data.target_feature}|{vocabulary.fingerprint(vocab)}"
        folder = os.path.join(sources.data_folder(data.data_dir), "tokenised")

        def encode():
            return [vocab.encode(text.strip()) for pair in pairs(data, split) for text in pair], {}

        # Texts alternate: a source, then its translation.
        self._corpus = token_cache.obtain(folder, key, encode)
        lengths = np.diff(self._corpus.offsets).reshape(-1, 2)
        empty = lengths.min(axis=1) == 0
        too_long = (lengths + 1 > np.array(self._limits)).any(axis=1) & ~empty
        self.report = {"pairs": len(lengths), "empty": int(empty.sum()), "too_long": int(too_long.sum())}
        self.fingerprint = f"{self._corpus.fingerprint}-{self._limits[0]}-{self._limits[1]}"
        self._kept = np.flatnonzero(~empty & ~too_long if split == data.train_split else ~empty)
        if not len(self._kept):
            raise BadInput(
                f"config.data: no pair of the split {split!r} of {data.name} is left (pairs {len(lengths)}, empty "
                f"{self.report['empty']}, longer than max_source_length or max_target_length {self.report['too_long']})"
            )
        # With the end of sentence; longer sentences are truncated.
        self.lengths = np.minimum(lengths[self._kept] + 1, self._limits)

    def __len__(self):
        return len(self._kept)

    def source_ids(self, index: int) -> np.ndarray:
        """Tokens of a source, (n,) int32, without the end of sentence."""
        return self._corpus[2 * int(self._kept[index])][: self._limits[0] - 1]

    def target_ids(self, index: int) -> np.ndarray:
        """Tokens of a translation, (n,) int32, without begin and end of sentence."""
        return self._corpus[2 * int(self._kept[index]) + 1][: self._limits[1] - 1]

    def texts(self, index: int) -> tuple[str, str]:
        """A source and its translation as text."""
        return _texts(self.data, self._source[int(self._kept[index])])


class BucketedBatches:
    """Batches of a corpus by bucket; `config.batch_size` is a number of tokens.

    A batch has `source` (B, S), the source and its end; `inputs` (B, T), begin and translation; `targets` (B, T),
    translation and end; and `index` (B,), the number of each pair, −1 for the empty rows that fill a bucket's last batch.
    All are int32, padded with 0.

    Attributes:
      shapes: (rows, length of sources, length of translations) of each bucket that has pairs.
      batches_per_epoch: the same in every epoch.
      size: of all examples, each padded to its bucket, in the unit of `config.batch_size`.
    """

    def __init__(self, corpus: PairCorpus, *, batch_tokens: int, seed: int):
        """Raises BadInput where the buckets do not hold the pairs, or the tokens of a batch no bucket."""
        data = corpus.data
        longest = max(data.max_source_length, data.max_target_length)
        if not len(data.buckets) or data.buckets[-1] < longest:
            raise BadInput(
                f"config.data.buckets = {tuple(data.buckets)}: expected rising lengths, the last at least {longest} "
                "(max_source_length, max_target_length)"
            )
        self._corpus = corpus
        self._buckets = Buckets(
            corpus.lengths.max(axis=1),
            data.buckets,
            batch_size=batch_tokens,
            unit="tokens",
            rows_multiple=data.rows_multiple,
            seed=seed,
            num_threads=data.num_threads,
        )
        self.shapes = [(rows, int(length), int(length)) for rows, length in self._buckets.shapes]
        self.batches_per_epoch = self._buckets.batches_per_epoch
        self.size = self._buckets.size

    def stream(self, *, start: int, process_index: int = 0, process_count: int = 1):
        """See `sigmarep.data.buckets.Buckets.stream`."""
        return self._buckets.stream(self._batch, start=start, process_index=process_index, process_count=process_count)

    def evaluation(self, *, process_index: int = 0, process_count: int = 1):
        """See `sigmarep.data.buckets.Buckets.evaluation`."""
        return self._buckets.evaluation(self._batch, process_index=process_index, process_count=process_count)

    def _batch(self, share: Share) -> dict[str, np.ndarray]:
        _, source_length, target_length = self.shapes[share.bucket]
        batch = {
            "source": np.full((share.rows, source_length), PAD, np.int32),
            "inputs": np.full((share.rows, target_length), PAD, np.int32),
            "targets": np.full((share.rows, target_length), PAD, np.int32),
            "index": share.numbers(),
        }
        for row, member in enumerate(share.members):
            source, target = self._corpus.source_ids(member), self._corpus.target_ids(member)
            batch["source"][row, : len(source) + 1] = [*source, EOS]
            batch["inputs"][row, : len(target) + 1] = [BOS, *target]
            batch["targets"][row, : len(target) + 1] = [*target, EOS]
        return batch
