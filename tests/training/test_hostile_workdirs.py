"""Evaluating and resuming in folders whose files are not what a run left: one clear line, and nothing lost."""

import json
import os
import shutil

import pytest

from sigmarep.errors import BadInput, SigmarepError
from sigmarep.training import evaluate, evaluation, loop, train_and_evaluate
from sigmarep.training.checkpoint_files import MANIFEST
from sigmarep.training.checkpoints import Checkpointer
from sigmarep.training.config import default_config, validate
from sigmarep.training.experiment import Experiment, build
from sigmarep.training.metrics import JsonLines, parse, read_metrics
from sigmarep.training.workdir_lock import FILE as LOCK
from sigmarep.training.workdir_lock import WorkdirLock, holder
from tests.diagnostics.test_hostile import DEEP, HOSTILE
from tests.training.test_workdirs import ABSTRACT, read, saved, state

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
        patch.setattr(loop, "build", lambda given, **_: experiment)
        patch.setattr(Experiment, "evaluator", lambda self: evaluator)
        patch.setattr(evaluation, "Evaluator", lambda mesh, evaluations, *steps: evaluator)
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


METRICS = {
    name: (content, damaged) for name, (content, _, damaged) in HOSTILE.items() if list(content) == ["metrics.jsonl"]
}
CONFIGURATIONS = {name: content for name, (content, _, _) in HOSTILE.items() if "config.json" in content}
OTHERS = {
    name: content for name, (content, _, _) in HOSTILE.items() if name not in METRICS and name not in CONFIGURATIONS
}


@pytest.mark.parametrize("name", METRICS)
def test_hostile_metrics_cost_their_own_lines(name, tmp_path):
    content, damaged = METRICS[name][0]["metrics.jsonl"], METRICS[name][1]
    (tmp_path / "metrics.jsonl").write_bytes(content)
    # As a start of the trainer does, and its end.
    JsonLines(str(tmp_path), resume_step=STEPS, say=lambda line: None).close()
    loop.summary(str(tmp_path))
    valid = [row for row, whole in map(parse, content.split(b"\n")[:-1]) if whole and row["step"] <= STEPS]
    assert len(read_metrics(str(tmp_path / "metrics.jsonl"))) == len(valid)
    if damaged:
        assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == content


@pytest.mark.parametrize("name", ["nul_block", *(name for name in OTHERS if name != "stopped_types")])
def test_a_run_with_hostile_files_goes_on(name, config, run, whole):
    for file, text in HOSTILE[name][0].items():
        (run / file).write_bytes(text)
    assert resume(config, run, whole) == (0, "")


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_run_with_a_hostile_configuration_is_refused_in_a_line(name, config, run, whole):
    (run / "config.json").write_bytes(CONFIGURATIONS[name]["config.json"])
    status, line = resume(config, run, whole)
    assert status == 2
    assert "config.json cannot be read" in line or "holds a run of another configuration" in line


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_run_with_a_hostile_configuration_is_not_evaluated(name, run):
    (run / "config.json").write_bytes(CONFIGURATIONS[name]["config.json"])
    before = tree(run)
    status, line = outcome(lambda: evaluate(None, str(run)))
    assert status == 2, line
    assert tree(run) == before


@pytest.mark.parametrize("content", CONTENTS)
def test_a_configuration_may_hold_or_be_anything(content, config, run, whole):
    replaced(CONTENTS[content])(run / "config.json")
    status, line = resume(config, run, whole)
    assert status == 2
    words = ("config.json cannot be read", "holds a run of another configuration", "no config.json")
    assert any(each in line for each in words)


@pytest.mark.parametrize("content", CONTENTS)
def test_the_lock_may_hold_or_be_anything(content, tmp_path):
    replaced(CONTENTS[content])(tmp_path / LOCK)

    def hold():
        with WorkdirLock(str(tmp_path), say=lambda line: None, heartbeat=0.1, patience=0.2) as lock:
            lock.check()

    assert holder(str(tmp_path)) is None
    status, line = outcome(hold)
    assert (status, line) == (0, "") or (status == 2 and "cannot be written" in line)


@pytest.mark.parametrize("content", ["pipe", "folder", "dangling", "device"])
def test_metrics_that_are_no_file_are_refused_before_anything_is_written(content, config, run, whole):
    replaced(CONTENTS[content])(run / "metrics.jsonl")
    status, line = resume(config, run, whole)
    assert (status, "metrics.jsonl is no file" in line) == (2, True)


@pytest.mark.parametrize("content", ["deep", "half", "digits", "pipe", "folder", "dangling"])
def test_notes_of_a_run_may_be_anything(content, config, killed, whole):
    for name in ("diagnosis.json", "stopped.json", "environment.json"):
        if name != "environment.json" or content != "folder":
            replaced(CONTENTS[content])(killed / name)
    assert resume(config, killed, whole) == (0, "")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        *(("labels.json", content) for content in CONTENTS),
        *(("data.json", each) for each in ("deep", "pipe", "not_utf8")),
    ],
)
def test_a_file_of_the_task_may_hold_or_be_anything(file, content, config, run, whole):
    replaced(CONTENTS[content])(run / file)
    before = tree(run)
    status, line = outcome(lambda: evaluate(None, str(run)))
    assert status == (2 if file == "labels.json" and content != "dangling" else 0), line
    assert tree(run) == before
    status, line = resume(config, run, whole)
    assert status == (0 if content == "dangling" else 2), line


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


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Three checkpoints of a small state."""
    folder = tmp_path_factory.mktemp("small") / "checkpoints"
    saved(folder, (1, 2, 3), keep=3)
    return folder


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_what_only_looks_like_a_checkpoint_is_passed_over_and_kept(name, small, tmp_path):
    folder = shutil.copytree(small, tmp_path / "checkpoints")
    CHECKPOINTS[name](folder)
    before = tree(folder)
    assert read(folder) == (3, 3.0)
    assert tree(folder) == before
    checkpoints = Checkpointer(str(folder), keep=3, say=lambda line: None)
    assert checkpoints.restore({**ABSTRACT, "model_state": {}}).step == 3
    checkpoints.save(10, state(10), extra={})
    checkpoints.close()
    assert checkpoints.all_steps() == [2, 3, 10]
    assert read(folder) == (10, 10.0)
    lost = {path for path in before if path.startswith("9/")} - {path.removeprefix("damaged/") for path in tree(folder)}
    assert not lost


@pytest.mark.parametrize("name", ["a_pipe_within", "manifest_pipe", "a_dangling_link"])
def test_a_run_beside_such_a_checkpoint_is_evaluated_and_goes_on(name, config, run, whole):
    CHECKPOINTS[name](run / "checkpoints")
    before = tree(run)
    assert evaluate(None, str(run))["step"] == STEPS
    assert tree(run) == before
    assert resume(config, run, whole) == (0, "")


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
    about = run / "checkpoints" / "3" / "about" / "metadata"
    os.remove(run / "checkpoints" / "3" / MANIFEST)
    for step in "12":
        shutil.rmtree(run / "checkpoints" / step)
    about.write_text(json.dumps({**json.loads(about.read_text()), "extra": extra}))
    status, line = resume(config, run, whole)
    assert (status, "cannot be read" in line or "is damaged" in line) == (2, True), line
