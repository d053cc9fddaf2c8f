"""The speech data sets: what each split holds, what is kept apart, and what becomes of unusable files."""

import itertools
import os
import re
import shutil
import time

import numpy as np
import pytest
import soundfile
import tensorflow_datasets as tfds

from sigmarep.data import sources, splitting
from sigmarep.data.datasets import spoken_sentences, stamp_recordings
from sigmarep.errors import BadInput
from tests.sounds import rows, sine


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """The splits of a small set of synthesised speech."""
    folder = str(tmp_path_factory.mktemp("tfds"))
    builder = spoken_sentences.SpokenSentences(
        sentences=150, held_out=25, chosen_on=15, repeats=1, data_dir=folder, file_format="array_record"
    )
    builder.download_and_prepare()
    return {split: rows(builder.as_data_source(split)) for split in builder.info.splits}


def test_no_sentence_and_no_voice_of_the_test_is_in_training(spoken):
    assert len(spoken["test"]) == len(spoken["test_sentences"]) == 25
    assert 5 < len(spoken["dev"]) <= 15
    assert len(spoken["train"]) > 50
    said = {split: {row["text"] for row in found} for split, found in spoken.items()}
    assert said["test"] == said["test_sentences"]
    assert len(said["test"]) == 25
    for one, other in (("train", "test"), ("train", "dev"), ("dev", "test")):
        for held_out in said[other]:
            assert not [t for t in said[one] if f" {held_out} " in f" {t} " or f" {t} " in f" {held_out} "]
    speakers = {split: {row["speaker"].split("+")[1] for row in found} for split, found in spoken.items()}
    assert not speakers["test"] & (speakers["train"] | speakers["dev"] | speakers["test_sentences"])
    assert len({row["id"] for found in spoken.values() for row in found}) == sum(map(len, spoken.values()))


def test_sentences_are_short_and_of_plain_letters(spoken):
    for row in (row for found in spoken.values() for row in found):
        assert re.fullmatch(r"[a-z']+( [a-z']+){1,5}", row["text"])
        assert row["audio"].dtype == np.int16
        # Half a second to five at 16 kHz, none of it quiet throughout.
        assert 6000 < len(row["audio"]) < 80000
        assert np.abs(row["audio"].astype(int)).max() > 3000


def test_an_utterance_sounds_the_same_whatever_was_said_before():
    utterances = [spoken_sentences.Utterance("one of the names", voice) for voice in ("en+m1", "en-us+klatt2", "en+f2")]
    first = [spoken_sentences.spoken(each) for each in utterances]
    # Seeds of generators that are taken from the clock are whole seconds.
    time.sleep(1.1)
    for utterance, sound in zip(utterances[::-1], first[::-1], strict=True):
        np.testing.assert_array_equal(spoken_sentences.spoken(utterance), sound)


def test_every_voice_sounds_different():
    # espeak-ng speaks with the accent's own voice where it does not know the speaker's.
    names = [*spoken_sentences.SPEAKERS, *spoken_sentences.HELD_OUT_SPEAKERS, "no such speaker"]
    voices = [*(f"en+{name}" for name in names), *spoken_sentences.ACCENTS[1:]]
    said = [spoken_sentences.Utterance("the value of the argument", voice) for voice in voices]
    sounds = {spoken_sentences._synthesized(each, 150, 50)[0].tobytes() for each in said}
    assert len(sounds) == len(voices)


def test_a_language_that_the_synthesiser_lacks_is_named():
    with pytest.raises(BadInput, match="espeak-ng has no voice 'xx-none'"):
        spoken_sentences.spoken(spoken_sentences.Utterance("of it", "xx-none"))


def test_phrases_prefer_frequent_words():
    page = (
        "The name of it is here.\n\nThe name (where it is), the name of x: the name-list.\n\n      The name of code.\n\n"
        'Rare words with it or "quoted words"'
    )
    expected = ["rare words", "the name", "the name of it is here", "where it is", "with it"]
    assert spoken_sentences.phrases([page], 10) == expected
    assert spoken_sentences.phrases([page], 1) == ["the name"]


