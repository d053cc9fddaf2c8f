"""Sentence pairs: every pair once an epoch, few shapes, the same on every machine; what files must be."""

import itertools
import json
import zipfile

import numpy as np
import pytest

from sigmarep import configuration
from sigmarep.data.datasets import interface_en_de
from sigmarep.data.text import parallel
from sigmarep.data.text.vocabulary import BOS, EOS, PAD
from sigmarep.errors import BadInput

RNG = np.random.default_rng(0)
PAIRS = [("s" * int(RNG.integers(1, 30)), f"{'t' * int(RNG.integers(1, 30))}{i}") for i in range(61)]
LONG = ("s" * 40, "t")
EMPTY = ("s", " ")


def write(folder, pairs, split="train"):
    folder.mkdir(exist_ok=True)
    (folder / f"{split}.tsv").write_text("".join(f"{source}\t{target}\n" for source, target in pairs))


@pytest.fixture
def data(tmp_path):
    write(tmp_path / "pairs", [*PAIRS, LONG, EMPTY])
    write(tmp_path / "pairs", [LONG, *PAIRS[:5]], "test")
    config = parallel.default_config()
    config.name, config.folder, config.data_dir = "text_folder", str(tmp_path / "pairs"), str(tmp_path / "data")
    config.source_feature, config.target_feature = "source", "target"
    config.vocabulary.kind = "byte"
    config.max_source_length = config.max_target_length = 33
    config.buckets, config.rows_multiple = (8, 20, 33), 4
    return config


def corpus(data, split="train"):
    return parallel.PairCorpus(data, parallel.open_vocabulary(data), split)


def batches(data, split="train", tokens=200, seed=0):
    return parallel.BucketedBatches(corpus(data, split), batch_tokens=tokens, seed=seed)


def sentences(found):
    """(source, target) of the rows of batches that hold one."""
    decoded = []
    for batch in found:
        for source, inputs, targets, index in zip(
            *(batch[n] for n in ("source", "inputs", "targets", "index")), strict=True
        ):
            if index < 0:
                assert not source.any()
                assert not inputs.any()
                assert not targets.any()
                continue
            ends = np.flatnonzero(targets == EOS)[0]
            assert inputs[0] == BOS
            np.testing.assert_array_equal(inputs[1 : ends + 1], targets[:ends])
            assert np.all(inputs[ends + 1 :] == PAD)
            text = [bytes((row[row > 3] - 4).astype(np.uint8)).decode() for row in (source, targets)]
            assert source[np.sum(source != PAD) - 1] == EOS
            decoded.append(tuple(text))
    return decoded


def checked(data):
    configuration.check(data, parallel.FIELDS, prefix="config.data.")
    return batches(data)


