"""Text that packages bring, as TFDS data sets: English prose, and English-German pairs.

Nothing of these texts is in this repository. Splits are made by a hash of a name or a sentence, so that they are the same
everywhere; what is the same but for case, digits and punctuation is kept once, before the split.
"""

import hashlib
import html.parser
import importlib.metadata
import os
import re
import sys
from collections.abc import Iterable, Iterator

import tensorflow_datasets as tfds

from sigmarep.errors import BadInput

# Folders of compiled translations by the package that brings them.
CATALOGUES = {
    "plone.app.locales": "plone/app/locales/locales/de/LC_MESSAGES",
    "Django": "django",
    "jupyterlab-language-pack-de-DE": "jupyterlab_language_pack_de_DE/locale/de_DE/LC_MESSAGES",
}
HELP = "usr/share/libreoffice/help"
HELP_PACKAGES = "libreoffice-help-en-us libreoffice-help-de"


def share(name: str) -> float:
    """A number from 0 to 1 that depends on `name` alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def folded(text: str) -> str:
    """What is left of a text without case, digits, punctuation and placeholders: equal for near-duplicates."""
    return " ".join(re.findall(r"[^\W\d_]+", re.sub(r"\$\{\w+\}|%\(\w+\)[a-z]|\{\w*\}|%[a-z]", " ", text).casefold()))


class PythonDocs(tfds.core.GeneratorBasedBuilder):
    """The topics of Python's own help (PSF licence): reference prose in English, which every Python brings.

    The version is that of the Python that prepared it, because the text differs between them. A tenth of the topics,
    whole ones, is held out; all are about one language, so the held-out text shares its words and manner.
    """

    name = "python_docs"
    VERSION = tfds.core.Version(".".join(str(part) for part in sys.version_info[:3]))
    RELEASE_NOTES = {str(VERSION): "The help of this Python."}  # noqa: RUF012

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict({"name": tfds.features.Text(), "text": tfds.features.Text()}),
        )

    def _split_generators(self, dl_manager):
        from pydoc_data.topics import topics

        distinct = {folded(text): name for name, text in sorted(topics.items(), reverse=True)}
        names = sorted(distinct.values())
        held_out = {name for name in names if share(name) < 0.1}
        return {
            "train": self._generate_examples(topics, [name for name in names if name not in held_out]),
            "test": self._generate_examples(topics, sorted(held_out)),
        }

    def _generate_examples(self, topics, names):
        for name in names:
            yield name, {"name": name, "text": topics[name]}


class _Pairs(tfds.core.GeneratorBasedBuilder):
    """English-German sentence pairs."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First."}  # noqa: RUF012
    SKIP_REGISTERING = True

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict({"en": tfds.features.Text(), "de": tfds.features.Text()}),
            supervised_keys=("en", "de"),
            disable_shuffling=True,
        )

    def _generate_examples(self, pairs):
        for i, (english, german) in enumerate(pairs):
            yield i, {"en": english, "de": german}


class InterfaceEnDe(_Pairs):
    """Strings of program interfaces with their German translations: Plone (GPL), Django (BSD), JupyterLab (BSD).

    Most are phrases of a few words. Kept are pairs without markup; of those that are equal
    but for case, digits, punctuation and placeholders, one. A tenth is held out by a hash of the English. The held-out
    strings come from the same programs: terms and turns of phrase recur.
    """

    name = "interface_en_de"

    def _split_generators(self, dl_manager):
        pairs = list(distinct_pairs(_catalogues()))
        held_out = [share(folded(english)) < 0.1 for english, _ in pairs]
        return {
            "train": self._generate_examples(pair for pair, held in zip(pairs, held_out, strict=True) if not held),
            "test": self._generate_examples(pair for pair, held in zip(pairs, held_out, strict=True) if held),
        }


