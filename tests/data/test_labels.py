"""Characters and subwords as labels behind CTC's blank."""

import pytest

from sigmarep import configuration
from sigmarep.data.audio import labels
from sigmarep.errors import BadInput

TEXTS = ["The cat  sat", "a tin can", "cats and cans"] * 20


def obtain(tmp_path, texts=TEXTS, **fields):
    config = labels.default_config()
    config.update(fields)
    configuration.check(config, labels.FIELDS, prefix="config.data.labels.")
    return labels.obtain(config, lambda: texts, cache_dir=str(tmp_path), key="texts")


def test_characters_are_those_of_the_texts_in_lower_case(tmp_path):
    found = obtain(tmp_path)
    assert found.characters == " acdehinst"
    assert found.size == 11
    assert found.normalize(" The  CAT\n") == "the cat"
    encoded = found.encode("the cat")
    assert encoded.labels.tolist() == [1 + " acdehinst".index(c) for c in "the cat"]
    assert found.decode(encoded.labels) == "the cat"


def test_unknown_characters_are_named_and_left_out(tmp_path):
    found = obtain(tmp_path, characters=" abc").encode("a cab, ed")
    assert found.unknown == {",", "e", "d"}
    assert found.labels.tolist() == [2, 1, 4, 2, 3, 1]


def test_case_is_kept_if_asked_for(tmp_path):
    assert "T" in obtain(tmp_path, lowercase=False).characters


def test_subwords_have_labels_above_the_blank_and_spell_what_they_do_not_know(tmp_path):
    found = obtain(tmp_path, kind="subword", size=300, model="bpe")
    for text in ("the cat sat", "naïve – ünïcode"):
        encoded = found.encode(text)
        assert encoded.labels.min() >= 1
        assert encoded.labels.max() < found.size
        assert not encoded.unknown
        assert found.decode(encoded.labels) == text


@pytest.mark.parametrize(
    ("fields", "texts", "message"),
    [
        ({"kind": "phone"}, TEXTS, "config.data.labels.kind = 'phone': expected one of character, subword"),
        ({"characters": "aba"}, TEXTS, "config.data.labels.characters = 'aba': expected each character once"),
        ({}, ["", " "], "config.data: the training split has no transcripts"),
    ],
)
def test_what_is_refused(tmp_path, fields, texts, message):
    with pytest.raises(BadInput) as error:
        obtain(tmp_path, texts, **fields)
    assert str(error.value) == message
