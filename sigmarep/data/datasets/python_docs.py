"""The default text: the reference pages that Python's `help()` shows, English prose with code (PSF licence).

They come with the interpreter, about 370 kB in some sixty pages, and differ from one version of Python to the next.
Pages of which most paragraphs stand in a longer page are left out ("if" is a part of "compound"). The split is by page:
pages that share a paragraph stay together, and groups are held out for testing in the order of the hash of their name
while the held-out text stays within an eighth. What training and test share is the subject, and its phrases.
"""

import re
import sys

import tensorflow_datasets as tfds

from sigmarep.data import splitting

HELD_OUT = 1 / 8
# A page is left out if this share of its paragraphs stands in a longer one.
CONTAINED = 0.5
# Shorter paragraphs are headings and remarks that prove nothing.
PARAGRAPH = 60


class PythonDocs(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of the standard library's `pydoc_data.topics`; needs no network and no TensorFlow."""

    name = "python_docs"
    # The text is another one with every version of Python.
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
    kept: dict[str, set[str]] = {}
    seen: set[str] = set()
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        paragraphs = {" ".join(each.split()) for each in re.split(r"\n\s*\n", topics[name])}
        long = {each for each in paragraphs if len(each) >= PARAGRAPH} or paragraphs
        if sum(len(each) for each in long & seen) <= CONTAINED * sum(len(each) for each in long):
            kept[name] = long
        seen |= long
    # The prefixes keep a page's name apart from a paragraph of the same words.
    of_page = dict(
        zip(kept, splitting.groups([{f"0 {name}", *(f"1 {p}" for p in kept[name])} for name in kept]), strict=True)
    )
    members: dict[str, list[str]] = {}
    for name, group in of_page.items():
        members.setdefault(group, []).append(name)
    budget = HELD_OUT * sum(len(topics[name]) for name in kept)
    test: list[str] = []
    for group in sorted(members, key=splitting.fraction):
        size = sum(len(topics[name]) for name in members[group])
        if size <= budget:
            budget -= size
            test += members[group]
    return sorted(set(kept) - set(test)), sorted(test)
