"""Speech recognition through the one trainer, on small real runs: letters are spoken as tones."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import soundfile

from sigmarep.errors import BadInput
from sigmarep.training import evaluate, train_and_evaluate
from sigmarep.training.config import default_config, validate
from sigmarep.training.experiment import build, build_program
from sigmarep.training.step import evaluation_variables
from tests.interruption import run_whole_and_in_parts

pytestmark = pytest.mark.usefixtures("one_device")

ROOT = Path(__file__).parents[2]
RATE = 8000
LETTERS = " abcde"


def spoken(text, rng):
    """Each letter as 80 ms of a tone of its own, and a pause of 40 ms."""
    parts = []
    for letter in text:
        time = np.arange(int(0.08 * RATE)) / RATE
        pitch = 300 + 450 * LETTERS.index(letter)
        parts += [np.sin(2 * np.pi * pitch * time) * rng.uniform(0.2, 0.5), np.zeros(int(0.04 * RATE))]
    return np.concatenate(parts) + rng.normal(0, 0.005, sum(map(len, parts)))


def sentence(rng):
    return " ".join("".join(rng.choice(list("abcde"), rng.integers(1, 4))) for _ in range(rng.integers(1, 4)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("speech")
    rng = np.random.default_rng(0)
    for split, count in (("train", 60), ("test", 11)):
        lines = []
        for i in range(count):
            text = sentence(rng)
            soundfile.write(path / f"{split}{i}.wav", spoken(text, rng), RATE)
            lines.append(f"{split}{i}.wav\t{text}\tspeaker{i % 3}")
        if split == "train":
            # Each odd in one way; see test_what_is_odd_is_counted_and_named.
            for name, text, samples in (
                ("unknown", "ab~", spoken("ab", rng)),
                ("long", "a b", np.tile(spoken("a b", rng), 12)),
                ("short", "abcdeabcdeabcde", spoken("a", rng)),
            ):
                soundfile.write(path / f"{name}.wav", samples, RATE)
                lines.append(f"{name}.wav\t{text}\tspeaker0")
            (path / "broken.wav").write_bytes(b"RIFF, but not really")
            lines.append("broken.wav\tabc\tspeaker0")
        (path / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return path


def small(folder):
    config = default_config("speech_recognition")
    config.data.name, config.data.folder = "speech_folder", str(folder)
    config.data.data_dir = str(folder / "data")
    config.data.buckets = (1.0, 2.0)
    config.data.labels.characters = LETTERS
    config.data.num_filters = 20
    config.batch_size = 16
    config.model.depth, config.model.width, config.model.num_heads, config.model.mlp_dim = 1, 16, 2, 16
    config.model.scan = False
    config.total_steps = 8
    config.log_every_steps = 1
    config.optimizer.name, config.optimizer.learning_rate = "sgd", 0.1
    config.optimizer.schedule = "constant"
    config.writers.progress = "off"
    return config


@pytest.fixture
def config(folder):
    return small(folder)


def losses(config, steps=5):
    experiment = build(validate(config))
    state = experiment.runner.put_state(experiment.create_state())
    stream = experiment.data.train_stream(start=0, process_index=0, process_count=1)
    found = []
    for _, batch in zip(range(steps), stream, strict=False):
        state, output = experiment.runner.step(state, batch, panel=False)
        found.append(float(output.scalars["loss"]))
    return found


def test_losses_do_not_depend_on_devices_or_microbatches(config, monkeypatch):
    config.model.max_global_shift = 0.0
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


def batches(config, *, start=0, process_index=0, process_count=1, count=6):
    data = build(validate(config)).data
    stream = data.train_stream(start=start, process_index=process_index, process_count=process_count)
    return list(itertools.islice(stream, count))


def with_masks(config):
    config.data.spec_augment.freq_masks, config.data.spec_augment.freq_width = 1, 5
    config.data.spec_augment.time_masks, config.data.spec_augment.time_width = 2, 10
    return config


def test_a_batch_follows_from_the_seed_and_its_number_alone(config):
    whole = batches(with_masks(config))
    for a, b in zip(whole[2:], batches(config, start=2, count=4), strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)
    parts = [batches(config, process_index=i, process_count=4) for i in range(4)]
    for number, batch in enumerate(whole):
        for name, array in batch.items():
            np.testing.assert_array_equal(array, np.concatenate([part[number][name] for part in parts]))


def test_spec_augment_begins_at_its_step(config):
    plain = batches(config)
    config = with_masks(config)
    config.data.spec_augment.start_step = 3
    masked = batches(config)
    same = [np.array_equal(a["features"], b["features"]) for a, b in zip(plain, masked, strict=True)]
    assert same == [True, True, True, False, False, False]


def test_an_epoch_has_every_utterance_once(config):
    data = build(validate(config)).data
    epoch = batches(config, count=data.train_batches.batches_per_epoch)
    found = np.concatenate([batch["index"] for batch in epoch])
    assert sorted(found[found >= 0]) == list(range(60))


def test_a_run_stopped_in_the_middle_of_an_epoch_goes_on_to_the_same_losses(config, tmp_path):
    config = with_masks(config)
    config.checkpoint_every_steps = 3
    config.model.dropout = config.model.layer_drop = 0.1
    whole, parts = run_whole_and_in_parts(config, tmp_path, crash_at=5)
    assert whole == parts


def test_the_loss_of_an_utterance_does_not_depend_on_its_bucket(config):
    narrow = build(validate(config))
    config.data.buckets = (2.5,)
    config.batch_size = 40
    wide = build(validate(config))
    variables = evaluation_variables(narrow.create_state())

    def found(experiment):
        evaluation = experiment.data.evaluations(experiment.task)[0]
        results = [
            jax.device_get(jax.jit(evaluation.step)(variables, batch))
            for batch in evaluation.batches(process_index=0, process_count=1)
        ]
        return evaluation.finish(results), experiment.task.decoded(results)

    (first, heard), (second, again) = found(narrow), found(wide)
    assert first["loss"] == pytest.approx(second["loss"], rel=1e-5)
    assert heard == again


def test_no_program_is_compiled_after_every_shape_was_seen(config):
    experiment = build(validate(config))
    state = experiment.runner.put_state(experiment.create_state())
    stream = experiment.data.train_stream(start=0, process_index=0, process_count=1)
    epoch = experiment.data.train_batches.batches_per_epoch
    sizes = []
    for epoch_number in range(4):
        for _, batch in zip(range(epoch), stream, strict=False):
            # Both programs of every shape in the first two epochs.
            state, _ = experiment.runner.step(state, batch, panel=epoch_number % 2 == 1)
        sizes.append(experiment.runner._step._cache_size())
    shapes = len(experiment.data.train_batches.shapes)
    assert sizes == [shapes, 2 * shapes, 2 * shapes, 2 * shapes]


def test_what_is_odd_is_counted_and_named(config, tmp_path):
    train_and_evaluate(config, str(tmp_path / "run"))
    facts = json.loads((tmp_path / "run/data.json").read_text())
    assert facts["utterances"] == 63
    assert facts["kept"] == 60
    assert facts["unknown_characters"] == {"count": 1, "names": ["unknown.wav"]}
    assert facts["characters_without_label"] == {"~": 1}
    assert facts["too_long"] == {"count": 1, "names": ["long.wav"]}
    assert facts["too_short"] == {"count": 1, "names": ["short.wav"]}
    assert "broken.wav" in json.dumps(facts["preparation"])
    # What is told beside the fingerprint may change with the version; the data may not.
    del facts["too_short"]
    (tmp_path / "run/data.json").write_text(json.dumps(facts))
    train_and_evaluate(config, str(tmp_path / "run"))
    (tmp_path / "run/data.json").write_text(json.dumps({**facts, "fingerprint": "another"}))
    with pytest.raises(
        BadInput, match=r"data.json of its run .* is not what config.data and config.init_from give now"
    ):
        train_and_evaluate(config, str(tmp_path / "run"))


def test_segments_to_be_ignored_are_in_no_split(config, folder, tmp_path):
    for path in folder.glob("*.wav"):
        os.symlink(path, tmp_path / path.name)
    for split in ("train", "test"):
        lines = (folder / f"{split}.tsv").read_text().splitlines()
        lines[1] = lines[1].split("\t")[0] + "\tignore_time_segment_in_scoring\tspeaker0"
        (tmp_path / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    config.data.folder = str(tmp_path)
    data = build(validate(config)).data
    for split, count in (("train", 59), ("test", 10)):
        corpus = data.open_corpus(split)
        assert len(corpus) == count
        assert corpus.report["ignored"] == {"count": 1, "names": [f"{split}1.wav"]}
    assert corpus.report["unknown_characters"]["count"] == 0
    config.data.labels.characters = ""
    assert "_" not in build(validate(config)).data.labels.characters


def learned(folder):
    config = small(folder)
    config.total_steps = 150
    config.log_every_steps = 50
    config.model.width, config.model.mlp_dim = 32, 64
    config.optimizer.name, config.optimizer.learning_rate = "adam", 0.01
    config.baselines = True
    return config


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("learned") / "run"
    return path, train_and_evaluate(learned(folder), str(path))


def test_it_learns_to_hear_and_its_tables_add_up(run):
    path, result = run
    assert result["eval/test/cer"] < 0.3
    assert result["eval/test/wer"] < min(
        result["eval/test/most_frequent_wer"], result["eval/test/nearest_neighbour_wer"]
    )
    lines = [line.split("\t") for line in (path / "outputs/test/transcripts.tsv").read_text().splitlines()[1:]]
    assert len(lines) == 11
    words = sum(len(line[3].split()) for line in lines)
    for table in ("by_speaker", "by_duration"):
        rows = [line.split("\t") for line in (path / f"outputs/test/{table}.tsv").read_text().splitlines()[1:]]
        assert sum(int(row[2]) for row in rows) == words
        errors = sum(int(value) for row in rows for value in row[4:7])
        assert errors / words == pytest.approx(result["eval/test/wer"], abs=1e-6)
    again = evaluate(None, str(path))
    assert again["eval/test/wer"] == result["eval/test/wer"]


def script(name, *arguments):
    """Status and both outputs of a command."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / name), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    )
    return done.returncode, done.stdout, done.stderr


