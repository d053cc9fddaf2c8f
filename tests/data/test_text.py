"""Windows of text: every target once, documents apart, the same on every machine; folders of files."""

import gzip
import itertools

import numpy as np
import pytest

from sigmarep import configuration
from sigmarep.data import pipeline, token_cache
from sigmarep.data.text import baselines, documents, vocabulary
from sigmarep.data.text.vocabulary import BOS, EOS, PAD
from sigmarep.errors import BadInput

ZIPPED = gzip.compress(b"some\nlines\n", mtime=0)
DOCUMENTS = ["alpha beta", "a", "gamma delta epsilon zeta", "x" * 37, "eta theta"]


def flipped(content, position):
    """The content with all bits of one byte changed."""
    changed = bytearray(content)
    changed[position] ^= 0xFF
    return bytes(changed)


def write(folder, documents=DOCUMENTS, name="train.txt"):
    (folder / name).write_text("\n\n".join(documents) + "\n", encoding="utf-8")


@pytest.fixture
def data(tmp_path):
    (tmp_path / "texts").mkdir()
    write(tmp_path / "texts")
    write(tmp_path / "texts", ["held out", "another text here"], "test.txt")
    config = documents.default_config()
    config.name, config.folder, config.data_dir = "text_folder", str(tmp_path / "texts"), str(tmp_path / "data")
    config.vocabulary.kind = "byte"
    config.sequence_length = 16
    return config


def windows(data, split="train", train=True):
    found = documents.open_windows(data, documents.open_vocabulary(data), split, train=train)
    return found, [found[i] for i in range(len(found))]


def document_pairs(documents):
    """(input, target) of every token, by document."""
    for document in documents:
        ids = [4 + byte for byte in document.encode()]
        yield list(zip([BOS, *ids], [*ids, EOS], strict=True))


def checked(data):
    configuration.check(data, documents.FIELDS, prefix="config.data.")
    return windows(data, data.train_split)


@pytest.mark.parametrize("packing", ["documents", "stream"])
def test_every_target_is_predicted_once(data, packing):
    data.packing = packing
    found, rows = windows(data)
    pairs = [
        (int(token), int(target))
        for row in rows
        for token, target, weight in zip(row["tokens"], row["targets"], row["weights"], strict=True)
        if weight
    ]
    expected = [pair for document in document_pairs(DOCUMENTS) for pair in document]
    assert sorted(pairs) == sorted(expected)
    assert found.num_tokens == len(expected)
    assert found.num_bytes == sum(len(document) for document in DOCUMENTS)
    assert found.num_words == sum(len(document.split()) + 1 for document in DOCUMENTS)
    if packing == "stream":
        assert pairs == expected


def test_packed_windows_hold_whole_pieces_apart(data):
    _, rows = windows(data)
    pieces = []
    for row in rows:
        padding = row["segments"] == 0
        assert np.all(row["weights"] == ~padding)
        assert np.all(row["tokens"][padding] == PAD)
        for segment in range(1, row["segments"].max() + 1):
            inside = np.flatnonzero(row["segments"] == segment)
            assert np.all(np.diff(inside) == 1)
            np.testing.assert_array_equal(row["positions"][inside], np.arange(len(inside)))
            pieces.append(list(zip(row["tokens"][inside].tolist(), row["targets"][inside].tolist(), strict=True)))
    # Documents longer than a window are cut into whole windows and a rest.
    expected = [document[i : i + 16] for document in document_pairs(DOCUMENTS) for i in range(0, len(document), 16)]
    assert sorted(pieces) == sorted(expected)
    # 11 + 2 + 25 + 38 + 10 targets, in the fewest windows that can hold the pieces.
    assert len(rows) == 6


def test_packing_leaves_little_room_on_real_lengths():
    lengths = np.random.default_rng(0).integers(1, 300, 2000)
    packed = documents._pack(lengths, 256)
    used = [sum(last - first for _, first, last in window) for window in packed]
    assert max(used) <= 256
    assert sum(used) == lengths.sum()
    assert len(packed) <= 1.01 * np.ceil(lengths.sum() / 256) + 1


