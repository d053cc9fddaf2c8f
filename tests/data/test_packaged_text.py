"""The text data sets that packages bring: what they keep, and what they keep apart."""

import gzip
import os

import pytest

from sigmarep.data import splitting
from sigmarep.data.datasets import gcide, libreoffice_help, python_docs
from sigmarep.data.text import documents
from sigmarep.data.text import parallel as parallel_text
from sigmarep.errors import BadInput


def opened(tmp_path, split="train", *, parallel=False, **fields):
    """The strings of a split."""
    module = parallel_text if parallel else documents
    data = module.default_config()
    data.update({"data_dir": str(tmp_path / "data"), **fields})
    return list(module.texts(data, split))


def test_the_pages_of_python_are_whole_and_in_one_split_only(tmp_path):
    from pydoc_data.topics import topics

    train, test = (opened(tmp_path, split, name="python_docs", folder="") for split in ("train", "test"))
    assert set(train) | set(test) <= set(topics.values())
    paragraphs = [{p.strip() for page in side for p in page.split("\n\n") if len(p) > 100} for side in (train, test)]
    assert not paragraphs[0] & paragraphs[1]
    size = sum(map(len, test)) / sum(map(len, train + test))
    assert 0.05 < size <= 0.125


def test_pages_within_other_pages_are_left_out_and_pages_that_share_a_paragraph_stay_together():
    names = [f"{pair}{side}" for pair in range(20) for side in "ab"]
    topics = {name: "\n\n".join(f"{name} {i} " + "x" * 60 for i in range(20)) for name in names}
    for name in names:
        topics[name] += f"\n\nthe same in pair {name[:-1]} " + "y" * 60
    topics["part"] = "\n\n".join(topics["3a"].split("\n\n")[:5])
    train, test = python_docs.split(topics)
    assert sorted(train + test) == sorted(names)
    # An eighth is five pages: two pairs.
    assert len(test) == 4
    assert len({name[:-1] for name in test}) == 2


def test_folding_and_gist():
    assert splitting.folded("Open  ${file}: %(n)d Files, {0}!") == "open files"
    assert splitting.folded("Page 12 of 345") == "page 0 of 0"
    assert splitting.gist("Delete the files") == splitting.gist("the file is Deleted") == "dele file"
    assert splitting.gist("No") == "no"


def test_groups_join_over_shared_keys_in_any_order():
    keys = [{"a", "b"}, {"c"}, {"d", "b"}, {"e", "d"}]
    assert splitting.groups(keys) == ["a", "c", "a", "a"]
    assert splitting.groups(keys[::-1]) == ["a", "a", "c", "a"]


def page(*paragraphs):
    return (
        "<html><body>" + "".join(f'<p id="{name}" class="x">{content}</p>' for name, content in paragraphs) + "</body>"
    )


@pytest.fixture
def manual(tmp_path):
    root = tmp_path / "data/downloads/manual/usr/share/libreoffice/help"
    for number in range(200):
        hidden = '<span hidden="true" id="{}">{}</span>'
        key = f"<span>{hidden.format('MAC1', 'Command')}{hidden.format('default1', '{}')}</span>"
        for language, said, control in (("en-US", "Press", "Ctrl"), ("de", "Drücken Sie", "Strg")):
            path = root / language / f"text/p{number}.html"
            path.parent.mkdir(parents=True, exist_ok=True)
            word = "".join("abcdefghij"[int(digit)] for digit in f"{number:03}") * 3
            own = ("own", f"{said} <b>{key.format(control)} &amp; {word}</b>\n now<br>or never.")
            path.write_text(page(own, ("same", f"{said} it"), (f"only{language}", "alone"), ("code", "A B C(1)")))
    return tmp_path


@pytest.mark.skipif(os.path.isdir(libreoffice_help.INSTALLED), reason="the manual is installed")
def test_the_manual_is_aligned_by_paragraph_and_split_by_page(manual):
    found = {
        split: opened(manual, split, parallel=True, name="libreoffice_help_en_de", folder="")
        for split in ("train", "validation", "test")
    }
    everything = [each for strings in found.values() for each in strings]
    assert "Press Ctrl & aaaaaaaaa now or never." in everything
    assert len([each for each in everything if each == "Press it"]) == 1
    assert "alone" not in everything
    assert "A B C(1)" not in everything
    assert len(everything) == 2 * (200 + 1)
    place = {
        name: 2 * len([n for n in range(200) if low <= splitting.fraction(f"p{n}.html") < high])
        for name, low, high in (("test", 0, 0.05), ("validation", 0.05, 0.1))
    }
    assert {name: len(found[name]) - found[name].count("Press it") * 2 for name in place} == place


