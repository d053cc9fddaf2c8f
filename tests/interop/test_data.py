"""Data and vocabularies of other projects' packages (the extra `others`), without a network."""

import base64

import pytest

datasets = pytest.importorskip("datasets")
tokenizers = pytest.importorskip("tokenizers")
tiktoken = pytest.importorskip("tiktoken")

from sigmarep.data import sources
from sigmarep.data.text import documents, other_vocabularies, vocabulary
from sigmarep.errors import BadInput
from sigmarep.training.config import default_config

NAME = "sigmarep.data.datasets.hugging_face.open_split"
TEXTS = ["The first text, naïve.", "Another one\nof two lines 12345", "日本語 😀  and   spaces\t"]
PAIRS = [{"translation": {"en": text, "de": text.upper()}} for text in TEXTS]


@pytest.fixture(params=["dictionary", "one", "parquet", "parts", "file"])
def folder(request, tmp_path):
    whole = datasets.Dataset.from_list(PAIRS)
    path = tmp_path / "set"
    if request.param == "dictionary":
        datasets.DatasetDict({"train": whole, "test": whole.select([1])}).save_to_disk(path)
    elif request.param == "one":
        whole.save_to_disk(path)
    elif request.param == "file":
        path = tmp_path / "pairs.parquet"
        whole.to_parquet(path)
    else:
        path.mkdir()
        if request.param == "parquet":
            whole.to_parquet(path / "train.parquet")
        else:
            whole.select([0, 1]).to_parquet(path / "train-00000-of-00002.parquet")
            whole.select([2]).to_parquet(path / "train-00001-of-00002.parquet")
    return str(path)


def test_examples_are_those_of_the_folder(folder):
    source = sources.open_source(NAME, "train", folder=folder)
    assert len(source) == 3
    assert [source[i]["translation/en"] for i in range(3)] == TEXTS
    assert [source[i]["translation/de"] for i in range(3)] == [text.upper() for text in TEXTS]
    assert sources.fingerprint(NAME, "train", folder=folder) == sources.fingerprint(NAME, "train", folder=folder)
    with pytest.raises(BadInput, match=r"has no split 'validation'; expected one of .*train"):
        sources.open_source(NAME, "validation", folder=folder)


def test_what_is_no_such_folder(tmp_path):
    with pytest.raises(BadInput, match=r"config.data.folder = '': expected a folder"):
        sources.open_source(NAME, "train", folder="")
    (tmp_path / "train.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(BadInput, match="cannot be read") as raised:
        sources.open_source(NAME, "train", folder=str(tmp_path))
    assert "\n" not in str(raised.value)


def _of_package(name):
    """An encoding as the package itself makes it, without downloading its ranks."""
    from tiktoken_ext import openai_public

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: {})
        return getattr(openai_public, name)()


@pytest.mark.parametrize("name", other_vocabularies.PATTERNS)
def test_texts_are_cut_as_the_package_cuts_them(name):
    assert other_vocabularies.PATTERNS[name] == _of_package(name)["pat_str"]


@pytest.fixture(params=["tokenizers", "tiktoken"])
def file(request, tmp_path):
    """A file of each package, and its own tokens of a text."""
    if request.param == "tokenizers":
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=300, special_tokens=["<end>"], initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
        )
        tokenizer.train_from_iterator(TEXTS, trainer)
        path = tmp_path / "tokenizer.json"
        tokenizer.save(str(path))
        return path, lambda text: tokenizer.encode(text, add_special_tokens=False).ids
    ranks = {bytes([value]): value for value in range(256)} | {b"th": 256, b"he": 257, b"the": 258}
    path = tmp_path / "cl100k_base.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
    encoding = tiktoken.Encoding(
        "c", pat_str=_of_package("cl100k_base")["pat_str"], mergeable_ranks=ranks, special_tokens={}
    )
    return path, encoding.encode_ordinary


def test_tokens_are_those_of_the_package_after_the_special_ones(file):
    path, own = file
    vocab = vocabulary.load(str(path))
    for text in [*TEXTS, "the end", ""]:
        assert list(vocab.encode(text)) == [token + vocabulary.SPECIAL for token in own(text)]
        assert vocab.decode([vocabulary.BOS, *vocab.encode(text), vocabulary.EOS, vocabulary.PAD]) == text
        assert max(vocab.encode(text), default=0) < vocab.size
    again = vocabulary.from_bytes(vocab.to_bytes())
    assert list(again.encode(TEXTS[2])) == list(vocab.encode(TEXTS[2]))
    assert again.size == vocab.size


def test_windows_of_a_language_model(file, tmp_path):
    path, _ = file
    datasets.Dataset.from_list([{"text": text} for text in TEXTS]).save_to_disk(tmp_path / "set")
    data = default_config("language_modeling").data
    data.name, data.folder, data.data_dir = NAME, str(tmp_path / "set"), str(tmp_path / "prepared")
    data.vocabulary.file, data.sequence_length = str(path), 128
    vocab = documents.open_vocabulary(data)
    windows = documents.open_windows(data, vocab, "train", train=True)
    assert windows.num_tokens == sum(len(vocab.encode(text)) + 1 for text in TEXTS)


def test_a_damaged_vocabulary_is_one_line(tmp_path):
    for name, content, reason in (
        ("a.json", b'{"model": 3}', "no file of tokenizers"),
        ("my.tiktoken", b"IQ== 0\n", "has one of the names r50k_base.tiktoken"),
        ("cl100k_base.tiktoken", b"!! zero\n", "no file of tiktoken"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadInput, match=reason) as raised:
            vocabulary.load(str(tmp_path / name))
        assert "\n" not in str(raised.value)