class LibreofficeHelpEnDe(_Pairs):
    """LibreOffice's help (MPL 2.0) in English and German, paragraph by paragraph, of at least four English words.

    Paragraphs that are equal but for case, digits and punctuation are kept once, on the first page in order of name.
    A twentieth of the pages is held out for testing and as many for validation, whole pages: they are of the same manual,
    and many paragraphs are alike but for a word.

    Debian brings it: apt-get install libreoffice-help-en-us libreoffice-help-de; or, unpacked by dpkg -x, below
    $LIBREOFFICE_HELP.
    """

    name = "libreoffice_help_en_de"

    def _split_generators(self, dl_manager):
        root = os.path.join(os.environ.get("LIBREOFFICE_HELP", "/"), HELP)
        languages = [os.path.join(root, language, "text") for language in ("en-US", "de")]
        if not all(os.path.isdir(folder) for folder in languages):
            raise BadInput(
                f"config.data.name = {self.name!r}: there is no {' or '.join(languages)}; run: apt-get install "
                f"{HELP_PACKAGES} (or unpack both packages with dpkg -x and set LIBREOFFICE_HELP to that folder)"
            )
        splits: dict[str, list[tuple[str, str]]] = {"train": [], "validation": [], "test": []}
        seen: set[str] = set()
        for page in sorted(_pages(languages[0])):
            english, german = (_paragraphs(os.path.join(folder, page)) for folder in languages)
            pairs = ((english[key], german[key]) for key in english if key in german)
            split = "test" if share(page) < 0.05 else "validation" if share(page) < 0.1 else "train"
            splits[split] += distinct_pairs(pairs, least_words=4, seen=seen)
        return {split: self._generate_examples(pairs) for split, pairs in splits.items()}


def distinct_pairs(
    pairs: Iterable[tuple[str, str]], *, least_words: int = 1, seen: set[str] | None = None
) -> Iterator[tuple[str, str]]:
    """The pairs in one line each, of at least so many English words, without markup, untranslated ones and repeats."""
    seen = set() if seen is None else seen
    for english, german in pairs:
        english, german = " ".join(english.split()), " ".join(german.split())
        key = folded(english)
        if len(key.split()) < least_words or not german or english == german or key in seen:
            continue
        if re.search(r"<[a-zA-Z/!]|&[a-z]+;", english + german):
            continue
        seen.add(key)
        yield english, german


def _catalogues() -> Iterator[tuple[str, str]]:
    """(English, German) of every translated message of the installed packages."""
    try:
        import polib

        folders = [
            str(importlib.metadata.distribution(package).locate_file(folder)) for package, folder in CATALOGUES.items()
        ]
    except (ImportError, importlib.metadata.PackageNotFoundError):
        raise BadInput(
            'config.data.name = \'interface_en_de\': needs the extra "packaged"; pip install "sigmarep[packaged]"'
        ) from None
    for folder in folders:
        for path in sorted(_translations(folder)):
            catalogue = polib.pofile(path) if path.endswith(".po") else polib.mofile(path)
            for entry in catalogue:
                german = entry.msgstr or entry.msgstr_plural.get(0, "")
                if german and not entry.obsolete and "fuzzy" not in entry.flags:
                    yield _english(entry), german


def _translations(folder: str) -> Iterator[str]:
    """German catalogues below `folder`; the readable form where both are there."""
    for here, _, files in os.walk(folder):
        if here.rsplit(os.sep, 2)[-2:] not in (["de", "LC_MESSAGES"], ["de_DE", "LC_MESSAGES"]):
            continue
        stems = {name.rpartition(".")[0] for name in files if name.endswith((".po", ".mo"))}
        yield from (os.path.join(here, f"{stem}.po" if f"{stem}.po" in files else f"{stem}.mo") for stem in stems)


def _english(entry) -> str:
    """Plone's messages have keys for names, and their English in a comment."""
    found = re.search(r'Default: "(.*)"', entry.comment, re.DOTALL)
    return found[1].replace('\\"', '"').replace("\\n", "\n") if found else entry.msgid


def _pages(folder: str) -> Iterator[str]:
    for here, _, files in os.walk(folder):
        yield from (os.path.relpath(os.path.join(here, name), folder) for name in files if name.endswith(".html"))


class _Paragraphs(html.parser.HTMLParser):
    """Texts of the elements that have a paragraph's identifier."""

    def __init__(self):
        super().__init__()
        self.found: dict[str, str] = {}
        self._open: tuple[str, str] | None = None
        self._text: list[str] = []

    def handle_starttag(self, tag, attrs):
        identifier = dict(attrs).get("id") or ""
        if self._open is None and re.match(r"(par|hd|bm)_id", identifier):
            self._open, self._text = (tag, identifier), []

    def handle_endtag(self, tag):
        if self._open is not None and tag == self._open[0]:
            self.found.setdefault(self._open[1], "".join(self._text))
            self._open = None

    def handle_data(self, data):
        self._text.append(data)


def _paragraphs(path: str) -> dict[str, str]:
    parser = _Paragraphs()
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            parser.feed(file.read())
    return parser.found
