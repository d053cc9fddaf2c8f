"""Evaluating and resuming in folders whose files are not what a run left: one clear line, and nothing lost."""

import json
import os
import shutil

import pytest

from sigmarep.errors import BadInput, SigmarepError
from sigmarep.training import evaluate, evaluation, loop, train_and_evaluate
from sigmarep.training.checkpoints import MANIFEST
from sigmarep.training.config import default_config, validate
from sigmarep.training.experiment import Experiment, build
from sigmarep.training.metrics import parse, read_metrics
from sigmarep.training.workdir_lock import FILE as LOCK
from tests.diagnostics.test_hostile import DEEP, HOSTILE

STEPS = 3


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    config = default_config("image_classification")
    config.total_steps, config.log_every_steps, config.checkpoint_every_steps, config.keep_checkpoints = STEPS, 1, 1, 3
    config.batch_size, config.writers.progress = 16, "off"
    config.model.depth, config.model.width, config.model.num_heads, config.model.mlp_dim = 1, 8, 2, 8
    config.data.in_memory, config.data.num_threads = True, 1
    config.data.data_dir = str(tmp_path_factory.mktemp("tfds"))
    return config


@pytest.fixture(scope="module")
def shared(config):
    """One experiment and one evaluator for every start, so that each program is compiled once."""
    experiment = build(validate(config))
    evaluator = experiment.evaluator()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "build", lambda given: experiment)
        patch.setattr(Experiment, "evaluator", lambda self: evaluator)
        patch.setattr(evaluation, "Evaluator", lambda mesh, evaluations: evaluator)
        yield