@pytest.mark.skipif(os.path.isdir(libreoffice_help.INSTALLED), reason="the manual is installed")
def test_a_missing_manual_names_the_packages(tmp_path):
    with pytest.raises(BadInput, match=r"apt-get install libreoffice-help-en-us libreoffice-help-de, or: .*dpkg -x"):
        opened(tmp_path, parallel=True, name="libreoffice_help_en_de", folder="")


def test_training_keeps_no_pair_that_resembles_a_held_out_one(tmp_path):
    pages = {}
    for number in range(40):
        name = f"p{number}.html"
        texts = {"en": f"Deletes the files number {'x' * number}", "de": f"Löscht Dateien {'x' * number}"}
        for language, said in texts.items():
            (tmp_path / f"{language}{name}").write_text(page(("p", said)))
        pages[name] = (str(tmp_path / f"en{name}"), str(tmp_path / f"de{name}"))
    rows = libreoffice_help.split(pages)
    held_out = {splitting.gist(row[0]) for split in ("validation", "test") for row in rows[split]}
    assert held_out
    assert not held_out & {splitting.gist(row[0]) for row in rows["train"]}


DICTIONARY = r"""
00-database-info
   Converted from the original.
This line of a notice is at a line's start.

A \A\ (named [=a] in the English).
   1. The first letter of the alphabet. It is found in {Inscriptions},
      and elsewhere.
      [1913 Webster]

         An apple, or a pear. --Pope.
   [Webster 1913 Suppl.]

Wearish \Wear"ish\, a. [Etymol. uncertain.]
   1. Weak; withered. [Obs.]
      [1913 Webster +PJC]

Wearish \Wear"ish\, n.
   One that is weak.

Alone

Wearish \Wear"ish\, a. [Etymol. uncertain.]
   1. Weak; withered. [Obs.]
"""


def test_the_dictionary_is_read_by_headword_without_marks_and_pronunciations():
    assert list(gcide.entries(DICTIONARY)) == [
        (
            "A",
            "A. 1. The first letter of the alphabet. It is found in Inscriptions, and elsewhere.\n"
            "An apple, or a pear. --Pope.",
        ),
        ("Wearish", "Wearish, a. [Etymol. uncertain.] 1. Weak; withered. [Obs.]"),
        ("Wearish", "Wearish, n. One that is weak."),
        ("Wearish", "Wearish, a. [Etymol. uncertain.] 1. Weak; withered. [Obs.]"),
    ]


def test_all_entries_of_a_word_are_in_one_split_and_equal_ones_are_used_once():
    words = ["".join("abcdefghij"[int(digit)] for digit in f"{n:03}") for n in range(400)]
    entries = (f"{word} \\{word}\\, {kind}.\n   Of the kind {kind}.\n" for word in words for kind in ("n", "v", "n"))
    rows = gcide.split("A \\A\\, n.\n   A letter.\n\n" + "\n".join(entries))
    words_of = {name: {headword for headword, _ in of_split} for name, of_split in rows.items()}
    assert sum(map(len, rows.values())) == 2 * 400 + 1
    assert sum(map(len, words_of.values())) == 400 + 1
    expected = {word for word in [*words, "A"] if splitting.fraction(word.lower()) < 0.05}
    assert words_of["test"] == expected != set()


@pytest.mark.skipif(os.path.isfile(os.path.join(gcide.INSTALLED, gcide.FILE)), reason="the dictionary is installed")
def test_an_unpacked_dictionary_is_prepared_and_a_missing_one_names_the_package(tmp_path):
    with pytest.raises(BadInput, match=r"apt-get install dict-gcide, or: .*dpkg -x"):
        opened(tmp_path, name="gcide", folder="")
    path = tmp_path / "data/downloads/gcide/usr/share/dictd/gcide.dict.dz"
    path.parent.mkdir(parents=True)
    words = "".join(f"w{n} \\W\\, n.\n   Number {n}.\n\n" for n in range(300))
    path.write_bytes(gzip.compress(f"notice\n\nA \\A\\, n.\n   A letter.\n\n{words}".encode()))
    texts = [
        text for split in ("train", "validation", "test") for text in opened(tmp_path, split, name="gcide", folder="")
    ]
    assert sorted(texts) == sorted(["A, n. A letter.", *(f"w{n}, n. Number {n}." for n in range(300))])
