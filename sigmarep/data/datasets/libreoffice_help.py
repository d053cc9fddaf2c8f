"""The LibreOffice manual in English and German: sentences of some 4,000 help pages, aligned by paragraph (MPL 2.0).

It comes with two Debian packages, `libreoffice-help-en-us` and `libreoffice-help-de` (5 MB). Paragraphs with the same name
on the same page form a pair. Left out are paragraphs without letters and untranslated paragraphs of three or more words.
Pages include each other, so of English paragraphs that differ only in case, punctuation and numbers the first is used.

The split is by a hash of the page's name: a twentieth of the pages each for validation and testing. Training has no pair
whose English resembles a held-out one (`sigmarep.data.splitting.gist`). The manual's set phrases, and sentences that
differ in a longer word, occur in several splits.
"""

import glob
import html.parser
import os
import re
from typing import Any

import tensorflow_datasets as tfds

from sigmarep.data import splitting
from sigmarep.errors import BadInput

INSTALLED = "/usr/share/libreoffice/help"
# Upper ends of the splits' ranges of `splitting.fraction`; training has the rest.
HELD_OUT = {"test": 0.05, "validation": 0.1}
BLOCKS = ("p", "h1", "h2", "h3", "h4", "h5", "h6")


class LibreofficeHelpEnDe(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of the manual, from the installed packages or from packages unpacked into downloads/manual."""

    name = "libreoffice_help_en_de"
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First."}  # noqa: RUF012

    def __init__(self, *, data_dir: str, **options: Any):
        self._manual = os.path.join(data_dir, "downloads", "manual")
        super().__init__(data_dir=data_dir, **options)

    def _info(self):
        features = {name: tfds.features.Text() for name in ("en", "de", "page")}
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(features),
            homepage="https://help.libreoffice.org/",
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        pages = manual_pages([INSTALLED, self._manual])
        if not pages:
            raise BadInput(
                f"config.data.name = 'libreoffice_help_en_de': is neither in {INSTALLED} nor under {self._manual}; run: "
                "apt-get install libreoffice-help-en-us libreoffice-help-de, or: apt-get download libreoffice-help-en-us "
                f"libreoffice-help-de && for deb in *.deb; do dpkg -x $deb {self._manual}; done"
            )
        return {name: self._generate_examples(rows) for name, rows in split(pages).items()}

    def _generate_examples(self, rows):
        for i, (english, german, page) in enumerate(rows):
            yield i, {"en": english, "de": german, "page": page}


def manual_pages(roots: list[str]) -> dict[str, tuple[str, str]]:
    """Finds the pages that exist in both languages, in the first root that has any: (English, German) paths by name."""
    for root in roots:
        starts = [root, *glob.glob(os.path.join(glob.escape(root), "**", "help"), recursive=True)]
        for start in starts:
            english = os.path.join(start, "en-US", "text")
            pages = {}
            for path in sorted(glob.glob(os.path.join(glob.escape(english), "**", "*.html"), recursive=True)):
                name = os.path.relpath(path, english)
                german = os.path.join(start, "de", "text", name)
                if os.path.exists(german):
                    pages[name] = (path, german)
            if pages:
                return pages
    return {}


def split(pages: dict[str, tuple[str, str]]) -> dict[str, list[tuple[str, str, str]]]:
    """(English, German, page) of the cleaned pairs, by split."""
    rows: dict[str, list[tuple[str, str, str]]] = {"train": [], "validation": [], "test": []}
    seen: set[str] = set()
    for page in sorted(pages):
        english, german = (paragraphs(path) for path in pages[page])
        place = splitting.fraction(page)
        where = next((name for name, end in HELD_OUT.items() if place < end), "train")
        for name in (name for name in english if name in german):
            key = splitting.folded(english[name])
            if key not in seen and _is_pair(english[name], german[name]):
                seen.add(key)
                rows[where].append((english[name], german[name], page))
    held_out = {splitting.gist(row[0]) for name in HELD_OUT for row in rows[name]}
    rows["train"] = [row for row in rows["train"] if splitting.gist(row[0]) not in held_out]
    return rows


def _is_pair(source: str, target: str) -> bool:
    """True if a paragraph has a letter and is translated."""
    key = splitting.folded(source)
    untranslated = source == target and len(key.split()) >= 3
    return not untranslated and bool(re.search(r"[^\W\d_]", key)) and bool(splitting.folded(target))


def paragraphs(path: str) -> dict[str, str]:
    """Texts of a page's paragraphs and headings by name, with single spaces."""
    reader = _Reader()
    with open(path, encoding="utf-8") as file:
        reader.feed(file.read())
    reader.close()
    return reader.paragraphs


class _Reader(html.parser.HTMLParser):
    """Collects paragraphs by name; of words that vary with the operating system it reads the default."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.paragraphs: dict[str, str] = {}
        self._name: str | None = None
        self._text: list[str] = []
        # One entry for every open <span> of the paragraph, True if its text is left out.
        self._hidden: list[bool] = []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if tag in BLOCKS:
            self._name, self._text, self._hidden = attributes.get("id"), [], []
        elif tag == "span":
            self._hidden.append("hidden" in attributes and not (attributes.get("id") or "").startswith("default"))
        elif tag == "br":
            self._text.append(" ")

    def handle_endtag(self, tag):
        if tag in BLOCKS and self._name:
            text = " ".join("".join(self._text).split())
            if text:
                self.paragraphs.setdefault(self._name, text)
            self._name = None
        elif tag == "span" and self._hidden:
            self._hidden.pop()

    def handle_data(self, data):
        if self._name and not any(self._hidden):
            self._text.append(data)