@pytest.fixture(scope="module")
def whole(config, shared, tmp_path_factory):
    """The folder of an undisturbed run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train_and_evaluate(config, str(folder))
    return folder


@pytest.fixture
def run(whole, tmp_path):
    """A copy of it."""
    return shutil.copytree(whole, tmp_path / "run")


@pytest.fixture
def killed(run):
    """A copy of it as a kill after step 2 leaves it."""
    shutil.rmtree(run / "checkpoints" / "3")
    return run


def tree(folder):
    """Every entry below the folder but the lock: contents of files, kinds of others."""
    entries = {}
    for path in sorted(folder.rglob("*")):
        if path.name != LOCK:
            entries[str(path.relative_to(folder))] = path.read_bytes() if path.is_file() else os.lstat(path).st_mode
    return entries


def outcome(command):
    """Exit status of a command and the line that it prints."""
    try:
        command()
    except SigmarepError as error:
        return error.exit_status, str(error)
    return 0, ""


def losses(folder, after=0):
    rows = read_metrics(str(folder / "metrics.jsonl"))
    return [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row and row["step"] > after]


def resume(config, folder, whole):
    """Resumes and checks that a refusal changes nothing, and that a run that goes on makes the steps it should."""
    before = tree(folder)
    step = max(int(name) for name in os.listdir(folder / "checkpoints") if name in ("1", "2", "3"))
    status, line = outcome(lambda: train_and_evaluate(config, str(folder)))
    assert "\n" not in line
    assert len(line) < 900
    if status:
        # This file notes every start.
        assert {**tree(folder), "environment.json": 0} == {**before, "environment.json": 0}
    else:
        assert losses(folder, after=step) == losses(whole, after=step)
        assert (folder / "checkpoints" / str(STEPS)).is_dir()
    return status, line


def write(content):
    def make(path):
        path.write_bytes(content)

    return make


def replaced(make):
    """Puts something else in the place of a file or folder."""

    def replace(path):
        if path.is_dir():
            shutil.rmtree(path)
        elif os.path.lexists(path):
            path.unlink()
        make(path)

    return replace


CONTENTS = {
    "empty": write(b""),
    "null": write(b"null"),
    "number": write(b"7"),
    "list": write(b"[1]"),
    "object": write(b"{}"),
    "half": write(b'{"a": '),
    "not_utf8": write(b'{"a": "\xff"}'),
    "nul": write(b"\0" * 100),
    "deep": write(DEEP),
    "digits": write(b'{"total_steps": 1' + b"0" * 5000 + b"}"),
    "pipe": os.mkfifo,
    "folder": lambda path: (path / "below").mkdir(parents=True),
    "dangling": lambda path: path.symlink_to("/nowhere/at/all"),
    "device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_run_with_hostile_files_goes_on_or_is_refused_in_a_line(name, config, run, whole):
    content, _, damaged = HOSTILE[name]
    for file, text in content.items():
        (run / file).write_bytes(text)
    status, line = resume(config, run, whole) if name != "stopped_types" else (0, "")
    assert (status, "config.json" in line or "holds a run of another" in line) == (
        (2, True) if "config.json" in content else (0, False)
    )
    if "metrics.jsonl" in content and not status:
        finished = [row for row, _ in map(parse, content["metrics.jsonl"].split(b"\n")[:-1]) if row]
        rows = read_metrics(str(run / "metrics.jsonl"))
        assert {row["step"] for row in rows} <= {row["step"] for row in finished if row["step"] <= STEPS}
        if damaged:
            assert (run / "metrics.jsonl.damaged").read_bytes() == content["metrics.jsonl"]


@pytest.mark.parametrize("name", [name for name, (content, _, _) in HOSTILE.items() if "config.json" in content])
def test_a_run_with_a_hostile_configuration_is_not_evaluated(name, run):
    (run / "config.json").write_bytes(HOSTILE[name][0]["config.json"])
    before = tree(run)
    status, line = outcome(lambda: evaluate(None, str(run)))
    assert status == 2, line
    assert tree(run) == before


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize(
    "names", [("config.json",), ("environment.json", "stopped.json"), ("metrics.jsonl",), (LOCK,)], ids=str
)
def test_a_file_may_hold_or_be_anything(names, content, config, run, whole):
    for name in names:
        replaced(CONTENTS[content])(run / name)
    status, line = resume(config, run, whole)
    assert status in (0, 2), line
    if status:
        assert names[0] in line or "cannot be written" in line


@pytest.mark.parametrize("content", ["deep", "pipe", "folder", "dangling"])
def test_a_diagnosis_may_be_anything(content, config, killed, whole):
    replaced(CONTENTS[content])(killed / "diagnosis.json")
    assert resume(config, killed, whole) == (0, "")


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("file", ["labels.json", "data.json"])
def test_a_file_of_the_task_may_hold_or_be_anything(file, content, config, run, whole):
    replaced(CONTENTS[content])(run / file)
    before = tree(run)
    status, line = outcome(lambda: evaluate(None, str(run)))
    assert status in (0, 2), line
    assert tree(run) == before
    status, line = resume(config, run, whole)
    assert status in (0, 2), line


def checkpoint_like(folder, name, *, without=None, manifest=None):
    """A copy of the newest checkpoint under another name, one of its files changed."""
    shutil.copytree(folder / "3", folder / name)
    if without:
        os.remove(folder / name / without)
    if manifest:
        replaced(manifest)(folder / name / MANIFEST)


CHECKPOINTS = {
    "a_file": lambda folder: (folder / "9").write_bytes(b"x"),
    "a_pipe": lambda folder: os.mkfifo(folder / "9"),
    "a_dangling_link": lambda folder: (folder / "9").symlink_to("/nowhere"),
    "a_loop": lambda folder: (folder / "9").symlink_to(folder / "9"),
    "an_empty_folder": lambda folder: (folder / "9").mkdir(),
    "leading_zeros": lambda folder: checkpoint_like(folder, "009"),
    "a_huge_step": lambda folder: (folder / ("9" * 200)).mkdir(),
    "no_manifest_and_no_state": lambda folder: checkpoint_like(folder, "9", without="_CHECKPOINT_METADATA"),
    "a_pipe_within": lambda folder: (checkpoint_like(folder, "9"), os.mkfifo(folder / "9" / "pipe")),
    "a_device_within": lambda folder: (
        checkpoint_like(folder, "9"),
        (folder / "9" / "state" / "zero").symlink_to("/dev/zero"),
    ),
    "unfinished": lambda folder: shutil.copytree(folder / "3", folder / "9.orbax-checkpoint-tmp"),
    "words": lambda folder: (
        (folder / "notes.txt").write_text("mine"),
        (folder / "-3").mkdir(),
        (folder / "x").mkdir(),
    ),
    **{
        f"manifest_{name}": lambda folder, make=make: checkpoint_like(folder, "9", manifest=make)
        for name, make in CONTENTS.items()
    },
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_what_only_looks_like_a_checkpoint_is_passed_over_and_kept(name, config, run, whole):
    CHECKPOINTS[name](run / "checkpoints")
    before = tree(run)
    result = evaluate(None, str(run))
    assert result["step"] == STEPS
    assert tree(run) == before
    assert resume(config, run, whole) == (0, "")
    after = tree(run)
    assert all(after[entry] == content for entry, content in before.items() if entry.startswith("checkpoints/3/"))


@pytest.mark.parametrize("content", CONTENTS)
def test_the_folder_of_checkpoints_may_be_anything(content, config, run, whole):
    replaced(CONTENTS[content])(run / "checkpoints")
    before = tree(run)
    assert outcome(lambda: evaluate(None, str(run)))[0] == 2
    status, line = outcome(lambda: train_and_evaluate(config, str(run)))
    if content == "folder":
        assert status == 0
    else:
        assert (status, "checkpoints" in line) == (2, True)
        assert tree(run) == before


def test_parts_of_a_run_without_its_configuration_are_left_alone(config, run):
    os.remove(run / "config.json")
    before = tree(run)
    with pytest.raises(BadInput, match=r"has checkpoints and metrics\.jsonl but no config\.json to say of which run"):
        train_and_evaluate(config, str(run))
    assert tree(run) == before


@pytest.mark.parametrize("extra", [[], {"clock": 7}, {"clock": {"training": "x"}}, {"good": [1]}, {"callbacks": 3}])
def test_what_is_kept_beside_the_state_may_be_anything(extra, config, run, whole):
    (about,) = (run / "checkpoints" / "3" / "about").glob("*")
    os.remove(run / "checkpoints" / "3" / MANIFEST)
    for step in "12":
        shutil.rmtree(run / "checkpoints" / step)
    about.write_text(json.dumps({**json.loads(about.read_text()), "extra": extra}))
    status, line = resume(config, run, whole)
    assert status in (0, 2), line
