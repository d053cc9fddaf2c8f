"""Language modelling and translation through the one trainer, on small real runs."""

import json
import math
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sacrebleu

from sigmarep.data.text.vocabulary import PAD
from sigmarep.errors import BadInput
from sigmarep.tasks import translation
from sigmarep.tasks.translation.data import bleu, unspaced
from sigmarep.tasks.translation.model import BLEU_TOKENIZERS
from sigmarep.training import evaluate, train_and_evaluate
from sigmarep.training.config import default_config, validate
from sigmarep.training.experiment import build
from sigmarep.training.step import evaluation_variables
from tests.interruption import run_whole_and_in_parts

pytestmark = pytest.mark.usefixtures("one_device")

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
GERMAN = dict(
    zip(WORDS, ["eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun", "zehn"], strict=True)
)


def sentence(rng, longest=9):
    return [WORDS[i] for i in rng.integers(0, 10, rng.integers(1, longest))]


@pytest.fixture
def folder(tmp_path):
    """Counting words in English with their German, and as documents."""
    rng = np.random.default_rng(0)
    for kind in ("pairs", "texts"):
        (tmp_path / kind).mkdir()
    for split, count in (("train", 120), ("test", 21)):
        rows = [sentence(rng) for _ in range(count)]
        pairs = [f"{' '.join(row)}\t{' '.join(GERMAN[word] for word in row)}" for row in rows]
        (tmp_path / "pairs" / f"{split}.tsv").write_text("\n".join(pairs) + "\n")
        (tmp_path / "texts" / f"{split}.txt").write_text("\n\n".join(" ".join(row) for row in rows) + "\n")
    return tmp_path


def small(config, folder, kind):
    config.data.name, config.data.folder = "text_folder", str(folder / kind)
    config.data.data_dir = str(folder / "data")
    config.data.vocabulary.kind = "word"
    config.data.vocabulary.size = 100
    config.model.depth, config.model.width, config.model.num_heads, config.model.mlp_dim = 1, 16, 2, 16
    config.model.scan = False
    config.model.reparam, config.model.norm = "sigma", "post"
    config.total_steps = 8
    config.log_every_steps = 1
    # No gradient reaches a key's bias but rounding, and Adam would make that rounding an update.
    config.optimizer.name, config.optimizer.learning_rate = "sgd", 0.1
    config.optimizer.schedule = "constant"
    config.writers.progress = "off"
    return config


def lm_config(folder):
    config = small(default_config("language_modeling"), folder, "texts")
    config.batch_size = 8
    config.data.sequence_length = 16
    return config


def mt_config(folder):
    config = small(default_config("translation"), folder, "pairs")
    config.batch_size = 128
    config.data.source_feature, config.data.target_feature = "source", "target"
    config.data.max_source_length = config.data.max_target_length = 16
    config.data.buckets = (8, 16)
    config.decoding.beam_size = 2
    return config


CONFIGS = {"lm": lm_config, "mt": mt_config}


@pytest.fixture(params=sorted(CONFIGS))
def config(request, folder):
    return CONFIGS[request.param](folder)


def losses(config, steps=6):
    experiment = build(validate(config))
    state = experiment.runner.put_state(experiment.create_state())
    stream = experiment.data.train_stream(start=0, process_index=0, process_count=1)
    found = []
    for _, batch in zip(range(steps), stream, strict=False):
        state, output = experiment.runner.step(state, batch, panel=False)
        found.append(float(output.scalars["loss"]))
    return found


def test_losses_do_not_depend_on_devices_or_microbatches(config, monkeypatch):
    """Rows have different numbers of tokens: only sums and weights that are divided once give the same losses."""
    if config.task == "translation":
        # One shape of batch, four programs; the others differ in length alone.
        config.data.buckets = (16,)
    monkeypatch.setattr(jax, "devices", jax.local_devices)
    eight = losses(config)
    config.parallel = "pmap"
    replicated = losses(config)
    config.parallel = "jit"
    monkeypatch.setattr(jax, "devices", lambda *_: jax.local_devices()[:1])
    one = losses(config)
    config.accumulation = 2
    accumulated = losses(config)
    assert one[0] != one[-1]
    np.testing.assert_allclose(eight, one, rtol=1e-5)
    np.testing.assert_allclose(replicated, one, rtol=1e-5)
    np.testing.assert_allclose(accumulated, one, rtol=1e-5)


def test_a_run_stopped_in_the_middle_of_an_epoch_goes_on_to_the_same_losses(config, folder):
    config.checkpoint_every_steps = 3
    config.model.dropout = 0.1
    # Its programs cost half of the time; evaluations of a run that goes on are compared for images.
    config.data.eval_splits = ()
    whole, parts = run_whole_and_in_parts(config, folder, crash_at=5)
    assert whole == parts