def test_files_are_transcribed_by_command(run, folder, tmp_path):
    path, _ = run
    lines = [line.split("\t") for line in (path / "outputs/test/transcripts.tsv").read_text().splitlines()[1:]]
    heard = {line[0]: line[4] for line in lines[:3]}
    # Stereo of another rate beside those that the model was evaluated on.
    samples, rate = soundfile.read(folder / lines[0][0])
    stereo = tmp_path / "stereo.flac"
    soundfile.write(stereo, np.stack([np.repeat(samples, 2)] * 2, axis=1), 2 * rate)
    names = [stereo, *(folder / name for name in heard)]
    status, out, err = script("transcribe.py", "--workdir", path, *(f"--audio={name}" for name in names))
    assert status == 0, err
    first, *others = [line.split("\t") for line in out.splitlines()]
    assert others == [[str(folder / name), text] for name, text in heard.items()]
    assert first[0] == str(stereo)
    (tmp_path / "broken.flac").write_bytes(b"fLaC, but not really")
    soundfile.write(tmp_path / "long.wav", np.tile(samples, 30), rate)
    names = [tmp_path / "broken.flac", names[1], tmp_path / "long.wav"]
    status, out, err = script("transcribe.py", "--workdir", path, *(f"--audio={name}" for name in names))
    assert (status, out.splitlines(), err.count("\n")) == (2, ["\t".join(others[0])], 1)
    assert "broken.flac: cannot be decoded" in err
    assert "the model was given at most 2.0 s" in err