DESCRIPTIONS = {
    "word": "Una palabra",
    "mark": "¡El pingüino, l'altre: «camión»!",
    "sum": "Son 3 euros.",
    "brackets": "Una moneda (de oro).",
    "script": "Буква e.",
}


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """Files of the unpacked package: 45 pictures, each described twice over in Spanish."""
    top = tmp_path_factory.mktemp("package")
    root = top / "usr/share/tuxpaint/stamps/animals"
    root.mkdir(parents=True)
    names = {f"p{i:02}": "Una " + "abcdefghij"[i // 10] * 3 + "abcdefghij"[i % 10] * (1 + i % 5) for i in range(40)}
    for number, (name, text) in enumerate({**names, **DESCRIPTIONS}.items()):
        for copy in ("", "-2"):
            (root / f"{name}{copy}.txt").write_text(
                f"Word.\nca.utf8=No\nes.utf8={text}\nest.utf8=Ei\nfr.utf8=Un {text}\n"
            )
            # Lengths differ a little, so that no two files are equal.
            seconds = 0.2 + 0.07 * len(text) + 0.001 * (number % 7) + 0.01 * len(copy)
            rate, channels = (44100, 2) if name in DESCRIPTIONS else (16000, 1)
            soundfile.write(root / f"{name}{copy}_desc_es.ogg", sine(seconds, rate, channels), rate)
    soundfile.write(root / "word.ogg", sine(0.3, 44100), 44100)
    soundfile.write(root / "word_es.ogg", sine(0.3, 44100), 44100)
    return top


@pytest.fixture
def stamps(package, tmp_path):
    """The pictures of a copy of the package within the data folder."""
    shutil.copytree(package, tmp_path / "data/downloads/stamps")
    return tmp_path / "data/downloads/stamps/usr/share/tuxpaint/stamps/animals"


@pytest.fixture
def not_installed(monkeypatch, tmp_path):
    """The package may be on the machine that runs this."""
    monkeypatch.setattr(stamp_recordings, "INSTALLED", str(tmp_path / "nowhere"))


@pytest.mark.usefixtures("not_installed")
def test_recordings_come_with_the_description_they_speak(stamps, tmp_path):
    found = {
        split: rows(sources.open_source("stamp_recordings/es", split, data_dir=str(tmp_path / "data")))
        for split in ("train", "dev", "test")
    }
    everything = [row for split in found.values() for row in split]
    # 40 pictures and two of the others, each twice.
    assert len(everything) == 2 * 42
    by_name = {row["id"]: row for row in everything}
    assert by_name["animals/word_desc_es"]["text"] == "una palabra"
    assert by_name["animals/mark-2_desc_es"]["text"] == "el pingüino l'altre camión"
    assert {(row["speaker"], row["language"]) for row in everything} == {("es", "es")}
    word = by_name["animals/word_desc_es"]["audio"]
    assert word.dtype == np.int16
    assert abs(len(word) / 16000 - (0.2 + 0.07 * 11)) < 0.06
    texts = {split: {row["text"] for row in rows} for split, rows in found.items()}
    every = set().union(*texts.values())
    assert texts["test"] == {text for text in every if splitting.fraction(text) < 1 / 8}
    assert texts["dev"] == {text for text in every if 1 / 8 <= splitting.fraction(text) < 3 / 16}
    assert texts["train"] == every - texts["test"] - texts["dev"]
    assert all(texts.values())


@pytest.mark.usefixtures("not_installed")
def test_cut_repeated_and_unreadable_recordings_are_left_out_and_counted(stamps):
    shutil.copy(stamps / "p01_desc_es.ogg", stamps / "p02_desc_es.ogg")
    soundfile.write(stamps / "p03_desc_es.ogg", sine(0.15, 16000), 16000)
    soundfile.write(stamps / "p04_desc_es.ogg", sine(3.0, 16000), 16000)
    (stamps / "p05_desc_es.ogg").write_bytes(b"nothing")
    (stamps / "p06.txt").unlink()
    (stamps / "p07.txt").write_text("A picture.\nes.utf8=Una\nes.utf8=Otra\n")
    kept, left_out = stamp_recordings.recordings(str(stamps), "es")
    # Three descriptions cannot be transcripts, each twice.
    counts = {reason: len(names) for reason, names in left_out.items()}
    assert counts == {"transcript": 2 * 3 + 2, "repeated": 1, "unreadable": 1, "length": 2}
    assert [os.path.basename(each.split(": ")[0]) for each in left_out["unreadable"]] == ["p05_desc_es.ogg"]
    assert ": cannot be decoded (" in left_out["unreadable"][0]
    assert len(kept) == 2 * 45 - 12
    assert not {f"p0{i}_desc_es.ogg" for i in range(2, 8)} & {os.path.basename(row.path) for row in kept}


@pytest.mark.usefixtures("not_installed")
def test_a_transcript_is_on_one_side_in_all_languages(stamps, tmp_path):
    for path in stamps.glob("p0*_desc_es.ogg"):
        samples, rate = soundfile.read(path)
        soundfile.write(path.with_name(path.name.replace("_es", "_ro")), samples[:-100], rate)
    for path in stamps.glob("p*.txt"):
        path.write_text(
            path.read_text() + re.sub("^.*(?=es.utf8)", "", path.read_text(), flags=re.S).replace("es.", "ro.")
        )
    sides = [
        rows(sources.open_source("stamp_recordings/latin", split, data_dir=str(tmp_path / "data")))
        for split in ("train", "dev", "test")
    ]
    assert {row["language"] for side in sides for row in side} == {"es", "ro"}
    for one, other in itertools.combinations(sides, 2):
        assert not {row["text"] for row in one} & {row["text"] for row in other}


@pytest.mark.usefixtures("not_installed")
def test_missing_recordings_name_the_package_and_a_missing_variant_those_there_are(tmp_path):
    with pytest.raises(BadInput, match=r"apt-get install tuxpaint-stamps-default, or: .*dpkg -x .*downloads/stamps"):
        sources.open_source("stamp_recordings/fr", "train", data_dir=str(tmp_path))
    for name in ("stamp_recordings", "stamp_recordings/xx"):
        with pytest.raises(BadInput, match="no such variant; expected one of stamp_recordings/fr, stamp_recordings/es"):
            sources.open_source(name, "train", data_dir=str(tmp_path))
    with pytest.raises(BadInput, match="'digits/small': there is no such variant; expected one of digits"):
        sources.describe("digits/small", data_dir=str(tmp_path))


def test_spelling_of_transcripts():
    assert stamp_recordings.transcript("Cea-mai ţară’s  ŞI_dar.", "ro") == "cea mai țară's și dar"
    assert stamp_recordings.transcript("Una pel·lícula «vermella»…", "ca") == "una pel·lícula vermella"
    assert stamp_recordings.transcript("e\u0301te\u0301", "fr") == "été"
    assert stamp_recordings.transcript("Синий Ёж!", "ru") == "синий ёж"
    for text, language in (("Буква e", "ru"), ("Un $", "fr"), ("E=mc", "fr"), ("99", "fr"), ("…", "fr"), ("ю", "fr")):
        assert stamp_recordings.transcript(text, language) == ""


@pytest.mark.parametrize(
    ("python", "expected"), [((3, 11, 7), "3.11.71"), ((3, 13, 0), "3.13.1"), ((3, 12, 10), "3.12.101")]
)
def test_every_python_has_a_version_that_can_be_read(python, expected):
    assert str(tfds.core.Version(spoken_sentences.version(python))) == expected
