"""A trained model is opened from a copy of its run's folder, with the training data gone, for every task."""

import dataclasses
import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import soundfile
from PIL import Image

from sigmarep import tasks
from sigmarep.data import sources
from sigmarep.errors import BadInput
from sigmarep.inference import open_run
from sigmarep.training import evaluate, train_and_evaluate
from sigmarep.training.config import default_config, validate

ROOT = Path(__file__).parents[1]
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
RATE = 16_000
DIGITS = 24


@pytest.fixture(scope="module", autouse=True)
def _one_device():
    """Programs of one device compile sooner; runs of several have tests of their own."""
    one = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: one)
        yield


@dataclasses.dataclass(frozen=True)
class Trained:
    """A run whose data were deleted after training.

    Attributes:
      folder: a copy of its workdir, the only one. own: files of the test split, alone. data: those of the training, gone.
      moved: a copy of these. result: of the last evaluation, with the data present. config: of the run.
    """

    folder: str
    own: Path
    data: Path
    moved: Path
    result: dict
    config: Any


def tiny(task, data_dir, **model):
    config = default_config(task)
    config.data.data_dir = str(data_dir)
    config.model.update({"depth": 1, "width": 16, "num_heads": 2, "mlp_dim": 16, "reparam": "sigma", **model})
    config.optimizer.name, config.optimizer.learning_rate = "adam", 0.01
    config.total_steps, config.log_every_steps, config.checkpoint_every_steps = 2, 1, 1
    config.batch_size, config.model.scan = 8, False
    config.writers.progress = "off"
    return config


def trained(config, folder: Path, own: Path, data: Path) -> Trained:
    """Trains, then leaves nothing but a copy of the workdir and the files of `own`."""
    result = train_and_evaluate(config, str(folder / "there"))
    shutil.move(folder / "there", folder / "here")
    shutil.copytree(data, folder / "moved", ignore=shutil.ignore_patterns("prepared"))
    shutil.rmtree(data)
    return Trained(str(folder / "here"), own, data, folder / "moved", result, config)


def counted(rng):
    return " ".join(WORDS[i] for i in rng.integers(0, 10, rng.integers(1, 9)))


def text_run(task, folder, line: Callable, ending, between, **fields) -> Trained:
    rng = np.random.default_rng(0)
    data, own = folder / "data", folder / "own"
    for path in (data, own):
        path.mkdir()
    splits = {
        name: between.join(line(rng) for _ in range(count)) + "\n" for name, count in (("train", 30), ("test", 9))
    }
    for name, text in splits.items():
        (data / f"{name}.{ending}").write_text(text)
    (own / f"test.{ending}").write_text(splits["test"])
    config = tiny(task, data / "prepared", norm="post")
    config.data.name, config.data.folder = "text_folder", str(data)
    config.data.vocabulary.kind, config.data.vocabulary.size = "word", 100
    config.update_from_flattened_dict(fields)
    return trained(config, folder, own, data)


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    return text_run(
        "language_modeling", tmp_path_factory.mktemp("lm"), counted, "txt", "\n\n", **{"data.sequence_length": 16}
    )


@pytest.fixture(scope="module")
def translator(tmp_path_factory):
    fields = {
        "batch_size": 128,
        "data.source_feature": "source",
        "data.target_feature": "target",
        "data.max_source_length": 16,
        "data.max_target_length": 16,
        "data.buckets": (8, 16),
        "decoding.beam_size": 2,
    }

    def pair(rng):
        source = counted(rng)
        return f"{source}\t{' '.join(reversed(source.split()))}"

    return text_run("translation", tmp_path_factory.mktemp("mt"), pair, "tsv", "\n", **fields)