def test_beams_with_and_without_a_language_model_hear_no_worse(run, folder):
    path, greedy = run
    config = learned(folder)
    config.decoding.beam_size = 8
    assert evaluate(config, str(path))["eval/test/cer"] <= greedy["eval/test/cer"] + 0.02
    config.decoding.language_model, config.decoding.language_weight = "ngram", 0.2
    assert evaluate(config, str(path))["eval/test/cer"] < 0.35
    config.data.hop_seconds = 0.02
    with pytest.raises(BadInput, match=r"config\.data\.hop_seconds is 0.01 there and 0.02 here"):
        evaluate(config, str(path))
    config.data.hop_seconds, config.model.norm = 0.01, "pre"
    with pytest.raises(BadInput, match=r"another configuration \(config.model.norm is 'post' there and 'pre' here,"):
        evaluate(config, str(path))


def test_the_best_way_to_decode_is_found_and_printed(run, folder, tmp_path):
    path, _ = run
    shutil.copytree(path, tmp_path / "run")
    stored = json.loads((path / "config.json").read_text())
    stored["decoding"] |= {"beam_size": 4, "language_model": "ngram"}
    (tmp_path / "run" / "config.json").write_text(json.dumps(stored))
    choices = ["--language_weight", "0,5", "--insertion_bonus", "0,1"]
    status, out, err = script("choose_decoding.py", "--workdir", tmp_path / "run", "--split", "test", *choices)
    assert status == 0, err
    lines = out.splitlines()
    table = [[float(cell.split()[0]) for cell in line.split("|")[2:-1]] for line in lines if line[:3] in ("| 0", "| 5")]
    config = learned(folder)
    config.decoding.beam_size, config.decoding.language_model = 4, "ngram"
    config.decoding.language_weight, config.decoding.insertion_bonus = 0.0, 1.0
    assert table[0][1] == pytest.approx(100 * evaluate(config, str(path))["eval/test/wer"], abs=0.05)
    # A language model of five times the weight hears little.
    assert min(table[0]) < min(table[1])
    assert lines[-2] == "config.decoding.language_weight = 0"
    assert lines[-1] == f"config.decoding.insertion_bonus = {table[0].index(min(table[0])):g}"
    status, _, err = script("choose_decoding.py", "--workdir", path)
    assert (status, err.count("\n")) == (2, 1)
    assert "config.decoding.beam_size is 0" in err


