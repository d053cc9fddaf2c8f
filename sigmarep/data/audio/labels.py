"""Labels of speech models: characters or subwords as labels 1, 2, …; label 0 is CTC's blank."""

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import ml_collections
import numpy as np

from sigmarep import configuration
from sigmarep.data.text import vocabulary
from sigmarep.data.text.vocabulary import SPECIAL, SubwordVocabulary
from sigmarep.errors import BadInput
from sigmarep.fields import field

# Name of the labels' file in the folder of a run.
FILE = "labels.model"
BLANK = 0
KINDS = ("character", "subword")
# Token − label of a subword: the blank takes the place of the vocabulary's special tokens.
SHIFT = SPECIAL - 1


class Encoded(NamedTuple):
    """Labels (n,) int32 of a text, and its characters without a label."""

    labels: np.ndarray
    unknown: frozenset[str]


class Labels(Protocol):
    """Mapping between texts and labels; `size` is the number of labels, including the blank."""

    size: int

    def normalize(self, text: str) -> str:
        """Converts a text to the form that is learned and scored: single spaces, and lower case if configured."""

    def encode(self, text: str) -> Encoded:
        """Encodes a normalized text; characters without a label are skipped."""

    def decode(self, labels: Sequence[int]) -> str:
        """Decodes labels, which have no blanks, to text."""

    def to_bytes(self) -> bytes:
        """Serializes the labels as the contents of one file."""


class _Normalizing:
    def __init__(self, lowercase: bool):
        self._lowercase = lowercase

    def normalize(self, text: str) -> str:
        text = " ".join(text.split())
        return text.lower() if self._lowercase else text


class CharacterLabels(_Normalizing):
    """One label per character."""

    def __init__(self, characters: str, *, lowercase: bool):
        super().__init__(lowercase)
        self.characters = characters
        self.size = 1 + len(characters)
        self._number = {character: number for number, character in enumerate(characters, 1)}

    def encode(self, text):
        known = [self._number[character] for character in text if character in self._number]
        return Encoded(np.array(known, np.int32), frozenset(text) - self._number.keys())

    def decode(self, labels):
        return " ".join("".join(self.characters[int(label) - 1] for label in labels).split())

    def to_bytes(self):
        facts = {"kind": "character", "characters": self.characters, "lowercase": self._lowercase}
        return json.dumps(facts, ensure_ascii=False).encode() + b"\n"


class SubwordLabels(_Normalizing):
    """One label per SentencePiece token; characters outside its vocabulary are encoded as bytes, so none is unknown."""

    def __init__(self, subwords: SubwordVocabulary, *, lowercase: bool):
        super().__init__(lowercase)
        self._subwords = subwords
        self.size = subwords.size - SHIFT

    def encode(self, text):
        return Encoded(self._subwords.encode(text) - np.int32(SHIFT), frozenset())

    def decode(self, labels):
        return " ".join(self._subwords.decode(np.asarray(labels, np.int32) + SHIFT).split())

    def to_bytes(self):
        return self._subwords.to_bytes()


FIELDS: dict[str, Any] = {
    "kind": field("character", "Labels of CTC.", choices=KINDS),
    "lowercase": field(True, "Transcripts are lowercased."),
    "characters": field("", "Characters that are labels; empty: all of the training split."),
    "size": field(1000, "Subword labels, the special ones included.", above=SPECIAL, at_most=2**24),
    "model": field("unigram", "Algorithm of subwords.", choices=vocabulary.MODELS),
    "file": field("", "SentencePiece model; empty: trained on the training split."),
}


def default_config() -> ml_collections.ConfigDict:
    """The section `config.data.labels`."""
    return configuration.make(FIELDS)


def planned(config: ml_collections.ConfigDict) -> CharacterLabels:
    """Placeholder labels of the configured number.

    If the characters depend on the data, there are 29 labels with the blank, as for English letters.
    """
    count = config.size - SHIFT - 1 if config.kind == "subword" else len(config.characters) or 28
    # Characters of a private-use area, which has no white space.
    return CharacterLabels("".join(chr(0xF0000 + number) for number in range(count)), lowercase=False)


def from_bytes(content: bytes, *, lowercase: bool) -> Labels:
    """Reads the labels that `to_bytes` wrote.

    Args:
      content: the file's contents.
      lowercase: for subwords, whose file does not record it.

    Raises:
      ValueError: the contents are not labels.
    """
    if content.startswith(b"{"):
        values = json.loads(content)
        return CharacterLabels(values["characters"], lowercase=values["lowercase"])
    subwords = vocabulary.from_bytes(content)
    if not isinstance(subwords, SubwordVocabulary):
        raise ValueError("neither characters nor a SentencePiece model")
    return SubwordLabels(subwords, lowercase=lowercase)


def obtain(
    config: ml_collections.ConfigDict, texts: Callable[[], Iterable[str]], *, cache_dir: str, key: str
) -> Labels:
    """Loads or creates the labels of `config.data.labels`.

    Args:
      config: `config.data.labels`.
      texts: returns the transcripts of the training split.
      cache_dir, key: see `sigmarep.data.text.vocabulary.obtain`.

    Raises:
      BadInput: a field has an invalid value, or the texts are not enough for the labels.
    """
    lowercase = config.lowercase
    if config.kind == "subword":
        normalize = _Normalizing(lowercase).normalize
        settings = ml_collections.ConfigDict({**dict(config), "kind": "subword"})
        try:
            subwords = vocabulary.obtain(
                settings,
                lambda: (normalize(text) for text in texts()),
                cache_dir=cache_dir,
                key=f"{key}|{lowercase}",
            )
        except BadInput as error:
            raise BadInput(str(error).replace("config.data.vocabulary.", "config.data.labels.")) from None
        if not isinstance(subwords, SubwordVocabulary) or not subwords.spells_everything():
            raise BadInput(
                f"config.data.labels.file = {config.file!r}: expected a SentencePiece model with the special tokens "
                "padding, begin, end and unknown as 0 to 3 and with byte fallback (scripts/train_vocabulary.py)"
            )
        return SubwordLabels(subwords, lowercase=lowercase)
    characters = config.characters
    if len(set(characters)) != len(characters):
        raise BadInput(f"config.data.labels.characters = {characters!r}: expected each character once")
    if not characters:
        normalize = _Normalizing(lowercase).normalize
        characters = "".join(sorted({character for text in texts() for character in normalize(text)}))
    if not characters:
        raise BadInput("config.data: the training split has no transcripts")
    return CharacterLabels(characters, lowercase=lowercase)