@pytest.mark.parametrize("stride", [1, 5, 16])
def test_a_stride_gives_context_and_counts_each_target_once(data, stride):
    data.packing, data.eval_stride = "stream", stride
    found, rows = windows(data, "test", train=False)
    counted = [int(t) for row in rows for t, w in zip(row["targets"], row["weights"], strict=True) if w]
    expected = [t for document in document_pairs(["held out", "another text here"]) for _, t in document]
    assert counted == expected
    assert found.num_tokens == len(expected)
    if stride < 16:
        assert rows[1]["weights"].sum() == stride


def test_batches_of_any_number_of_processes_are_the_same(data):
    found, _ = windows(data)

    def global_batches(count, start=0):
        streams = [
            pipeline.training_stream(found, batch_size=4, seed=3, start=start, process_index=p, process_count=count)
            for p in range(count)
        ]
        parts = zip(*(itertools.islice(stream, 6) for stream in streams), strict=True)
        return [np.concatenate([part["tokens"] for part in batch]) for batch in parts]

    whole = global_batches(1)
    np.testing.assert_array_equal(whole, global_batches(2))
    np.testing.assert_array_equal(whole[2:], global_batches(4, start=2)[:4])


def test_a_changed_file_or_vocabulary_is_noticed(data, tmp_path):
    before, _ = windows(data)
    write(tmp_path / "texts", [*DOCUMENTS[:-1], "eta thetA"])
    after, _ = windows(data)
    assert before.fingerprint != after.fingerprint
    write(tmp_path / "texts")
    again, _ = windows(data)
    assert before.fingerprint == again.fingerprint


def test_wikitext_files_are_documents_by_title(data, tmp_path):
    folder = tmp_path / "wiki"
    folder.mkdir()
    content = " \n = First = \n \n some words \n = = Section = = \n more \n \n = Second = \n \n end \n"
    (folder / "wiki.train.tokens").write_text(content)
    data.folder = str(folder)
    texts = list(documents.texts(data, "train"))
    assert [document.split("\n")[0] for document in texts if document.strip()] == [" = First = ", " = Second = "]
    words = sum(len(vocabulary.split_words(document)) for document in texts if document.strip())
    # Every word and every line's end of the file but for the blank first line, which belongs to no document.
    assert words == len(content.split()) + content.count("\n") - 1


def test_gzipped_files_are_read(data, tmp_path):
    folder = tmp_path / "zipped"
    folder.mkdir()
    (folder / "train.txt.gz").write_bytes(gzip.compress(b"one\n\ntwo\n"))
    data.folder = str(folder)
    assert list(documents.texts(data, "train")) == ["one", "two"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no train.txt, no train.tsv and no pair such as train.en and train.de"),
        ({"train.txt": b""}, "train.txt: is empty"),
        ({"train.txt": b" \n\n"}, "train.txt: has no text"),
        ({"train.txt": b"good\nbad \xff\n"}, "train.txt:2: is not UTF-8 (byte 5 of the line)"),
        ({"train.txt.gz": b"no gzip"}, "train.txt.gz:1: cannot be read (Not a gzipped file (b'no'))"),
        (
            {"train.txt.gz": ZIPPED[:-12]},
            "train.txt.gz:2: cannot be read (Compressed file ended before the end-of-stream",
        ),
        # A byte of the deflated text, and one of the checksum behind it.
        ({"train.txt.gz": flipped(ZIPPED, 10)}, "train.txt.gz:1: cannot be read (Error -3 while decompressing data"),
        ({"train.txt.gz": flipped(ZIPPED, -6)}, "train.txt.gz:3: cannot be read (CRC check failed"),
        ({"train.txt": b"a\n", "train.tsv": b"a\tb\n"}, "several files of the split train: train.tsv, train.txt"),
        ({"train.en": b"a\n"}, "train.en: is alone"),
    ],
)
def test_what_a_folder_must_not_be(data, tmp_path, files, message):
    folder = tmp_path / "bad"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    data.folder = str(folder)
    with pytest.raises(BadInput) as error:
        windows(data)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    # The fault is in the user's own file.
    assert "delete" not in str(error.value)


