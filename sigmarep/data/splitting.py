"""Splits by content: equal pictures, and similar texts, are kept on one side."""

import hashlib
import re
from collections.abc import Iterable

PLACEHOLDER = re.compile(
    r"\$\{[^}]*\}|\$\w+|%\([^)]*\)[#0-9.]*[a-zA-Z]|%[0-9]+|%[#0-9.]*[sdfr]|\{[^}]*\}|<[^>]*>|&\w+;"
)
# Number of letters at the start of a word that are compared, so that "file" equals "files" and "delete" "deleted".
STEM = 4
# Share of the examples that is held out for testing where a data set has no part for it.
HELD_OUT = 0.2


def folded(text: str) -> str:
    """The text in lower case, without punctuation and placeholders, with numbers as 0 and single spaces."""
    text = PLACEHOLDER.sub(" ", text).casefold()
    return " ".join(re.sub(r"\d+", "0", re.sub(r"[\W_]+", " ", text)).split())


def gist(text: str) -> str:
    """A key that is equal for texts that differ only in word endings, word order and short words."""
    words = folded(text).split()
    long = {word[:STEM] for word in words if len(word) >= STEM}
    return " ".join(sorted(long or set(words)))


def fraction(name: str) -> float:
    """A number in [0, 1) determined by the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8")).digest()[:7], "big") / 2**56


def groups(keys: Iterable[Iterable[str]]) -> list[str]:
    """Names the group of every item; items that share a key, directly or through other items, are in one group."""
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while parent.setdefault(key, key) != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    items = [sorted(each) for each in keys]
    for first, *others in items:
        for other in others:
            # The smallest key names a group, so that the order of the items does not matter.
            low, high = sorted((root(first), root(other)))
            parent[high] = low
    return [root(item[0]) for item in items]
