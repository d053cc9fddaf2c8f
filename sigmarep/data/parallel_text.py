"""Sentence pairs for translation, in batches of a number of tokens and of few shapes.

A pair belongs to the bucket of the least length that holds both sides. The rows of a bucket's batches are as many as fit
into the tokens of a batch, padding counted.
"""

import collections
import concurrent.futures
import functools
import json
import os
from collections.abc import Generator, Iterator

import ml_collections
import numpy as np
from ml_collections import config_dict

from sigmarep.data import sources, tokenised, vocabulary
from sigmarep.data.vocabulary import BOS, EOS, PAD, Vocabulary
from sigmarep.errors import BadInput

# Batches made ahead of the one that is trained on.
AHEAD = 4


def default_config() -> ml_collections.ConfigDict:
    """The block `config.data`."""
    config = ml_collections.ConfigDict()
    config.name = "interface_en_de"
    # Where prepared data sets lie; $TFDS_DATA_DIR, then ~/tensorflow_datasets, if None.
    config.data_dir = config_dict.placeholder(str)
    # The files of the set "text_folder".
    config.folder = ""
    config.train_split = "train"
    config.eval_splits = ("test",)
    # The features of the data set that are a sentence and its translation.
    config.source_feature = "en"
    config.target_feature = "de"
    # Tokens of a sentence with its end. Longer training pairs are left out, longer sources are cut for evaluation.
    config.max_source_length = 128
    config.max_target_length = 128
    # Lengths that batches have.
    config.buckets = (16, 32, 64, 128)
    # Rows of every batch are a multiple of this, so that they divide over devices, processes and microbatches.
    config.rows_multiple = 8
    # Of both languages.
    config.vocabulary = vocabulary.default_config()
    config.num_threads = 2
    return config


def pairs(data: ml_collections.ConfigDict, split: str) -> Iterator[tuple[str, str]]:
    """The sentence pairs of a split.

    Raises:
      BadInput: see `sources.open_source`; or they have no such features.
    """
    source = sources.open_source(data.name, split, data_dir=data.data_dir, text_folder=data.folder)
    for i in range(len(source)):
        yield _texts(data, source[i])


def texts(data: ml_collections.ConfigDict, split: str) -> Iterator[str]:
    """The sentences of both languages."""
    return (text for pair in pairs(data, split) for text in pair)


def _texts(data, example) -> tuple[str, str]:
    return (
        tokenised.feature(example, data.source_feature, "source_feature"),
        tokenised.feature(example, data.target_feature, "target_feature"),
    )


def open_vocabulary(data: ml_collections.ConfigDict) -> Vocabulary:
    """The vocabulary of `config.data`, of both languages; see `vocabulary.obtain`."""
    folder = os.path.join(sources.data_folder(data.data_dir), "vocabularies")

    key = f"{_fingerprint(data, data.train_split)}|{data.source_feature}|{data.target_feature}"
    return vocabulary.obtain(data.vocabulary, lambda: texts(data, data.train_split), cache_dir=folder, key=key)


def _fingerprint(data, split):
    return sources.fingerprint(data.name, split, data_dir=data.data_dir, text_folder=data.folder)


def run_files(vocab: Vocabulary, corpus: "PairCorpus") -> dict[str, bytes]:
    """What a run keeps of its data: the vocabulary, and what the training pairs were."""
    facts = {"fingerprint": corpus.fingerprint, **corpus.report}
    return {"vocabulary.model": vocab.to_bytes(), "data.json": json.dumps(facts, indent=2).encode() + b"\n"}


class PairCorpus:
    """The tokenised pairs of a split.

    Attributes:
      report: `pairs` there were, `empty` ones left out, and `too_long` ones: left out of training, cut for evaluation.
      fingerprint: names the content.
    """

    def __init__(self, data: ml_collections.ConfigDict, vocab: Vocabulary, split: str):
        """Raises BadInput where a field is wrong or nothing is left."""
        self.data = data
        self._limits = (data.max_source_length, data.max_target_length)
        if min(self._limits) < 2:
            raise BadInput(f"config.data.max_source_length, max_target_length = {self._limits}: expected at least 2")
        self._source = sources.open_source(data.name, split, data_dir=data.data_dir, text_folder=data.folder)
        key = f"{_fingerprint(data, split)}|{data.source_feature}|{data.target_feature}|{vocabulary.fingerprint(vocab)}"
        folder = os.path.join(sources.data_folder(data.data_dir), "tokenised")

        def encode():
            return [vocab.encode(text.strip()) for pair in pairs(data, split) for text in pair], {}

        # A source at every even place, its translation behind it.
        self._corpus = tokenised.obtain(folder, key, encode)
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
        # With the end of sentence; what is longer is cut.
        self.lengths = np.minimum(lengths[self._kept] + 1, self._limits)

    def __len__(self):
        return len(self._kept)

    def source_ids(self, index: int) -> np.ndarray:
        """Tokens of a source, (n,) int32, without its end."""
        return self._corpus[2 * int(self._kept[index])][: self._limits[0] - 1]

    def target_ids(self, index: int) -> np.ndarray:
        """Tokens of a translation, (n,) int32, without begin and end."""
        return self._corpus[2 * int(self._kept[index]) + 1][: self._limits[1] - 1]

    def texts(self, index: int) -> tuple[str, str]:
        """A source and its translation as they were written."""
        return _texts(self.data, self._source[int(self._kept[index])])