def test_changed_data_or_vocabulary_is_refused(config, folder):
    config.total_steps, config.data.eval_splits = 1, ()
    train_and_evaluate(config, str(folder / "run"))
    kind = config.data.folder
    path = next(p for p in (folder / kind).iterdir() if p.name.startswith("train"))
    text = path.read_text()
    path.write_text(text.replace("one", "eleven"))
    with pytest.raises(BadInput) as error:
        train_and_evaluate(config, str(folder / "run"))
    assert "vocabulary.model of its run (sha256 " in str(error.value)
    assert "restore them, or choose another folder" in str(error.value)
    # The same words in another order have the same vocabulary.
    lines = [line for line in text.split("\n") if line]
    between = "\n" if path.suffix == ".tsv" else "\n\n"
    path.write_text(between.join(reversed(lines)) + "\n")
    with pytest.raises(BadInput) as error:
        train_and_evaluate(config, str(folder / "run"))
    assert "data.json of its run (sha256 " in str(error.value)
    path.write_text(text)
    train_and_evaluate(config, str(folder / "run"))


def test_perplexities_are_those_of_every_token_by_hand(folder):
    config = lm_config(folder)
    config.baselines = True
    result = train_and_evaluate(config, str(folder / "run"))
    experiment = build(validate(config))
    task = experiment.task
    windows = experiment.data.evaluations(task)[0]
    state = experiment.create_state()
    variables = evaluation_variables(state)
    nats = tokens = 0.0
    for batch in windows.batches(process_index=0, process_count=1):
        log_p = task.model.apply(variables, batch["tokens"], positions=batch["positions"], segments=batch["segments"])
        for row, line in enumerate(np.asarray(log_p, np.float64)):
            for place, target in enumerate(batch["targets"][row]):
                if batch["mask"][row] and batch["segments"][row][place]:
                    nats -= line[place, target]
                    tokens += 1
    found = windows.finish([windows.step(variables, b) for b in windows.batches(process_index=0, process_count=1)])
    documents = (folder / "texts" / "test.txt").read_text().strip().split("\n\n")
    words = sum(len(document.split()) + 1 for document in documents)
    assert tokens == words + len(documents)
    assert found["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert found["word_perplexity"] == pytest.approx(math.exp(nats / words), rel=1e-4)
    size = sum(len(document.encode()) for document in documents)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-4)
    assert result["eval/test/perplexity"] < found["perplexity"]
    assert {"eval/test/unigram_perplexity", "eval/test/gzip_bits_per_byte"} <= set(result)


def test_bleu_is_sacrebleus_own_of_what_was_written(folder):
    config = mt_config(folder)
    config.baselines = True
    config.bleu_tokenizer = "intl"
    config.total_steps = 150
    config.log_every_steps = 150
    config.optimizer.name, config.optimizer.learning_rate = "adam", 0.01
    result = train_and_evaluate(config, str(folder / "run"))
    lines = (folder / "run/outputs/test/translations.tsv").read_text().strip().split("\n")[1:]
    sources, references, hypotheses = zip(*(line.split("\t") for line in lines), strict=True)
    pairs = [line.split("\t") for line in (folder / "pairs/test.tsv").read_text().strip().split("\n")]
    assert list(zip(sources, references, strict=True)) == [tuple(pair) for pair in pairs]
    assert result["eval/test/bleu"] == pytest.approx(
        sacrebleu.corpus_bleu(hypotheses, [references], tokenize="intl").score, abs=1e-6
    )
    assert result["eval/test/copy_bleu"] == pytest.approx(
        sacrebleu.corpus_bleu(sources, [references], tokenize="intl").score, abs=1e-6
    )
    assert "tok:intl" in (folder / "run/outputs/test/bleu.txt").read_text()
    # It has learned something, and evaluating the checkpoint says the same.
    assert result["eval/test/bleu"] > 5
    again = evaluate(None, str(folder / "run"))
    assert again["eval/test/bleu"] == result["eval/test/bleu"]


@pytest.mark.parametrize("tokenizer", ["zh", "char"])
def test_bleu_counts_the_characters_of_chinese_where_asked(tokenizer):
    reference, hypothesis = "今天天气很好我们去公园", "今天天气很好我去公园"

    def grams(text, n):
        return Counter(text[i : i + n] for i in range(len(text) - n + 1))

    # Corpus BLEU by its definition (Papineni et al. 2002), with characters for words.
    matches = [sum((grams(hypothesis, n) & grams(reference, n)).values()) for n in range(1, 5)]
    precisions = [match / (len(hypothesis) - n) for n, match in enumerate(matches)]
    expected = 100 * math.exp(1 - len(reference) / len(hypothesis)) * math.prod(precisions) ** 0.25
    score, signature = bleu([hypothesis], [reference], tokenizer=tokenizer)
    assert score == pytest.approx(expected)
    assert 70 < score < 80
    assert f"tok:{tokenizer}" in signature
    # Words between spaces: the whole sentence is one, and wrong.
    assert bleu([hypothesis], [reference])[0] == 0


