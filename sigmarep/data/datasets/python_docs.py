"""The default text: the reference pages of Python's `help()`, English prose with code (PSF license).

They come with the interpreter, about 370 kB in some sixty pages, and differ between versions of Python. A page is left
out if most of its text is part of a longer page ("if" is a part of "compound"). The split is by page: pages that share a
paragraph form a group, and groups, in the order of a hash of their names, are held out for testing as long as the
held-out text is at most an eighth. Training and test text share their subject and its phrases.
"""

import re
import sys

import tensorflow_datasets as tfds

from sigmarep.data import splitting

HELD_OUT = 1 / 8
# A page is left out if more than this share of its text is in paragraphs of longer pages.
CONTAINED = 0.5
# Length in characters; shorter paragraphs, such as headings, do not count as shared text.
PARAGRAPH = 60


class PythonDocs(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of the standard library's `pydoc_data.topics`; needs no network and no TensorFlow."""

    name = "python_docs"
    # Every version of Python has its own text.
    VERSION = tfds.core.Version(".".join(str(part) for part in sys.version_info[:3]))
    RELEASE_NOTES = {str(VERSION): "The help of this Python."}  # noqa: RUF012

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict({"text": tfds.features.Text(), "topic": tfds.features.Text()}),
            homepage="https://docs.python.org/3/reference/",
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        from pydoc_data.topics import topics

        train, test = split(topics)
        return {"train": self._generate_examples(train, topics), "test": self._generate_examples(test, topics)}

    def _generate_examples(self, names, topics):
        for i, name in enumerate(names):
            yield i, {"text": topics[name], "topic": name}


def split(topics: dict[str, str]) -> tuple[list[str], list[str]]:
    """Names of the pages for training and for testing, in alphabetical order."""
    paragraphs_of = _distinct_pages(topics)
    # The prefixes distinguish the name of a page from a paragraph of the same words.
    keys = [{f"0 {name}", *(f"1 {paragraph}" for paragraph in long)} for name, long in paragraphs_of.items()]
    members: dict[str, list[str]] = {}
    for name, group in zip(paragraphs_of, splitting.groups(keys), strict=True):
        members.setdefault(group, []).append(name)
    budget = HELD_OUT * sum(len(topics[name]) for name in paragraphs_of)
    test: list[str] = []
    for group in sorted(members, key=splitting.fraction):
        size = sum(len(topics[name]) for name in members[group])
        if size <= budget:
            budget -= size
            test += members[group]
    return sorted(set(paragraphs_of) - set(test)), sorted(test)


def _distinct_pages(topics: dict[str, str]) -> dict[str, set[str]]:
    """The long paragraphs of every page that a longer page does not contain, by the page's name."""
    paragraphs_of: dict[str, set[str]] = {}
    seen: set[str] = set()
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        paragraphs = {" ".join(each.split()) for each in re.split(r"\n\s*\n", topics[name])}
        long = {each for each in paragraphs if len(each) >= PARAGRAPH} or paragraphs
        if sum(len(each) for each in long & seen) <= CONTAINED * sum(len(each) for each in long):
            paragraphs_of[name] = long
        seen |= long
    return paragraphs_of