def test_an_epoch_has_every_pair_once_and_the_next_one_in_another_order(data):
    found = batches(data)
    stream = found.stream(start=0)
    epochs = [sentences(itertools.islice(stream, found.batches_per_epoch)) for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(PAIRS)
    assert epochs[0] != epochs[1]


def test_shapes_are_few_and_full(data):
    found = batches(data)
    assert found.shapes == [(24, 8, 8), (8, 20, 20), (4, 33, 33)]
    seen = {batch["source"].shape for batch in itertools.islice(found.stream(start=0), found.batches_per_epoch)}
    assert seen == {(24, 8), (8, 20), (4, 33)}
    for batch in itertools.islice(found.stream(start=0), found.batches_per_epoch):
        longest = max(np.sum(batch[name] != PAD, axis=1).max() for name in ("source", "targets"))
        assert longest <= batch["source"].shape[1]


def test_the_size_of_a_split_counts_every_pair_in_its_bucket(data):
    bucket_of = [next(end for end in (8, 20, 33) if end >= max(map(len, pair)) + 1) for pair in PAIRS]
    assert batches(data).size == sum(bucket_of)


def test_batches_follow_from_seed_and_number_alone(data):
    whole = list(itertools.islice(batches(data).stream(start=0), 40))
    later = list(itertools.islice(batches(data).stream(start=17), 23))
    for a, b in zip(whole[17:], later, strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
    parts = [
        list(itertools.islice(batches(data).stream(start=0, process_index=p, process_count=4), 40)) for p in range(4)
    ]
    for i, batch in enumerate(whole):
        np.testing.assert_array_equal(batch["source"], np.concatenate([part[i]["source"] for part in parts]))
    other = list(itertools.islice(batches(data, seed=1).stream(start=0), 40))
    assert any(
        a["source"].shape != b["source"].shape or np.any(a["source"] != b["source"])
        for a, b in zip(whole, other, strict=True)
    )


def test_evaluation_has_every_pair_once_and_cuts_long_sources(data):
    found = batches(data, "test", tokens=400)
    pairs = corpus(data, "test")
    assert pairs.report == {"pairs": 6, "empty": 0, "too_long": 1}
    rows = sentences(found.evaluation())
    assert sorted(rows) == sorted([("s" * 32, "t"), *PAIRS[:5]])
    assert pairs.texts(0) == LONG


def test_what_is_left_out_is_counted(data):
    found = corpus(data)
    assert found.report == {"pairs": len(PAIRS) + 2, "empty": 1, "too_long": 1}
    assert len(found) == len(PAIRS)
    files = parallel.run_files(parallel.open_vocabulary(data), found)
    assert b'"too_long": 1' in files["data.json"]


def test_aligned_files_are_pairs(data, tmp_path):
    folder = tmp_path / "two"
    folder.mkdir()
    (folder / "train.en").write_text("one\ntwo\n")
    (folder / "train.de").write_text("eins\nzwei\n")
    data.folder, data.source_feature, data.target_feature = str(folder), "en", "de"
    assert list(parallel.pairs(data, "train")) == [("one", "eins"), ("two", "zwei")]


def test_empty_last_lines_and_byte_order_marks_are_no_pairs(data, tmp_path):
    folder = tmp_path / "ends"
    folder.mkdir()
    data.folder = str(folder)
    (folder / "train.tsv").write_text("\ufeffone\teins\n\ntwo\tzwei\n\n", encoding="utf-8")
    assert list(parallel.pairs(data, "train")) == [("one", "eins"), ("two", "zwei")]
    (folder / "train.tsv").unlink()
    (folder / "train.en").write_text("\ufeffone\n\nthree\n\n\n", encoding="utf-8")
    (folder / "train.de").write_text("eins\n\ndrei")
    data.source_feature, data.target_feature = "en", "de"
    assert list(parallel.pairs(data, "train")) == [("one", "eins"), ("", ""), ("three", "drei")]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"train.en": "a\nb\n", "train.de": "a\n"}, "train.de: has 1 lines, and"),
        ({"train.tsv": "a\tb\nno tab\n"}, "train.tsv:2: has 0 tabs; expected a source, one tab and its translation"),
        ({"train.tsv": "a\tb\tc\n"}, "train.tsv:1: has 2 tabs"),
        ({"train.tsv": ""}, "train.tsv: is empty"),
        ({"train.tsv": "\t\n"}, "no pair of the split 'train' of text_folder is left (pairs 1, empty 1"),
        ({"train.en": "a\n", "train.de": "b\n", "train.fr": "c\n"}, "several files of the split train"),
    ],
)
def test_what_files_must_not_be(data, tmp_path, files, message):
    folder = tmp_path / "bad"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_text(content)
    data.folder = str(folder)
    with pytest.raises(BadInput) as error:
        checked(data)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("buckets", (8, 20), "config.data.buckets = (8, 20): expected rising lengths, the last at least 33"),
        (
            "buckets",
            (20, 8, 40),
            "config.data.buckets = (20, 8, 40): expected a tuple of whole numbers",
        ),
        ("rows_multiple", 8, "config.batch_size = 200: tokens, too few for 8 rows"),
        ("rows_multiple", 0, "config.data.rows_multiple = 0: expected a whole number of at least 1"),
        ("max_source_length", 1, "expected a whole number of at least 2"),
        ("source_feature", "en", "config.data.source_feature = 'en': the data set has no such feature; it has"),
    ],
)
def test_fields_that_are_refused(data, field, value, message):
    data[field] = value
    with pytest.raises(BadInput) as error:
        checked(data)
    assert message in str(error.value)


