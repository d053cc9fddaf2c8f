"""Text for language models: tokenized once, and cut or packed into windows of one length.

A document of n tokens has n + 1 inputs (a begin token, then its tokens) and n + 1 targets (its tokens, then an end token).
"""

import bisect
import json
import os
from collections.abc import Iterator
from typing import Any

import ml_collections
import numpy as np

from sigmarep import configuration
from sigmarep.data import sources, token_cache
from sigmarep.data.text import vocabulary
from sigmarep.data.text.vocabulary import BOS, EOS, PAD, Vocabulary
from sigmarep.errors import BadInput
from sigmarep.fields import field, with_defaults

PACKINGS = ("documents", "stream")


FIELDS: dict[str, Any] = {
    **with_defaults(sources.FIELDS, name="python_docs"),
    "folder": field("", "Files of the data set text_folder."),
    "text_feature": field("text", "Feature of the data set that holds the text."),
    "sequence_length": field(256, "Tokens of a window.", at_least=1, at_most=2**24),
    "packing": field(
        "documents",
        "documents: short ones share a window and do not see each other; stream: one text, cut anywhere.",
        choices=PACKINGS,
    ),
    "eval_stride": field(
        0,
        "With stream, tokens from one evaluated window to the next; earlier ones are context. 0: no overlap.",
        at_least=0,
    ),
    "vocabulary": vocabulary.FIELDS,
}


def default_config() -> ml_collections.ConfigDict:
    """The section `config.data` of language modeling."""
    return configuration.make(FIELDS)


def texts(data: ml_collections.ConfigDict, split: str) -> Iterator[str]:
    """Yields the documents of a split.

    Raises:
      BadInput: see `sources.open_source`; or the data set does not have the feature.
    """
    source = sources.open_source(data.name, split, data_dir=data.data_dir, folder=data.folder)
    for i in range(len(source)):
        yield token_cache.feature(source[i], data.text_feature, "text_feature")


def open_vocabulary(data: ml_collections.ConfigDict) -> Vocabulary:
    """Opens the vocabulary of `config.data`; see `vocabulary.obtain`."""
    folder = os.path.join(sources.data_folder(data.data_dir), "vocabularies")
    key = f"{_fingerprint(data, data.train_split)}|{data.text_feature}"
    return vocabulary.obtain(data.vocabulary, lambda: texts(data, data.train_split), cache_dir=folder, key=key)


def run_files(vocab: Vocabulary, windows: "Windows") -> dict[str, bytes]:
    """Files that a run stores: the vocabulary, and a description of the training windows."""
    facts = {"fingerprint": windows.fingerprint, "targets": windows.num_tokens, **windows.report}
    return {vocabulary.FILE: vocab.to_bytes(), "data.json": json.dumps(facts, indent=2).encode() + b"\n"}


def open_windows(data: ml_collections.ConfigDict, vocab: Vocabulary, split: str, *, train: bool) -> "Windows":
    """Opens the windows of a split. Windows for training never overlap; others do with `data.eval_stride`.

    Raises:
      BadInput: a field has an invalid value, or the split has no text.
    """
    if data.eval_stride and (data.packing != "stream" or not 0 < data.eval_stride <= data.sequence_length):
        raise BadInput(
            f"config.data.eval_stride = {data.eval_stride}: needs packing = 'stream' and a number from 1 to "
            f"sequence_length = {data.sequence_length}"
        )
    key = f"{_fingerprint(data, split)}|{data.text_feature}|{vocabulary.fingerprint(vocab)}"
    folder = os.path.join(sources.data_folder(data.data_dir), "tokenised")
    corpus = token_cache.obtain(folder, key, lambda: _encoded(texts(data, split), vocab))
    if not len(corpus):
        raise BadInput(f"config.data: the split {split!r} of {data.name} has no text")
    stride = data.eval_stride if not train else 0
    return Windows(corpus, data.sequence_length, packing=data.packing, stride=stride)


def _fingerprint(data, split):
    return sources.fingerprint(data.name, split, data_dir=data.data_dir, folder=data.folder)


def _encoded(documents: Iterator[str], vocab: Vocabulary) -> tuple[list[np.ndarray], dict[str, int]]:
    """Encodes the documents that are not empty; also returns counts of their text."""
    encoded: list[np.ndarray] = []
    counts = {"documents": 0, "empty_documents": 0, "words": 0, "bytes": 0}
    for text in documents:
        if not text.strip():
            counts["empty_documents"] += 1
            continue
        counts["documents"] += 1
        counts["words"] += len(vocabulary.split_words(text))
        counts["bytes"] += len(text.encode())
        encoded.append(vocab.encode(text))
    return encoded, counts


