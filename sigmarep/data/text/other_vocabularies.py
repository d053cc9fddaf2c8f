"""Vocabularies of other projects: JSON files of Hugging Face's tokenizers, and rank files of OpenAI's tiktoken.

Their tokens follow the four special ones of `sigmarep.data.text.vocabulary`: token i there is token i + 4 here. Their own
special tokens, such as <|endoftext|>, are never made of a text.
"""

import base64
import binascii
from typing import Any

import numpy as np

from sigmarep.errors import BadInput

# The patterns that cut a text before its pairs of bytes are merged, which the files of tiktoken do not hold, by the
# beginnings of their names. They are those of `tiktoken_ext.openai_public`.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
PATTERNS = {
    "r50k_base": _GPT2,
    "p50k_base": _GPT2,
    "cl100k_base": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|"
        r"\s+(?!\S)|\s"
    ),
    "o200k_base": "|".join(
        [
            rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?",
            rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?",
            r"\p{N}{1,3}",
            r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
            r"\s*[\r\n]+",
            r"\s+(?!\S)",
            r"\s+",
        ]
    ),
}
EXTRA = 'needs the extra "others"; pip install "sigmarep[others]"'


class TokenizersVocabulary:
    """The tokens of a tokenizer of Hugging Face's, from the text of its JSON file.

    Args:
      offset: number of tokens before its own.

    Raises:
      ValueError: the text is none.
    """

    def __init__(self, text: str, offset: int):
        try:
            import tokenizers
        except ImportError:
            raise BadInput(f"config.data.vocabulary.file: a JSON file of tokenizers {EXTRA}") from None
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:
            # The package raises plain exceptions.
            raise ValueError(f"no file of tokenizers ({error})") from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._text, self._offset = text, offset
        self.size = offset + self._tokenizer.get_vocab_size()

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32) + self._offset

    def decode_own(self, tokens: list[int]) -> str:
        return self._tokenizer.decode([token - self._offset for token in tokens], skip_special_tokens=False)

    def values(self) -> dict[str, Any]:
        return {"kind": "tokenizers", "json": self._text}


class TiktokenVocabulary:
    """The tokens of an encoding of tiktoken's.

    Args:
      ranks: the text of its file: of every token its bytes in base 64, a space, and its number.
      pattern: that cuts a text into words.
      offset: number of tokens before its own.

    Raises:
      ValueError: the text is none.
    """

    def __init__(self, ranks: str, pattern: str, offset: int):
        try:
            import tiktoken
        except ImportError:
            raise BadInput(f"config.data.vocabulary.file: a file of tiktoken {EXTRA}") from None
        try:
            pairs = (line.split() for line in ranks.splitlines() if line)
            numbers = {base64.b64decode(token, validate=True): int(number) for token, number in pairs}
            self._encoding = tiktoken.Encoding("file", pat_str=pattern, mergeable_ranks=numbers, special_tokens={})
        except (ValueError, binascii.Error) as error:
            raise ValueError(f"no file of tiktoken ({error})") from None
        self._ranks, self._pattern, self._offset = ranks, pattern, offset
        self.size = offset + max(numbers.values()) + 1

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._encoding.encode_ordinary(text), np.int32) + self._offset

    def decode_own(self, tokens: list[int]) -> str:
        return self._encoding.decode([token - self._offset for token in tokens])

    def values(self) -> dict[str, Any]:
        return {"kind": "tiktoken", "ranks": self._ranks, "pattern": self._pattern}


def of_file(name: str, content: bytes, offset: int) -> TokenizersVocabulary | TiktokenVocabulary | None:
    """The vocabulary that a file of another project holds, None if it is of neither.

    Raises:
      ValueError: a file of tiktoken's whose pattern is not known, or one that is damaged.
    """
    if name.endswith(".tiktoken"):
        stem = name.removesuffix(".tiktoken")
        if stem not in PATTERNS:
            known = ", ".join(f"{each}.tiktoken" for each in PATTERNS)
            raise ValueError(f"a file of tiktoken has one of the names {known}, which tell how it cuts a text")
        return TiktokenVocabulary(content.decode(errors="replace"), PATTERNS[stem], offset)
    if content.lstrip()[:1] == b"{":
        return TokenizersVocabulary(content.decode(errors="replace"), offset)
    return None


def from_values(values: dict[str, Any], offset: int) -> TokenizersVocabulary | TiktokenVocabulary:
    """The vocabulary whose `values` these are."""
    if values["kind"] == "tokenizers":
        return TokenizersVocabulary(values["json"], offset)
    return TiktokenVocabulary(values["ranks"], values["pattern"], offset)