def test_processes_must_divide_the_rows(data):
    with pytest.raises(BadInput) as error:
        next(batches(data).stream(start=0, process_index=0, process_count=3))
    assert "config.data.rows_multiple = 4: does not divide over 3 processes" in str(error.value)


def test_repeats_and_untranslated_strings_are_left_out():
    pairs = [("Save items", "Sichern"), ("save  items!", "Sichern!"), ("Untouched", "Untouched"), ("Now", "Jetzt")]
    assert list(interface_en_de.distinct_pairs(pairs)) == [("Save items", "Sichern"), ("Now", "Jetzt")]


PLONE = """msgid ""
msgstr ""
"Content-Type: text/plain; charset=utf-8\\n"

#. Default: "Choose a file from your computer"
msgid "label_choose"
msgstr "Wählen Sie eine Datei"

#, fuzzy
msgid "Not sure"
msgstr "Unsicher"

msgid "Open the window"
msgstr "Fenster öffnen"

msgid "%s items"
msgstr "%s Objekte"
"""
COMPONENT = {"title": "Living room lamp", "step": {"user": {"title": "Choose a file from your disk"}, "only": "Here"}}
GERMAN_COMPONENT = {"title": "Stehlampe", "step": {"user": {"title": "Datei der Festplatte"}}}


def test_interface_strings_come_from_packages_of_both_forms(tmp_path, monkeypatch):
    monkeypatch.setattr(interface_en_de, "PROGRAMS", ("one==1", "two==2"))
    folder = tmp_path / "downloads" / "interface_en_de"
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "one-1.whl", "w") as package:
        package.writestr("one/locales/de/LC_MESSAGES/one.po", PLONE)
        package.writestr("one/locales/fr/LC_MESSAGES/one.po", PLONE.replace("Wählen", "Choisir"))
    with zipfile.ZipFile(folder / "two-2.whl", "w") as package:
        package.writestr("two/components/lamp/translations/en.json", json.dumps(COMPONENT))
        package.writestr("two/components/lamp/translations/de.json", json.dumps(GERMAN_COMPONENT))
    config = parallel.default_config()
    config.data_dir = str(tmp_path)
    # The string of the computer has four words in a row of a held-out one: it is in neither split.
    monkeypatch.setattr(
        interface_en_de, "fraction", lambda name: 0.5 if "computer" in name or "window" in name else 0.01
    )
    train, test = (list(parallel.pairs(config, split)) for split in ("train", "test"))
    assert sorted(test) == [("Choose a file from your disk", "Datei der Festplatte"), ("Living room lamp", "Stehlampe")]
    assert train == [("Open the window", "Fenster öffnen")]


def test_packages_that_cannot_be_fetched_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(interface_en_de, "PROGRAMS", ("no-such-program-of-sigmarep==1",))
    config = parallel.default_config()
    config.data_dir = str(tmp_path)
    with pytest.raises(BadInput) as error:
        list(parallel.pairs(config, "train"))
    assert "cannot download its packages" in str(error.value)
    assert "put the wheels of no-such-program-of-sigmarep==1 into" in str(error.value)


def test_training_has_nothing_that_resembles_a_held_out_pair(monkeypatch):
    held_out = ("Delete every selected file now", "Alles löschen")
    resembling = [
        ("Please delete every selected file", "A"),
        ("Every file selected now: deleted", "B"),
        ("Remove it all", "alles LÖSCHEN!"),
    ]
    others = [("Delete every chosen file", "C"), ("Selected", "D")]
    monkeypatch.setattr(interface_en_de, "fraction", lambda name: 0.0 if "selected file now" in name else 1.0)
    splits = interface_en_de.held_apart([held_out, *resembling, *others])
    assert splits == {"train": others, "test": [held_out]}


@pytest.mark.parametrize(
    ("english", "german", "plain"),
    [
        ("Open a file", "Datei öffnen", True),
        ("Open %s", "%s öffnen", False),
        ("Room 12", "Raum zwölf", False),
        ("Home Assistant Cloud", "Home Assistant Cloud", False),
    ],
)
def test_what_counts_as_words(english, german, plain):
    assert interface_en_de.is_plain(english, german) == plain