class Windows:
    """Windows of T tokens.

    A window is a dictionary of arrays (T,): `tokens`; `targets`; `weights`, 1 where the target is to be predicted;
    `segments`, 1, 2, … by document and 0 for padding; and `positions`, from 0 in each segment. Every target of the corpus
    has weight 1 in exactly one window.

    Attributes:
      num_tokens: number of targets.
      num_words, num_bytes: of the text. The end of a line counts as a word, as is the convention for WikiText-103.
      report: number of documents, and of empty documents that were left out.
      fingerprint: identifies the content and the way it is cut.
    """

    def __init__(self, corpus: token_cache.Corpus, length: int, *, packing: str, stride: int = 0):
        self._corpus, self._length, self._stride = corpus, length, stride
        # Number of targets before each document.
        self._starts = corpus.offsets + np.arange(len(corpus) + 1)
        self.num_tokens = int(self._starts[-1])
        self.num_words, self.num_bytes = corpus.counts["words"], corpus.counts["bytes"]
        self.report = dict(corpus.counts)
        self.fingerprint = f"{corpus.fingerprint}-{packing}-{length}-{stride}"
        self._packed = _pack(np.diff(self._starts), length) if packing == "documents" else None

    def __len__(self):
        if self._packed is not None:
            return len(self._packed)
        beyond = max(self.num_tokens - self._length, 0)
        return 1 + -(-beyond // (self._stride or self._length))

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        window = {
            "tokens": np.full(self._length, PAD, np.int32),
            "targets": np.full(self._length, PAD, np.int32),
            "weights": np.zeros(self._length, np.float32),
            "segments": np.zeros(self._length, np.int32),
            "positions": np.zeros(self._length, np.int32),
        }
        if self._packed is None:
            start = index * (self._stride or self._length)
            pieces = [(start, min(start + self._length, self.num_tokens))]
        else:
            pieces = [
                (self._starts[document] + first, self._starts[document] + last)
                for document, first, last in self._packed[index]
            ]
        place = 0
        for segment, (first, last) in enumerate(pieces, 1):
            part = slice(place, place + int(last - first))
            window["tokens"][part], window["targets"][part] = self._between(int(first), int(last))
            window["weights"][part] = 1
            window["segments"][part] = segment
            window["positions"][part] = np.arange(last - first)
            place = part.stop
        if self._stride and index:
            # Targets of earlier windows are only context.
            window["weights"][: self._length - self._stride] = 0
        return window

    def targets(self) -> Iterator[np.ndarray]:
        """Yields the targets of each document."""
        for i in range(len(self._corpus)):
            yield np.append(self._corpus[i], EOS)

    def _between(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets `first` to `last` of the concatenated documents."""
        inputs, targets = [], []
        document = int(np.searchsorted(self._starts, first, side="right")) - 1
        while first < last:
            low, high = self._starts[document], min(self._starts[document + 1], last)
            whole = np.concatenate([[BOS], self._corpus[document], [EOS]])[first - low : high - low + 1]
            inputs.append(whole[:-1])
            targets.append(whole[1:])
            first, document = high, document + 1
        return np.concatenate(inputs), np.concatenate(targets)


def _pack(lengths: np.ndarray, window: int) -> list[list[tuple[int, int, int]]]:
    """Assigns pieces (document, first, last) to windows by best fit, the longest piece first.

    Documents longer than a window are cut into full windows and a remainder.
    """
    packed: list[list[tuple[int, int, int]]] = []
    rests = []
    for document, length in enumerate(lengths.tolist()):
        whole = length // window * window
        packed += [[(document, first, first + window)] for first in range(0, whole, window)]
        if whole < length:
            rests.append((length - whole, document, whole))
    rests.sort(key=lambda rest: (-rest[0], rest[1]))
    # Windows by the room that is left in them, and the sorted amounts of room that occur.
    room: dict[int, list[int]] = {}
    amounts: list[int] = []
    for size, document, first in rests:
        at = bisect.bisect_left(amounts, size)
        if at < len(amounts):
            amount = amounts[at]
            number = room[amount].pop()
            if not room[amount]:
                del room[amount], amounts[at]
        else:
            amount, number = window, len(packed)
            packed.append([])
        packed[number].append((document, first, first + size))
        left = amount - size
        if left:
            if left not in room:
                bisect.insort(amounts, left)
            room.setdefault(left, []).append(number)
    return packed
