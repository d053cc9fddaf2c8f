"""Callbacks of a run: the order of their events, ending early, going on, failing; and metric writers of one's own."""

import contextlib
import json
import logging
import sys
from typing import ClassVar

import jax
import pytest

from sigmarep import doors, sweeps
from sigmarep.diagnostics import findings, runs
from sigmarep.errors import BadInput
from sigmarep.training import Callback, StopTraining, train_and_evaluate
from sigmarep.training.callbacks import CallbackError
from sigmarep.training.config import default_config
from sigmarep.training.experiment import SHARED, shared_programs
from sigmarep.training.metrics import read_metrics
from sigmarep.training.step import TrainState

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("tfds"))


def tiny(data_dir, **fields):
    config = default_config("image_classification")
    config.total_steps, config.log_every_steps, config.eval_every_steps, config.checkpoint_every_steps = 6, 2, 3, 4
    config.batch_size, config.writers.progress = 16, "off"
    config.model.depth, config.model.width, config.model.num_heads, config.model.mlp_dim = 1, 8, 2, 8
    config.model.scan = False
    config.model.patch_size = 4
    config.optimizer.name, config.optimizer.learning_rate = "sgd", 0.1
    config.data.data_dir, config.data.in_memory, config.data.num_threads = data_dir, True, 1
    config.data.eval_splits = ("test[:16]",)
    config.update_from_flattened_dict(fields)
    return config


class Record(Callback):
    """Notes its events, and stops the run, fails or counts as it is told."""

    def __init__(self, at=None, raises=None):
        self.events, self.at, self.raises, self.count = [], at, raises, 0

    def note(self, event, run, *more):
        self.events.append((event, run.step, *more))
        self.count += 1
        if self.at == (event, more[0] if more else run.step):
            raise self.raises

    def on_start(self, run):
        self.note("start", run)

    def on_step(self, run):
        self.note("step", run)

    def on_log(self, run, step, metrics):
        assert metrics["train/loss"] > 0
        self.note("log", run, step)

    def on_evaluation(self, run, step, metrics):
        assert "eval/test/accuracy" in metrics
        self.note("evaluation", run, step)

    def on_checkpoint(self, run, step):
        self.note("checkpoint", run, step)

    def on_end(self, run):
        self.note("end", run)

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


class Writer:
    made: ClassVar[list] = []

    def __init__(self, workdir, *, resume_step, config):
        self.rows, self.calls = [], [(workdir, resume_step, config["task"])]
        Writer.made.append(self)

    def write(self, step, metrics):
        assert all(type(value) is float for value in metrics.values())
        self.rows.append({"step": step, **metrics})

    def flush(self):
        self.calls.append("flush")

    def close(self):
        self.calls.append("close")


class Counts(Callback):
    """Adds a metric of its own."""

    def on_step(self, run):
        assert isinstance(run.state, TrainState)
        assert int(run.state.step) == run.step
        assert (run.total_steps, run.config.batch_size) == (6, 16)
        run.write({"mine/step": run.step})


@pytest.fixture(scope="module")
def whole(data_dir, tmp_path_factory):
    """The callback and the workdir of a run that nothing ends."""
    folder, record = tmp_path_factory.mktemp("whole"), Record()
    config = tiny(data_dir, **{"writers.extra": (f"{__name__}.Writer",)})
    assert "stopped_early" not in train_and_evaluate(config, str(folder), callbacks=[record, Counts()])
    return record, folder


def losses(folder):
    return [row["train/loss"] for row in read_metrics(str(folder / "metrics.jsonl")) if "train/loss" in row]


def test_events_come_in_the_order_that_is_promised(whole):
    assert whole[0].events == [
        ("start", 0),
        ("step", 1),
        ("log", 1, 1),
        ("step", 2),
        ("log", 3, 2),
        ("step", 3),
        ("evaluation", 3, 3),
        ("step", 4),
        ("log", 4, 4),
        ("checkpoint", 4, 4),
        ("step", 5),
        ("step", 6),
        ("log", 6, 6),
        ("evaluation", 6, 6),
        ("checkpoint", 6, 6),
        ("end", 6),
    ]