def test_a_link_to_nowhere_is_named(data, tmp_path):
    (tmp_path / "texts/train.txt").unlink()
    (tmp_path / "texts/train.txt.gz").symlink_to(tmp_path / "gone.gz")
    with pytest.raises(BadInput, match=r"texts/train\.txt\.gz: cannot be read \(No such file or directory\)$"):
        windows(data)


def test_a_character_has_one_spelling_and_a_byte_order_mark_is_no_text(data, tmp_path):
    write(tmp_path / "texts", ["caf\xe9", "\u1e69"])
    composed, _ = windows(data)
    assert list(documents.texts(data, "train")) == ["caf\xe9", "\u1e69"]
    # The same in normal form D, and with the marks of the second in the other order.
    (tmp_path / "texts/train.txt").write_text("\ufeffcafe\u0301\n\ns\u0307\u0323\n", encoding="utf-8")
    assert list(documents.texts(data, "train")) == ["caf\xe9", "\u1e69"]
    decomposed, _ = windows(data)
    assert decomposed.fingerprint == composed.fingerprint
    # A mark within the text is a character of it.
    write(tmp_path / "texts", ["one", "\ufefftwo"])
    assert list(documents.texts(data, "train")) == ["one", "\ufefftwo"]


def test_the_texts_of_any_data_set_are_in_normal_form():
    assert token_cache.feature({"text": "e\u0301".encode()}, "text", "text_feature") == "\xe9"
    assert token_cache.feature({"text": "e\u0301"}, "text", "text_feature") == "\xe9"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("folder", "/nowhere", "config.data.folder = '/nowhere': there is no such folder"),
        ("packing", "packed", "config.data.packing = 'packed': expected one of documents, stream"),
        ("sequence_length", 0, "config.data.sequence_length = 0: expected a whole number of at least 1"),
        ("eval_stride", 4, "config.data.eval_stride = 4: needs packing = 'stream'"),
        ("text_feature", "content", "config.data.text_feature = 'content': the data set has no such feature"),
        ("train_split", "training", "has no split 'training'"),
    ],
)
def test_fields_that_are_refused(data, field, value, message):
    data[field] = value
    with pytest.raises(BadInput) as error:
        checked(data)
    assert message in str(error.value)


def test_the_unigram_baseline_equals_counting(data):
    train, _ = windows(data)
    test, _ = windows(data, "test", train=False)
    counts = dict.fromkeys(range(260), 1)
    for document in document_pairs(DOCUMENTS):
        for _, target in document:
            counts[target] += 1
    total = sum(counts.values())
    nats = -sum(
        np.log(counts[target] / total)
        for document in document_pairs(["held out", "another text here"])
        for _, target in document
    )
    assert baselines.unigram(train, test, 260) == pytest.approx(nats)


def test_gzip_bits_a_byte():
    content = ["abcabcabc" * 50, "other"]
    size = len(gzip.compress("\n".join(content).encode(), 9, mtime=0))
    assert baselines.gzip_bits_per_byte(content) == 8 * size / len("\n".join(content))


def test_the_nearest_neighbour_is_the_most_similar_sentence():
    found = baselines.nearest_neighbor(
        ["save the file", "open a window", "delete the file"], ["S", "O", "D"], ["saves this file", "an open window"]
    )
    assert found == ["S", "O"]


def test_prepared_texts_are_read_without_writing(data, tmp_path):
    data.vocabulary.kind = "word"
    first, _ = windows(data)
    for lock in (tmp_path / "data").rglob("*.lock"):
        lock.unlink()

    def state():
        return {path: (path.stat().st_mtime_ns, path.stat().st_ctime_ns) for path in (tmp_path / "data").rglob("*")}

    before = state()
    again, _ = windows(data)
    assert again.fingerprint == first.fingerprint
    assert state() == before