@pytest.fixture(scope="module")
def listener(tmp_path_factory):
    """Speech recognition whose beam search asks an n-gram of the training transcripts."""
    folder = tmp_path_factory.mktemp("asr")
    rng = np.random.default_rng(0)
    data, own = folder / "data", folder / "own"
    for path in (data, own):
        path.mkdir()
    for split, count in (("train", 16), ("test", 5)):
        lines = []
        for i in range(count):
            text = "".join(rng.choice(list("abc"), 3))
            tones = [np.sin(np.arange(1600) * (0.1 + 0.2 * "abc".index(letter))) for letter in text]
            samples = np.concatenate(tones) * 0.3 + rng.normal(0, 0.01, 4800)
            soundfile.write(data / f"{split}{i}.wav", samples, RATE)
            lines.append(f"{split}{i}.wav\t{text}")
            if split == "test":
                shutil.copy(data / f"{split}{i}.wav", own)
        (data / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    shutil.copy(data / "test.tsv", own)
    config = tiny("speech_recognition", data / "prepared")
    config.data.name, config.data.folder = "speech_folder", str(data)
    config.data.buckets, config.data.num_filters = (1.0,), 20
    config.decoding.beam_size, config.decoding.language_model, config.decoding.ngram_order = 4, "ngram", 3
    return trained(config, folder, own, data)


def write_digits(folder: Path, data_dir: Path) -> None:
    """The first test digits as files, with their labels in their names."""
    source = sources.open_source("digits", "test", data_dir=str(data_dir))
    folder.mkdir()
    for i in range(DIGITS):
        Image.fromarray(source[i]["image"][..., 0]).save(folder / f"{i:03}_{source[i]['label']}.png")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit")
    config = tiny("image_classification", folder / "data")
    config.data.eval_splits = (f"test[:{DIGITS}]",)
    write_digits(folder / "own", folder / "data")
    return trained(config, folder, folder / "own", folder / "data")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """MoCo v3 with averaged weights."""
    folder = tmp_path_factory.mktemp("ssl")
    config = tiny("contrastive", folder / "data", norm="pre")
    config.method, config.ema_decay = "moco_v3", 0.5
    for head in (config.projector, config.predictor):
        head.hidden = head.width = 8
    config.probe.epochs, config.probe.baselines, config.knn.neighbours = 0, False, 3
    config.data.train_split, config.data.eval_splits = "train[:16]", (f"test[:{DIGITS}]",)
    write_digits(folder / "own", folder / "data")
    return trained(config, folder, folder / "own", folder / "data")


def metrics(result):
    return {name: value for name, value in result.items() if name.startswith("eval/")}


def test_texts_are_continued(language_model):
    run = open_run(language_model.folder)
    assert run.step == 2
    prompts = ["one two", "seven"]
    texts = run.generate(prompts, max_length=9, temperature=0)
    assert all(text.startswith(prompt) for text, prompt in zip(texts, prompts, strict=True))
    # The likeliest tokens, one by one, by the model itself.
    ids = [1, *run.task.vocabulary.encode("seven")]
    while len(ids) < 9 and ids[-1] != 2:
        log_p = np.array(run.task.model.apply(run.variables, np.array([ids])))[0, -1]
        ids.append(int(log_p[1:].argmax()) + 1)
    assert texts[1] == run.task.vocabulary.decode(ids)
    with pytest.raises(BadInput, match=r"prompt 1: has 4 tokens; expected fewer than max_length = 4"):
        run.generate(prompts, max_length=4)
    with pytest.raises(BadInput, match="is a run of language_modeling, which has no translate"):
        run.translate(prompts)


def test_sentences_are_translated_as_in_the_runs_own_evaluation(translator):
    rows = (Path(translator.folder) / "outputs/test/translations.tsv").read_text().splitlines()[1:]
    sources_, _, translations = zip(*(row.split("\t") for row in rows), strict=True)
    run = open_run(translator.folder)
    assert run.translate(["", *sources_], rows=8) == ["", *translations]
    with pytest.raises(BadInput, match=r"sentence 2: has 18 tokens with its end; the model takes at most 16"):
        run.translate(["one", " ".join(["one"] * 16)])


def test_recordings_are_transcribed_as_in_the_runs_own_evaluation(listener):
    rows = (Path(listener.folder) / "outputs/test/transcripts.tsv").read_text().splitlines()[1:]
    names, heard = zip(*((row.split("\t")[0], row.split("\t")[4]) for row in rows), strict=True)
    run = open_run(listener.folder)
    assert run.transcribe([listener.own / name for name in names]) == list(heard)
    samples, _ = soundfile.read(listener.own / names[0], dtype="float32")
    assert run.transcribe([samples]) == [heard[0]]
    with pytest.raises(BadInput, match=r"nothing.wav: cannot be read"):
        run.transcribe([listener.own / "nothing.wav"])


def test_pictures_are_classified_as_in_the_runs_own_evaluation(classifier):
    run = open_run(classifier.folder)
    paths = sorted(classifier.own.glob("*.png"))
    results = run.classify(paths)
    right = [result.label == path.stem[-1] for result, path in zip(results, paths, strict=True)]
    assert np.mean(right) == pytest.approx(classifier.result["eval/test/accuracy"])
    nats = [-np.log(result.probabilities[int(path.stem[-1])]) for result, path in zip(results, paths, strict=True)]
    assert np.mean(nats) == pytest.approx(classifier.result["eval/test/loss"], rel=1e-5)
    assert all(result.probability == result.probabilities.max() for result in results)
    head = run.variables["params"]["head"]
    logits = run.features(paths) @ np.asarray(run.plain().variables["params"]["head"]["kernel"]) + np.asarray(
        head["bias"]
    )
    assert [str(i) for i in logits.argmax(1)] == [result.label for result in results]
    assert run.classify([]) == []


def test_features_are_those_of_the_evaluation(encoder):
    run = open_run(encoder.folder)
    paths = sorted(encoder.own.glob("*.png"))
    features = run.features(paths)
    images = np.stack([np.asarray(Image.open(path), np.float32)[..., None] for path in paths])
    batch = {"image": (images / 255 - 0.5) / 0.5, "label": np.zeros(DIGITS), "mask": np.ones(DIGITS)}
    np.testing.assert_allclose(features, run.task.evaluate(run.variables, batch)["features"], rtol=1e-5, atol=1e-6)
    assert features.shape == (DIGITS, 16)
    with pytest.raises(BadInput, match="is a run of contrastive, which has no classify"):
        run.classify(paths)


OWN = {"language_model": "text_folder", "translator": "text_folder", "listener": "speech_folder"}


@pytest.mark.parametrize("name", OWN)
def test_own_files_are_evaluated_without_the_training_data(request, name):
    run = request.getfixturevalue(name)
    data = {"name": OWN[name], "folder": str(run.own), "data_dir": str(run.own / "prepared"), "eval_splits": ("test",)}
    result = evaluate(None, run.folder, data=data)
    assert result.pop("step") == 2
    assert result == metrics(run.result)
    assert not run.data.exists()
    with pytest.raises(BadInput, match=r"config\.data\.folder = .*: there is no such folder"):
        evaluate(None, run.folder)
    with pytest.raises(
        BadInput, match=r"config\.data\.floder: there is no such field; did you mean config\.data\.folder"
    ):
        evaluate(None, run.folder, data={"floder": str(run.own)})


def test_an_image_run_is_evaluated_on_data_prepared_anew(classifier, tmp_path):
    result = evaluate(None, classifier.folder, data={"data_dir": str(tmp_path)})
    assert metrics(result) == metrics(classifier.result)


INPUTS = {
    "language_model": lambda: [np.arange(1, 9).reshape(1, 8)],
    "translator": lambda: [np.arange(4, 12).reshape(1, 8)] * 3,
    "listener": lambda: [np.random.default_rng(0).normal(size=(1, 48, 20)).astype(np.float32), np.array([48])],
    "classifier": lambda: [np.random.default_rng(0).normal(size=(1, 8, 8, 1)).astype(np.float32)],
    "encoder": lambda: [np.random.default_rng(0).normal(size=(2, 8, 8, 1)).astype(np.float32)],
}


@pytest.mark.parametrize("name", INPUTS)
def test_the_plain_model_has_the_same_outputs(request, name):
    run = open_run(request.getfixturevalue(name).folder)
    plain, inputs = run.plain(), INPUTS[name]()
    method = "losses" if name == "translator" else "__call__"
    variables = {key: value for key, value in run.variables.items() if key != "momentum"}
    expected, outputs = (
        jax.jit(functools.partial(module.apply, method=method))(each, *inputs)
        for module, each in ((run.task.model, variables), plain)
    )
    for a, b in zip(jax.tree.leaves(outputs), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)
    assert "spectral" not in plain.variables
    assert "gamma" not in str(jax.tree.structure(plain.variables["params"]))


def content(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in Path(folder).rglob("*")}


def test_reading_a_run_changes_nothing_in_its_folder(language_model, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(language_model.folder, folder)
    checkpoints = folder / "checkpoints"
    for path in (checkpoints / "2" / "state").rglob("*"):
        if path.is_file():
            os.truncate(path, path.stat().st_size // 2)
    # What a run that is still going on, or was killed while it saved, has beside its checkpoints.
    (checkpoints / "3.orbax-checkpoint-tmp").mkdir()
    before = content(folder)
    assert open_run(str(folder)).step == 1
    assert content(folder) == before
    assert "the checkpoint of step 2 is damaged" in capsys.readouterr().err


def test_the_last_checkpoints_are_averaged(classifier, tmp_path):
    first = tmp_path / "first"
    shutil.copytree(classifier.folder, first)
    shutil.rmtree(first / "checkpoints" / "2")
    both, one, two = open_run(classifier.folder, average=2), open_run(str(first)), open_run(classifier.folder)
    assert both.step == 2
    for mean, a, b in zip(*(jax.tree.leaves(run.variables["params"]) for run in (both, one, two)), strict=True):
        np.testing.assert_allclose(mean, (np.asarray(a) + np.asarray(b)) / 2, rtol=1e-6, atol=1e-8)
    jax.tree.map(np.testing.assert_array_equal, both.variables["spectral"], two.variables["spectral"])
    # σ of the mean is its own: a power step on it, from the newest vector.
    kernel = np.asarray(both.variables["params"]["patch_embedding"]["kernel"], np.float64).reshape(-1, 16)
    u = np.asarray(two.variables["spectral"]["patch_embedding"]["u"], np.float64)
    sigma = np.linalg.norm(kernel.T @ (kernel @ u)) / np.linalg.norm(kernel @ u)
    gamma = float(both.variables["params"]["patch_embedding"]["gamma"])
    plain = np.asarray(both.plain().variables["params"]["patch_embedding"]["kernel"]).reshape(-1, 16)
    np.testing.assert_allclose(plain, gamma / sigma * kernel, rtol=1e-4, atol=1e-6)
    data = {"data_dir": str(tmp_path / "data")}
    assert np.isfinite(evaluate(None, classifier.folder, data=data, average=2)["eval/test/loss"])
    with pytest.raises(
        BadInput, match=r"holds 2 of the 3 checkpoints to average; average fewer, or train with a larger"
    ):
        open_run(classifier.folder, average=3)


def test_a_run_of_eight_devices_is_evaluated_on_six(language_model, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(language_model.folder, folder)
    text = (folder / "config.json").read_text()
    assert '"data": -1' in text
    (folder / "config.json").write_text(text.replace('"data": -1', '"data": 8'))
    six = jax.local_devices()[:6]
    monkeypatch.setattr(jax, "devices", lambda *_: six)
    data = {"folder": str(language_model.own), "data_dir": str(language_model.own / "prepared")}
    result = metrics(evaluate(None, str(folder), data=data))
    assert result == pytest.approx(metrics(language_model.result), rel=1e-5)


def test_data_may_move_while_a_run_goes_on(language_model, tmp_path):
    config = language_model.config.copy_and_resolve_references()
    config.data.folder, config.data.data_dir = str(language_model.moved), str(tmp_path / "prepared")
    folder = tmp_path / "run"
    shutil.copytree(language_model.folder, folder)
    assert metrics(train_and_evaluate(config, str(folder))) == metrics(language_model.result)
    # Without the fingerprint nobody knows that they are the same.
    shutil.copytree(language_model.folder, tmp_path / "unknown")
    (tmp_path / "unknown" / "data.json").unlink()
    with pytest.raises(BadInput, match=r"another configuration \(config.data.folder is"):
        train_and_evaluate(config, str(tmp_path / "unknown"))


def test_a_file_that_an_earlier_version_did_not_keep_is_made_anew_or_named(listener, classifier, tmp_path):
    shutil.copytree(listener.folder, tmp_path / "asr")
    (tmp_path / "asr" / "transcripts.txt").unlink()
    with pytest.raises(
        BadInput, match=r"has no transcripts.txt, and it cannot be made anew: config.data.folder"
    ) as error:
        open_run(str(tmp_path / "asr"))
    assert "\n" not in str(error.value)
    shutil.copytree(classifier.folder, tmp_path / "vit")
    for name in ("labels.json", "data.json"):
        (tmp_path / "vit" / name).unlink()
    config = (tmp_path / "vit" / "config.json").read_text()
    assert str(classifier.data) in config
    (tmp_path / "vit" / "config.json").write_text(config.replace(str(classifier.data), str(tmp_path / "tfds")))
    assert len(open_run(str(tmp_path / "vit")).classify(sorted(classifier.own.glob("*.png")))) == DIGITS
    assert not (tmp_path / "vit" / "labels.json").exists()


def test_another_vocabulary_than_the_runs_is_not_made_up(translator, tmp_path):
    shutil.copytree(translator.folder, tmp_path / "run")
    (tmp_path / "run" / "vocabulary.model").write_bytes(b"not one")
    with pytest.raises(BadInput, match=r"a file of the run cannot be read") as error:
        open_run(str(tmp_path / "run"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("task", tasks.TASKS)
def test_planned_files_make_a_model_that_works(task):
    config = default_config(task)
    model = tasks.get(task).create_model(validate(config), tasks.planned_files(config))
    assert model.abstract_batches()
    assert set(jax.eval_shape(model.init, jax.random.key(0))) >= {"params"}


def script(name, *arguments):
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / name), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    )
    return done.returncode, done.stdout, done.stderr


def test_a_folder_of_pictures_is_classified_by_command(classifier, tmp_path):
    for path in sorted(classifier.own.glob("*.png"))[:3]:
        shutil.copy(path, tmp_path)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG, but not really")
    status, out, err = script("classify.py", "--workdir", classifier.folder, "--images", tmp_path)
    paths = sorted(path for path in tmp_path.iterdir() if path.name != "broken.png")
    results = open_run(classifier.folder).classify(paths)
    lines = [f"{path}\t{each.label}\t{each.probability:.4f}" for path, each in zip(paths, results, strict=True)]
    assert (status, out.splitlines(), err.count("\n")) == (2, lines, 1)
    assert "broken.png: cannot be read" in err


def test_own_texts_are_evaluated_by_command(language_model):
    own = language_model.own
    flags = ["--name", "text_folder", "--folder", own, "--split", "test", "--data_dir", own / "prepared"]
    status, out, err = script("evaluate.py", "--workdir", language_model.folder, *flags)
    assert status == 0, err
    assert f"test perplexity: {language_model.result['eval/test/perplexity']:.4g}" in out.splitlines()
