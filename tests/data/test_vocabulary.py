"""Vocabularies: round trips, determinism, limits, and what is refused."""

import numpy as np
import pytest
import sentencepiece

from sigmarep import configuration
from sigmarep.data.text import vocabulary
from sigmarep.data.text.vocabulary import BOS, EOS, PAD, UNK
from sigmarep.errors import BadInput

TEXTS = [
    "the cat sat on the mat\nand the dog ran",
    "a mat for the cat, another for the dog\n",
    "\n".join(f"number {i} is followed by number {i + 1}" for i in range(60)),
]
AWKWARD = ["two  spaces, a\ttab", " space first and last ", "漢字 and ümläute", "", "\n\nline ends\n"]


def config(**fields):
    c = vocabulary.default_config()
    c.update({"size": 330, **fields})
    return c


def obtain_checked(made, texts, folder):
    configuration.check(made, vocabulary.FIELDS, prefix="config.data.vocabulary.")
    return vocabulary.obtain(made, lambda: iter(texts), cache_dir=str(folder), key="k")


@pytest.mark.parametrize("model", ["unigram", "bpe"])
def test_subwords_give_back_every_text(model):
    found = vocabulary.train(config(model=model), TEXTS)
    assert 256 < found.size <= 330
    for text in [*TEXTS, *AWKWARD]:
        tokens = found.encode(text)
        assert tokens.dtype == np.int32
        assert not set(tokens) & {PAD, BOS, EOS, UNK}
        assert found.decode(tokens) == text


def test_subwords_are_shorter_than_bytes():
    found = vocabulary.train(config(model="bpe"), TEXTS)
    assert len(found.encode(TEXTS[2])) < 0.5 * len(TEXTS[2])


def test_bytes_are_utf_8_behind_the_special_tokens():
    found = vocabulary.ByteVocabulary()
    np.testing.assert_array_equal(found.encode("aé"), [4 + 0x61, 4 + 0xC3, 4 + 0xA9])
    for text in [*TEXTS, *AWKWARD]:
        assert found.decode(found.encode(text)) == text
    assert found.decode([BOS, 4 + 0x61, EOS, 4 + 0x62]) == "a"


def test_words_are_counted_with_line_ends():
    found = vocabulary.train(config(kind="word", size=7), TEXTS[:2])
    # "the" five times, the line's end three times; of those with two the first in the alphabet.
    assert found.words == ["the", "<eol>", "dog"]
    np.testing.assert_array_equal(found.encode("the bird\nthe dog"), [4, UNK, 5, 4, 6, 5])
    assert found.decode(found.encode("the bird\nthe dog")) == "the <unk>\nthe dog\n"
    assert len(vocabulary.split_words("a b\n\nc")) == 6


def test_special_tokens_are_where_sentencepiece_has_them():
    found = vocabulary.train(config(), TEXTS)
    processor = sentencepiece.SentencePieceProcessor(model_proto=found.to_bytes())
    specials = processor.pad_id(), processor.bos_id(), processor.eos_id(), processor.unk_id()
    assert specials == (PAD, BOS, EOS, UNK)


@pytest.mark.parametrize("kind", ["subword", "word", "byte"])
def test_a_vocabulary_is_kept_and_trained_once(tmp_path, kind):
    asked = []

    def texts():
        asked.append(1)
        return iter(TEXTS)

    first, second = (
        vocabulary.obtain(config(kind=kind, size=300), texts, cache_dir=str(tmp_path), key="k") for _ in range(2)
    )
    assert len(asked) == (kind != "byte")
    assert vocabulary.fingerprint(first) == vocabulary.fingerprint(second)
    np.testing.assert_array_equal(first.encode(TEXTS[0]), second.encode(TEXTS[0]))
    restored = vocabulary.from_bytes(first.to_bytes())
    assert restored.size == first.size
    again = vocabulary.train(config(kind=kind, size=300), TEXTS)
    assert again.to_bytes() == first.to_bytes()


def test_other_texts_or_settings_are_another_vocabulary(tmp_path):
    asked = []

    def texts():
        asked.append(1)
        return iter(TEXTS)

    for key, size in (("a", 300), ("b", 300), ("a", 310)):
        vocabulary.obtain(config(size=size), texts, cache_dir=str(tmp_path), key=key)
    assert len(asked) == 3


@pytest.mark.parametrize(
    ("fields", "texts", "message"),
    [
        ({"kind": "subwords"}, TEXTS, "config.data.vocabulary.kind = 'subwords': expected one of subword, byte, word"),
        ({"model": "bp"}, TEXTS, "config.data.vocabulary.model = 'bp': expected one of unigram, bpe"),
        ({"size": 100}, TEXTS, "config.data.vocabulary.size = 100: no unigram vocabulary of that size can be made"),
        ({"size": 4, "kind": "word"}, TEXTS, "config.data.vocabulary.size = 4: expected a whole number above 4"),
        ({}, [], "config.data.vocabulary.size = 330: no unigram vocabulary"),
        ({"kind": "word"}, [], "the training split has no words"),
        ({"file": "/nowhere/v.model"}, TEXTS, "config.data.vocabulary.file = '/nowhere/v.model': cannot be read"),
    ],
)
def test_what_is_refused(tmp_path, fields, texts, message):
    with pytest.raises(BadInput) as error:
        obtain_checked(config(**fields), texts, tmp_path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_vocabulary_is_refused(tmp_path):
    path = tmp_path / "v.model"
    path.write_bytes(b"not a model")
    with pytest.raises(BadInput) as error:
        vocabulary.load(str(path))
    assert "cannot be read" in str(error.value)


def test_a_model_of_sentencepiece_can_be_brought(tmp_path):
    path = tmp_path / "v.model"
    path.write_bytes(vocabulary.train(config(), TEXTS).to_bytes())
    found = vocabulary.obtain(config(file=str(path)), lambda: iter(()), cache_dir=str(tmp_path), key="k")
    assert found.decode(found.encode(TEXTS[0])) == TEXTS[0]