def test_references_without_spaces_are_noticed():
    assert unspaced(["今天天气很好, 我们去公园.", "ok"])
    assert not unspaced(["Das Wort 公園 heißt Park.", "schön"])
    assert not unspaced([])


def test_every_tokenizer_works_or_names_its_package():
    for tokenizer in BLEU_TOKENIZERS:
        try:
            assert bleu(["a b c d"], ["a b c d"], tokenizer=tokenizer)[0] == pytest.approx(100)
        except BadInput as error:
            assert re.fullmatch(  # noqa: PT017
                rf"config\.bleu_tokenizer = '{tokenizer}': needs a package .*; pip install \"sacrebleu\[(ja|ko)\]\"",
                str(error),
            )


def test_the_loss_of_a_pair_does_not_depend_on_its_bucket(folder):
    config = mt_config(folder)
    narrow = build(validate(config))
    config.data.buckets = (16,)
    wide = build(validate(config))
    variables = evaluation_variables(narrow.create_state())

    def nats(experiment):
        evaluation = experiment.data.evaluations(experiment.task)[0]
        batches = evaluation.batches(process_index=0, process_count=1)
        results = [jax.jit(evaluation.step)(variables, batch) for batch in batches]
        return evaluation.finish(results), results

    (first, _), (second, _) = nats(narrow), nats(wide)
    assert first["loss"] == pytest.approx(second["loss"], rel=1e-5)
    assert first["bleu"] == second["bleu"]


def test_no_program_is_compiled_after_every_shape_was_seen(folder):
    config = mt_config(folder)
    experiment = build(validate(config))
    state = experiment.runner.put_state(experiment.create_state())
    stream = experiment.data.train_stream(start=0, process_index=0, process_count=1)
    epoch = experiment.data.train_batches.batches_per_epoch
    sizes = []
    for step, batch in zip(range(3 * epoch), stream, strict=False):
        state, _ = experiment.runner.step(state, batch, panel=False)
        if (step + 1) % epoch == 0:
            sizes.append(experiment.runner._step._cache_size())
    assert sizes == [len(experiment.data.train_batches.shapes)] * 3


def test_weights_are_the_targets_that_are_no_padding(folder):
    config = mt_config(folder)
    experiment = build(validate(config))
    state = experiment.create_state()
    batch = next(experiment.data.train_stream(start=0, process_index=0, process_count=1))
    output = experiment.task.loss(
        state.params, state.model_state, jax.tree.map(jnp.asarray, batch), jax.random.key(0), attention=False
    )
    assert float(output.loss[1]) == np.sum(batch["targets"] != PAD)


@pytest.mark.parametrize(
    ("kind", "field", "value", "message"),
    [
        ("lm", "model.positions", "alibi", "config.model.positions = 'alibi': expected one of"),
        (
            "lm",
            "model.adaptive_cutoffs",
            (200,),
            "config.model.adaptive_cutoffs = (200,): expected rising numbers below",
        ),
        ("lm", "model.logit_chunk", 5, "config.model.logit_chunk = 5: does not divide the 16 positions"),
        ("lm", "model.num_heads", 3, "config.model.num_heads = 3: does not divide width = 16"),
        ("mt", "model.depth", 0, "config.model.depth = 0"),
        ("mt", "decoding.beam_size", 0, "config.decoding.beam_size = 0: expected a whole number of at least 1"),
        (
            "mt",
            "decoding.length_penalty",
            -1.0,
            "config.decoding.length_penalty = -1.0: expected a number of at least 0",
        ),
        ("mt", "decoding.length_extra", 0, "length_extra = 0: expected a whole number of at least 1"),
        (
            "mt",
            "data.rows_multiple",
            4,
            "config.batch_size = 128:, a batch of 12 rows among it, does not divide over 8",
        ),
    ],
)
def test_what_is_refused(folder, kind, field, value, message, monkeypatch):
    monkeypatch.setattr(jax, "devices", jax.local_devices)
    config = CONFIGS[kind](folder)
    if field == "data.rows_multiple":
        config.batch_size, message = 96, message.replace("128", "96")
    config.update_from_flattened_dict({field: value})
    with pytest.raises(BadInput) as error:
        build(validate(config))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_files_of_a_run_are_its_vocabulary_and_its_data(folder):
    config = mt_config(folder)
    config.total_steps, config.data.eval_splits = 1, ()
    train_and_evaluate(config, str(folder / "run"))
    facts = json.loads((folder / "run/data.json").read_text())
    assert facts["pairs"] == 120
    assert (folder / "run/vocabulary.model").read_bytes().startswith(b"sigmarep vocabulary 1\n")
    assert (
        translation.open_data(validate(config)).files()["vocabulary.model"]
        == (folder / "run/vocabulary.model").read_bytes()
    )
