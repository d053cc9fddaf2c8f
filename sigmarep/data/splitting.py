"""Which texts are held out for testing: by their content, and with what resembles them."""

import hashlib
import re
from collections.abc import Iterable

PLACEHOLDER = re.compile(
    r"\$\{[^}]*\}|\$\w+|%\([^)]*\)[#0-9.]*[a-zA-Z]|%[0-9]+|%[#0-9.]*[sdfr]|\{[^}]*\}|<[^>]*>|&\w+;"
)
# Words are compared by so many of their first letters: "file" and "files", "delete" and "deleted" count as one.
STEM = 4


def folded(text: str) -> str:
    """The text without case, punctuation, placeholders and the kind of white space, its numbers as 0."""
    text = PLACEHOLDER.sub(" ", text).casefold()
    return " ".join(re.sub(r"\d+", "0", re.sub(r"[\W_]+", " ", text)).split())


def gist(text: str) -> str:
    """The same for texts that differ in endings, order and short words only."""
    words = folded(text).split()
    long = {word[:STEM] for word in words if len(word) >= STEM}
    return " ".join(sorted(long or set(words)))


def fraction(name: str) -> float:
    """A number from 0 to below 1 that follows from the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8")).digest()[:7], "big") / 2**56


def groups(keys: Iterable[Iterable[str]]) -> list[str]:
    """For every item the name of its group; items that share one of their keys, directly or over others, share a group."""
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while parent.setdefault(key, key) != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    items = [sorted(each) for each in keys]
    for first, *others in items:
        for other in others:
            # The smallest name wins, so that the order of the items does not matter.
            low, high = sorted((root(first), root(other)))
            parent[high] = low
    return [root(item[0]) for item in items]