def test_a_writer_and_a_callback_of_ones_own_are_part_of_the_run(whole):
    rows = read_metrics(str(whole[1] / "metrics.jsonl"))
    assert [row["mine/step"] for row in rows if "mine/step" in row] == list(range(1, 7))
    (writer,) = Writer.made
    assert writer.rows == rows
    assert writer.calls == [(str(whole[1]), 0, "image_classification"), "flush", "flush", "close"]


@pytest.mark.parametrize(
    ("at", "evaluate", "events"),
    [
        (("log", 2), False, [("log", 3, 2), ("step", 3), ("evaluation", 3, 3), ("checkpoint", 3, 3), ("end", 3)]),
        (("checkpoint", 4), True, [("checkpoint", 4, 4), ("evaluation", 4, 4), ("end", 4)]),
    ],
)
def test_a_run_that_a_callback_ends_finishes_its_step_and_is_saved(data_dir, tmp_path, at, evaluate, events):
    record, other = Record(at, StopTraining("no better\nthan chance", evaluate=evaluate)), Record()
    result = train_and_evaluate(tiny(data_dir), str(tmp_path), callbacks=[record, other])
    assert record.events[-len(events) :] == events
    # Those after it in the list see the same.
    assert other.events == record.events
    assert result["stopped_early"] == "no better than chance"
    step = events[-1][1]
    assert str(step) in {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert json.loads((tmp_path / "stopped.json").read_text()) == {
        "step": step,
        "total_steps": 6,
        "reason": "no better than chance",
    }


def test_it_stays_ended_is_shown_and_can_go_on_to_the_bit(data_dir, whole, tmp_path, capsys):
    folder = tmp_path / "run"
    config = tiny(data_dir, **{"writers.progress": "plain"})
    train_and_evaluate(config, str(folder), callbacks=[Record(("step", 2), StopTraining("no better than chance"))])
    line = "stopped early after step 2 of 6: no better than chance"
    assert line in capsys.readouterr().out
    again = Record()
    result = train_and_evaluate(config, str(folder), callbacks=[again])
    assert (again.events, result["stopped_early"]) == ([], "no better than chance")
    assert f"{line}; remove {folder / 'stopped.json'} to go on" in capsys.readouterr().out
    (run,) = map(runs.read, runs.find([str(folder)]).places)
    assert (run.state, run.reason) == ("stopped early", "no better than chance")
    said = findings.outcome(run, findings.facts(run))
    assert said.startswith("Stopped early after step 2 of 6: no better than chance.")
    (folder / "stopped.json").unlink()
    assert "stopped_early" not in train_and_evaluate(config, str(folder), callbacks=[again])
    assert again.events[0] == ("start", 2)
    assert losses(folder) == losses(whole[1])


def test_a_sweep_counts_it_as_final_and_shows_why(tmp_path):
    stopped = {"step": 2, "total_steps": 6, "reason": "too slow"}
    # Speaks as a worker does.
    script = tmp_path / "train.py"
    script.write_text(
        "import json, sys; from multiprocessing.connection import Connection\n"
        "connection = Connection(int(sys.argv[1].partition('=')[2]))\n"
        "_, _, folder, _ = connection.recv()\n"
        f"json.dump({stopped}, open(folder + '/stopped.json', 'w'))\n"
        "connection.send((0, False))\n"
    )
    todo = [sweeps.PlannedRun("a", {"a": 1}, [], [sys.executable, str(script)])]
    said = []
    for _ in range(2):
        record = sweeps.execute(todo, str(tmp_path), jobs=1, say=said.append)
    assert (record["a"]["state"], record["a"]["status"]) == ("stopped early", 0)
    assert said[1].startswith("a: stopped early after")
    assert said[1].endswith("(too slow)")
    assert said[2] == "1 runs, 1 finished before, 1 at a time"


def test_a_callback_that_fails_is_named_and_what_it_counts_goes_on_counting(data_dir, whole, tmp_path):
    first = Record(("step", 6), KeyError("x"))
    with pytest.raises(CallbackError, match=rf"^{__name__}\.Record failed in on_step: KeyError: 'x'$"):
        train_and_evaluate(tiny(data_dir), str(tmp_path), callbacks=[first])
    assert first.events[-1] == ("end", 6)
    second = Record()
    train_and_evaluate(tiny(data_dir), str(tmp_path), callbacks=[second])
    assert second.events[0] == ("start", 4)
    # The state is that of before the checkpoint's own event.
    assert second.count == first.events.index(("checkpoint", 4, 4)) + len(second.events)
    assert losses(tmp_path) == losses(whole[1])


class Stops(Callback):
    def on_start(self, run):
        raise StopTraining("not today")


data_of_none = 3


def failing():
    raise OSError("no such port")


@pytest.mark.parametrize(
    ("field", "word", "error", "message"),
    [
        ("callbacks", "Record.count", BadInput, "the object Record has no attribute count"),
        ("callbacks", "data_of_none", BadInput, "expected a callback, or what returns one when it is called"),
        ("callbacks", "Writer.made.copy", BadInput, "gives a list; expected a subclass of sigmarep.training.Callback"),
        ("callbacks", "failing", CallbackError, "failing failed in its call: OSError: no such port"),
        ("writers.extra", "Nothing", BadInput, "has no attribute Nothing"),
        (
            "writers.extra",
            "failing",
            CallbackError,
            "failing failed in its call: TypeError: failing() got an unexpected",
        ),
    ],
)
def test_what_is_refused(data_dir, tmp_path, field, word, error, message):
    word = f"{__name__}:{word}"
    with pytest.raises(error) as raised:
        train_and_evaluate(tiny(data_dir, **{field: (word,)}), str(tmp_path))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_callback_is_named_in_the_configuration(data_dir, tmp_path):
    config = tiny(data_dir, callbacks=(f"{__name__}.Stops",))
    assert train_and_evaluate(config, str(tmp_path))["stopped_early"] == "not today"
    assert doors.load(f"{__name__}.Stops", field="f") is Stops


def test_a_second_run_of_the_same_program_compiles_nothing(data_dir, tmp_path):
    names = []
    with jax.log_compiles(), recorded_compilations(names):
        train_and_evaluate(tiny(data_dir), str(tmp_path / "first"))
        first = list(names)
        train_and_evaluate(tiny(data_dir, seed=1, **{"optimizer.learning_rate": 0.2}), str(tmp_path / "second"))
    assert any("step" in name for name in first)
    assert not [name for name in names[len(first) :] if "step" in name or "create" in name]
    losses = [
        [row["train/loss"] for row in read_metrics(str(tmp_path / name / "metrics.jsonl")) if "train/loss" in row]
        for name in ("first", "second")
    ]
    assert losses[0] != losses[1]


def test_objects_of_the_users_are_not_taken_from_an_earlier_run(data_dir):
    assert shared_programs(tiny(data_dir).to_dict()) is SHARED
    assert shared_programs(tiny(data_dir, **{"model.activation": "my_package.relu"}).to_dict()) is not SHARED


@contextlib.contextmanager
def recorded_compilations(names):
    """Adds the name of every program that JAX compiles to `names`."""

    class Handler(logging.Handler):
        def emit(self, record):
            if (text := record.getMessage()).startswith("Compiling "):
                names.append(text.split()[1])

    handler = Handler()
    loggers = [logging.getLogger(name) for name in ("jax._src.interpreters.pxla", "jax._src.dispatch")]
    for each in loggers:
        each.addHandler(handler)
    yield
    for each in loggers:
        each.removeHandler(handler)