class BucketedBatches:
    """Batches of a corpus by bucket.

    A batch has `source` (B, S), the source with its end; `inputs` (B, T), begin and translation; `targets` (B, T),
    translation and end; `index` (B,), the number of each pair, −1 for the empty rows that fill a bucket's last batch. All
    are int32, padded with 0.

    Attributes:
      shapes: (rows, length of sources, length of translations) of each bucket that has pairs.
      batches_per_epoch: the same in every epoch.
    """

    def __init__(self, corpus: PairCorpus, *, batch_tokens: int, seed: int):
        """Raises BadInput where the buckets do not hold the pairs, or the tokens of a batch no bucket."""
        data = corpus.data
        buckets = tuple(data.buckets)
        longest = max(data.max_source_length, data.max_target_length)
        if not buckets or list(buckets) != sorted(set(buckets)) or buckets[0] < 1 or buckets[-1] < longest:
            raise BadInput(
                f"config.data.buckets = {buckets}: expected rising lengths, the last at least {longest} "
                "(max_source_length, max_target_length)"
            )
        if seed < 0:
            raise BadInput(f"config.seed = {seed}: expected 0 or more")
        if data.rows_multiple < 1:
            raise BadInput(f"config.data.rows_multiple = {data.rows_multiple}: expected at least 1")
        self._corpus, self._seed = corpus, seed
        of_pair = np.searchsorted(buckets, corpus.lengths.max(axis=1))
        self.shapes: list[tuple[int, int, int]] = []
        self._members: list[np.ndarray] = []
        for bucket, length in enumerate(buckets):
            members = np.flatnonzero(of_pair == bucket)
            if not len(members):
                continue
            rows = batch_tokens // length // data.rows_multiple * data.rows_multiple
            if not rows:
                raise BadInput(
                    f"config.batch_size = {batch_tokens}: tokens, too few for {data.rows_multiple} rows "
                    f"(config.data.rows_multiple) of {length} (config.data.buckets)"
                )
            self.shapes.append((rows, length, length))
            self._members.append(members)
        # (bucket, number of the batch in it), in order.
        self._all = [
            (bucket, number)
            for bucket, members in enumerate(self._members)
            for number in range(-(-len(members) // self.shapes[bucket][0]))
        ]
        self.batches_per_epoch = len(self._all)
        self._epoch = functools.lru_cache(maxsize=2)(self._shuffled)

    def stream(
        self, *, start: int, process_index: int = 0, process_count: int = 1
    ) -> Generator[dict[str, np.ndarray], None, None]:
        """This process's rows of the global batches `start`, `start + 1`, …, for ever.

        Every epoch has each pair once. A batch follows from the seed and its number alone.
        """
        self._check(process_count)
        with concurrent.futures.ThreadPoolExecutor(max(self._corpus.data.num_threads, 1)) as pool:
            waiting: collections.deque[concurrent.futures.Future] = collections.deque()
            number = start
            try:
                while True:
                    while len(waiting) < AHEAD:
                        waiting.append(pool.submit(self._training_batch, number, process_index, process_count))
                        number += 1
                    yield waiting.popleft().result()
            finally:
                pool.shutdown(cancel_futures=True)

    def evaluation(self, *, process_index: int = 0, process_count: int = 1) -> Iterator[dict[str, np.ndarray]]:
        """Every pair once, bucket by bucket; this process's rows of each global batch."""
        self._check(process_count)
        for bucket, number in self._all:
            rows = self.shapes[bucket][0]
            members = self._members[bucket][number * rows : (number + 1) * rows]
            yield self._batch(bucket, members, process_index, process_count)

    def _check(self, process_count: int) -> None:
        multiple = self._corpus.data.rows_multiple
        if multiple % process_count:
            raise BadInput(
                f"config.data.rows_multiple = {multiple}: does not divide over {process_count} processes; use a "
                f"multiple of {process_count}"
            )

    def _shuffled(self, epoch: int) -> tuple[list[tuple[int, int]], list[np.ndarray]]:
        rng = np.random.default_rng([self._seed, epoch])
        members = [rng.permutation(each) for each in self._members]
        return [self._all[i] for i in rng.permutation(len(self._all))], members

    def _training_batch(self, number: int, process_index: int, process_count: int) -> dict[str, np.ndarray]:
        epoch, place = divmod(number, self.batches_per_epoch)
        order, members = self._epoch(epoch)
        bucket, within = order[place]
        rows = self.shapes[bucket][0]
        chosen = members[bucket][within * rows : (within + 1) * rows]
        return self._batch(bucket, chosen, process_index, process_count)

    def _batch(self, bucket: int, members: np.ndarray, process_index: int, process_count: int) -> dict[str, np.ndarray]:
        rows, source_length, target_length = self.shapes[bucket]
        local = rows // process_count
        mine = members[process_index * local : (process_index + 1) * local]
        batch = {
            "source": np.full((local, source_length), PAD, np.int32),
            "inputs": np.full((local, target_length), PAD, np.int32),
            "targets": np.full((local, target_length), PAD, np.int32),
            "index": np.full(local, -1, np.int32),
        }
        batch["index"][: len(mine)] = mine
        for row, member in enumerate(mine):
            source, target = self._corpus.source_ids(member), self._corpus.target_ids(member)
            batch["source"][row, : len(source) + 1] = [*source, EOS]
            batch["inputs"][row, : len(target) + 1] = [BOS, *target]
            batch["targets"][row, : len(target) + 1] = [*target, EOS]
        return batch
