"""Vocabularies: encode text as tokens, which are bytes, words or SentencePiece subwords, and decode them.

SentencePiece (Kudo and Richardson, 2018) was chosen because it reads raw text of any language without another tokenizer,
restores the text exactly, trains reproducibly in seconds, and is one small file. Its normalization is off and unknown
characters fall back to bytes, so that encoding is lossless.

Tokens 0 to 3 are the same in all kinds: padding, begin, end, unknown.
"""

import collections
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import ml_collections
import numpy as np

from sigmarep import configuration
from sigmarep.data.text import other_vocabularies
from sigmarep.data.token_cache import create_once
from sigmarep.errors import BadInput
from sigmarep.fields import field
from sigmarep.files import write_atomically

PAD, BOS, EOS, UNK = 0, 1, 2, 3
SPECIAL = 4
KINDS = ("subword", "byte", "word")
MODELS = ("unigram", "bpe")
# The word that stands for the end of a line (a convention of scores on WikiText-103).
NEWLINE = "<eol>"
HEADER = b"sigmarep vocabulary 1\n"
# Name of the vocabulary's file in the folder of a run.
FILE = "vocabulary.model"


class Vocabulary(Protocol):
    """Mapping between texts and tokens; `size` is the number of tokens, including the four special ones."""

    size: int

    def encode(self, text: str) -> np.ndarray:
        """Encodes a text as tokens (n,) int32, without begin and end."""

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Decodes the tokens before the first end token; padding and begin tokens are skipped."""

    def to_bytes(self) -> bytes:
        """Serializes the vocabulary as the contents of one file."""


class ByteVocabulary:
    """One token per byte of UTF-8; no text has unknown tokens."""

    size = SPECIAL + 256

    def encode(self, text):
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32) + SPECIAL

    def decode(self, tokens):
        values = [token - SPECIAL for token in _content(tokens) if token >= SPECIAL]
        return bytes(values).decode(errors="replace")

    def to_bytes(self):
        return HEADER + b'{"kind": "byte"}\n'


class WordVocabulary:
    """One token per word, split at white space, and one for the end of each line; rare words are unknown.

    A last line without a line end gets one. `decode` separates words by single spaces.
    """

    def __init__(self, words: Sequence[str]):
        self.words = list(words)
        self.size = SPECIAL + len(self.words)
        self._number = {word: number for number, word in enumerate(self.words, SPECIAL)}

    def encode(self, text):
        number = self._number
        return np.array([number.get(word, UNK) for word in split_words(text)], np.int32)

    def decode(self, tokens):
        words = ["<unk>" if token == UNK else self.words[token - SPECIAL] for token in _content(tokens)]
        return " ".join(words).replace(f" {NEWLINE} ", "\n").replace(NEWLINE, "\n").replace(" \n", "\n")

    def to_bytes(self):
        return HEADER + json.dumps({"kind": "word", "words": self.words}, ensure_ascii=False).encode() + b"\n"


class SubwordVocabulary:
    """One token per SentencePiece subword."""

    def __init__(self, model: bytes):
        self._model = model
        self._processor = _sentencepiece().SentencePieceProcessor(model_proto=model)
        self.size = self._processor.vocab_size()

    def spells_everything(self) -> bool:
        """True if the special tokens are those of this package and unknown characters fall back to bytes."""
        p = self._processor
        special = (p.pad_id(), p.bos_id(), p.eos_id(), p.unk_id()) == (PAD, BOS, EOS, UNK)
        return special and any(p.is_byte(i) for i in range(self.size))

    def encode(self, text):
        return np.array(self._processor.encode(text), np.int32)

    def decode(self, tokens):
        return self._processor.decode([int(token) for token in _content(tokens)])

    def to_bytes(self):
        return self._model


class OtherVocabulary:
    """The vocabulary of another project (`sigmarep.data.text.other_vocabularies`), its tokens after the special ones."""

    def __init__(self, other: Any):
        self._other = other
        self.size = other.size

    def encode(self, text):
        return self._other.encode(text)

    def decode(self, tokens):
        return self._other.decode_own([token for token in _content(tokens) if token >= SPECIAL])

    def to_bytes(self):
        return HEADER + json.dumps(self._other.values(), ensure_ascii=False).encode() + b"\n"


def split_words(text: str) -> list[str]:
    """Splits a text into words and line ends, the tokens of `WordVocabulary`."""
    return [word for line in text.splitlines() for word in (*line.split(), NEWLINE)]


def from_bytes(content: bytes) -> Vocabulary:
    """Reads the vocabulary that `to_bytes` wrote.

    Raises:
      ValueError: the contents are not a vocabulary.
    """
    if not content.startswith(HEADER):
        try:
            return SubwordVocabulary(content)
        except (RuntimeError, OSError) as error:
            raise ValueError(f"neither a SentencePiece model nor a vocabulary of this package ({error})") from None
    values = json.loads(content[len(HEADER) :])
    if values["kind"] in ("byte", "word"):
        return ByteVocabulary() if values["kind"] == "byte" else WordVocabulary(values["words"])
    return OtherVocabulary(other_vocabularies.from_values(values, SPECIAL))


def fingerprint(vocabulary: Vocabulary) -> str:
    """Hexadecimal SHA-256 of `to_bytes`."""
    return hashlib.sha256(vocabulary.to_bytes()).hexdigest()


FIELDS: dict[str, Any] = {
    "kind": field("subword", "Tokens of a text.", choices=KINDS),
    "size": field(
        8000,
        "Tokens, the special ones included; words: the most frequent ones. Bytes have their own number.",
        above=SPECIAL,
        at_most=2**24,
    ),
    "model": field("unigram", "Algorithm of subwords.", choices=MODELS),
    "file": field(
        "",
        "File of scripts/train_vocabulary.py or SentencePiece, JSON file of tokenizers, or <encoding>.tiktoken; empty: "
        "trained on the training split.",
    ),
}


def default_config() -> ml_collections.ConfigDict:
    """The section `config.data.vocabulary`."""
    return configuration.make(FIELDS)


def planned(config: ml_collections.ConfigDict) -> Vocabulary:
    """Placeholder vocabulary of the configured size, of bytes or of made-up words.

    A vocabulary that is trained on a small text may be smaller.
    """
    if config.kind == "byte":
        return ByteVocabulary()
    return WordVocabulary([f"word{number}" for number in range(SPECIAL, config.size)])


def obtain(
    config: ml_collections.ConfigDict, texts: Callable[[], Iterable[str]], *, cache_dir: str, key: str
) -> Vocabulary:
    """Loads the vocabulary of `config.data.vocabulary` from its file or the cache, or trains it.

    Args:
      config: `config.data.vocabulary`.
      texts: returns the texts to train on.
      cache_dir: folder of the cache.
      key: identifies the texts in the cache.

    Raises:
      BadInput: the file cannot be read, or a vocabulary of this size cannot be trained on the texts.
    """
    if config.file:
        return load(config.file)
    if config.kind == "byte":
        return ByteVocabulary()
    settings = f"{key}|{config.kind}|{config.model}|{config.size}"
    name = f"{config.kind}-{config.size}-{hashlib.sha256(settings.encode()).hexdigest()[:16]}.model"
    path = os.path.join(cache_dir, name)
    create_once(path, lambda: write_atomically(path, train(config, texts()).to_bytes()))
    return load(path)


def load(path: str) -> Vocabulary:
    """Reads a vocabulary file.

    Raises:
      BadInput: the file cannot be read or is not a vocabulary.
    """
    try:
        with open(os.path.expanduser(path), "rb") as file:
            content = file.read()
        other = other_vocabularies.of_file(os.path.basename(path), content, SPECIAL)
        return from_bytes(content) if other is None else OtherVocabulary(other)
    except BadInput:
        raise
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise BadInput(f"config.data.vocabulary.file = {path!r}: cannot be read ({reason})") from None


def train(config: ml_collections.ConfigDict, texts: Iterable[str]) -> Vocabulary:
    """Trains the vocabulary of `config.data.vocabulary` on `texts`; the result depends on nothing else.

    Raises:
      BadInput: the size is too small or too large for the texts, or they are empty.
    """
    if config.kind == "byte":
        return ByteVocabulary()
    if config.kind == "word":
        counts: collections.Counter[str] = collections.Counter()
        for text in texts:
            counts.update(split_words(text))
        if not counts:
            raise BadInput("config.data: the training split has no words")
        ranked = sorted(counts, key=lambda word: (-counts[word], word))
        return WordVocabulary(ranked[: config.size - SPECIAL])
    return _train_subwords(config, texts)


def _train_subwords(config: ml_collections.ConfigDict, texts: Iterable[str]) -> Vocabulary:
    model = io.BytesIO()
    trainer: Any = _sentencepiece().SentencePieceTrainer
    lines = (line for text in texts for line in text.splitlines() if line.strip())
    try:
        trainer.train(
            sentence_iterator=lines,
            model_writer=model,
            model_type=config.model,
            vocab_size=config.size,
            pad_id=PAD,
            bos_id=BOS,
            eos_id=EOS,
            unk_id=UNK,
            byte_fallback=True,
            # A small text may not have enough subwords; the vocabulary is then smaller.
            hard_vocab_limit=False,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            # The trainer never sees line ends, so they get a token here.
            user_defined_symbols=["\n"],
            max_sentence_length=1_000_000,
            # The result depends on the number of threads.
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise BadInput(
            f"config.data.vocabulary.size = {config.size}: no {config.model} vocabulary of that size can be made of the "
            f"training split ({_reason(error)})"
        ) from None
    return SubwordVocabulary(model.getvalue())


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text.rpartition("] ")[2][:200] or "it is empty"


def _sentencepiece():
    try:
        import sentencepiece
    except ImportError:
        raise BadInput(
            'config.data.vocabulary.kind = \'subword\': needs the extra "text"; pip install "sigmarep[text]"'
        ) from None
    return sentencepiece


def _content(tokens) -> list[int]:
    tokens = np.asarray(tokens)
    ends = np.flatnonzero(tokens == EOS)
    tokens = tokens[: ends[0]] if ends.size else tokens
    return [int(token) for token in tokens if token not in (PAD, BOS)]