def test_a_task_without_its_data_has_the_shapes_of_the_real_one_but_for_the_labels(config):
    abstract, real = build_program(validate(config)), build(validate(config))
    batch = next(real.data.train_stream(start=0, process_index=0, process_count=1))
    found = abstract.task.abstract_batches()
    assert {name: x.dtype for name, x in batch.items()} == {name: x.dtype for name, x in found[0].items()}
    assert batch["features"].shape in [each["features"].shape for each in found]
    assert abstract.task.batch_rows() == real.task.batch_rows()
    assert jax.tree.map(lambda x: x.shape, abstract.abstract_state) == jax.tree.map(
        lambda x: x.shape, real.abstract_state
    )


def test_a_bucket_that_only_an_evaluation_fills_must_divide_over_the_devices_too(config, monkeypatch):
    monkeypatch.setattr(jax, "devices", jax.local_devices)
    # 8 devices: 16 rows of a second, 4 of three.
    config.data.buckets, config.data.rows_multiple = (2.0, 3.0), 4
    with pytest.raises(BadInput, match="a batch of 4 rows among it, does not divide over 8"):
        build(validate(config))


def test_a_model_of_subwords_must_be_this_packages(config, tmp_path):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["abc cab", "bad cab", "dab"] * 20),
        model_prefix=str(tmp_path / "foreign"),
        vocab_size=12,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    config.data.labels.kind, config.data.labels.file = "subword", str(tmp_path / "foreign.model")
    with pytest.raises(BadInput, match="expected a SentencePiece model with the special tokens"):
        build(validate(config))


def test_subwords_are_learned_and_written(folder, tmp_path):
    config = small(folder)
    config.data.labels.kind, config.data.labels.size, config.data.labels.model = "subword", 300, "bpe"
    result = train_and_evaluate(config, str(tmp_path / "run"))
    assert np.isfinite(result["eval/test/loss"])
    assert len((tmp_path / "run/outputs/test/transcripts.tsv").read_text().splitlines()) == 12


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model.conv_stride", 9, "config.model.conv_stride = 9, conv_kernel = 7"),
        ("decoding.beam_size", -1, "config.decoding.beam_size = -1: expected a whole number of at least 0"),
        ("decoding.language_model", "gpt", "config.decoding.language_model = 'gpt': expected one of none, ngram"),
        ("decoding.language_model", "ngram", "config.decoding.language_model: needs config.decoding.beam_size"),
        ("data.labels.kind", "phone", "config.data.labels.kind = 'phone': expected one of character, subword"),
        ("data.labels.characters", "aa", "config.data.labels.characters = 'aa': expected each character once"),
        ("data.buckets", (2.0, 1.0), "config.data.buckets = (2.0, 1.0): expected a tuple of numbers above 0"),
        ("data.buckets", (0.5,), "the last bucket must hold it"),
        ("batch_size", 8, "config.batch_size = 8: seconds, too few for 8 rows"),
        ("data.buckets", (), "config.data.buckets = (): expected a tuple of numbers above 0"),
        ("data.num_filters", 0, "config.data.num_filters = 0"),
        ("data.sample_rate", 8000, "config.data.sample_rate = 8000: the audio of speech_folder has 16000 Hz"),
        ("data.eval_splits", ("test[:5]", "test[5:]"), "config.data.eval_splits: has two parts of the split 'test'"),
        ("data.spec_augment.freq_width", 21, "config.data.spec_augment.freq_width = 21: expected at most"),
        ("data.spec_augment.time_fraction", 2.0, "config.data.spec_augment.time_fraction = 2.0"),
        ("data.audio_feature", "sound", "config.data.audio_feature = 'sound': the data set has no such feature"),
    ],
)
def test_what_is_refused(config, field, value, message):
    config.data.spec_augment.freq_masks = 1 if field == "data.spec_augment.freq_width" else 0
    config.update_from_flattened_dict({field: value})
    with pytest.raises(BadInput) as error:
        build(validate(config)).evaluator()
    assert message in str(error.value)
    assert "\n" not in str(error.value)
