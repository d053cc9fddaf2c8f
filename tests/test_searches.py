"""Searches: trials chosen by optuna, their pruner, and scripts/sweep.py --search."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution

from sigmarep import command, searches, sweeps
from sigmarep.errors import BadInput
from sigmarep.searches import Search
from sigmarep.training.callbacks import StopTraining
from sigmarep.training.config import validate

SPACE = {"learning_rate": FloatDistribution(1e-3, 1.0, log=True), "arm": CategoricalDistribution(["sigma", "pre_ln"])}
SEARCH = Search(SPACE, "eval/test/loss")
SCRIPT = Path(__file__).parents[1] / "scripts" / "sweep.py"
# A file whose runs are tiny.
CONFIG = """
from optuna.distributions import FloatDistribution
from sigmarep.searches import Search
from sigmarep.training.config import arguments, default_config

def get_config(text=""):
    config = default_config("image_classification")
    config.batch_size, config.total_steps, config.log_every_steps = 16, 3, 1
    config.model.depth, config.model.width, config.model.mlp_dim, config.model.patch_size = 1, 8, 8, 4
    config.optimizer.name, config.model.num_heads = "sgd", 2
    config.optimizer.learning_rate = arguments(text, learning_rate=0.01)["learning_rate"]
    config.data.in_memory = True
    return config

def search():
    return Search({"learning_rate": FloatDistribution(1e-3, 1e-1, log=True)}, METRIC)
"""


def sweep(path, workdir, *more):
    """Exit status and output of scripts/sweep.py."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--config", str(path), "--workdir", str(workdir), *more],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    return done.returncode, done.stdout, done.stderr


def trials(folder, count, search=SEARCH):
    return searches.Trials(
        search, str(folder), count, lambda point, name: sweeps.planned_run(name, "c.py", point, str(folder), "train.py")
    )


def write_metrics(folder, run, **rows):
    (folder / run.name).mkdir(exist_ok=True)
    text = "".join(json.dumps({"step": int(step[1:]), "eval/test/loss": loss}) + "\n" for step, loss in rows.items())
    (folder / run.name / "metrics.jsonl").write_text(text)


def test_trials_are_runs_and_their_outcomes_are_told(tmp_path):
    source = trials(tmp_path, 6)
    states = ["done", "done", "diverged", "stopped early", "failed", "stopped"]
    for number, state in enumerate(states):
        run = source.next()
        assert run.name == f"trial={number}"
        assert f"c.py:learning_rate={run.point['learning_rate']},arm={run.point['arm']}" in run.arguments
        assert SPACE["learning_rate"]._contains(run.point["learning_rate"])
        write_metrics(tmp_path, run, s2=9.0, s4=2.0 - number)
        source.ended(run, state)
    assert source.next() is None
    assert [trial.state.name for trial in source._study.trials] == [
        "COMPLETE",
        "COMPLETE",
        "PRUNED",
        "PRUNED",
        "FAIL",
        "RUNNING",
    ]
    folder, value, point = source.best()
    assert (folder, value) == (str(tmp_path / "trial=1"), 1.0)
    # Another start goes on with what was stopped, in the same folder with the same point, then with new trials.
    again = trials(tmp_path, 7)
    assert again.finished == 5
    assert again.best()[2] == point
    assert again.next() == run
    assert [again.next().name, again.next()] == ["trial=6", None]


def test_a_run_without_a_number_is_not_the_best(tmp_path):
    source = trials(tmp_path, 2)
    for value in (float("nan"), 3.0):
        run = source.next()
        write_metrics(tmp_path, run, s1=value)
        source.ended(run, "done")
    assert source.best()[:2] == (str(tmp_path / "trial=1"), 3.0)


def test_the_pruner_ends_what_is_worse_than_the_median(tmp_path):
    source = trials(tmp_path, 20)

    def run_with(offset):
        """Why a run with losses offset - 2, offset - 4 and offset - 6 is ended; None if it is not."""
        run = source.next()
        pruner, loop = searches.Pruner(), types.SimpleNamespace(workdir=str(tmp_path / run.name), total_steps=6)
        pruner.on_start(loop)
        try:
            for step in (2, 4, 6):
                pruner.on_log(loop, step, {"train/loss": 1e9})
                pruner.on_evaluation(loop, step, {"eval/test/loss": offset - step})
        except StopTraining as stop:
            source.ended(run, "stopped early")
            return stop.reason
        write_metrics(tmp_path, run, s6=offset - 6)
        source.ended(run, "done")
        return None

    # The first are made to their end, however bad they are.
    assert [run_with(offset) for offset in (1, 50, 2, 60, 3)] == [None] * searches.WHOLE_RUNS
    # The median of these at step 2 is 3 - 2.
    assert run_with(3.5) == "eval/test/loss = 1.5 is worse than the median of the trials before at step 2"
    assert run_with(2.5) is None


def test_the_pruner_needs_the_study(tmp_path):
    with pytest.raises(BadInput, match=r"has no study\.journal; leave it out to make this run alone"):
        searches.Pruner().on_start(types.SimpleNamespace(workdir=str(tmp_path / "trial=0")))


def test_another_search_is_refused(tmp_path):
    trials(tmp_path, 1)
    with pytest.raises(BadInput, match=r"holds a search for metric = 'eval/test/loss', direction = 'minimize'"):
        trials(tmp_path, 1, Search(SPACE, "eval/test/loss", "maximize"))
    one = trials(tmp_path, 9)
    one.next()
    other = Search({**SPACE, "learning_rate": CategoricalDistribution([1.0])}, "eval/test/loss")
    two = trials(tmp_path, 9, other)
    two.next()
    with pytest.raises(BadInput, match=r"study\.journal: .*choose another folder"):
        two.next()


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({}, r"c\.py: its search\(\) returns a dict; expected a sigmarep\.searches\.Search"),
        (Search(SPACE, "loss", "up"), r"direction = 'up': expected one of minimize, maximize"),
        (Search({"arm": ["sigma"]}, "loss"), r"space\['arm'\] is a list; expected one of optuna\.distributions"),
        (Search({}, "loss"), r"empty space"),
    ],
)
def test_a_wrong_search_is_refused(search, message):
    with pytest.raises(BadInput, match=message):
        searches.check(search, "c.py")


def test_the_configurations_searches_can_be_built(tmp_path):
    files = [path for path in (SCRIPT.parents[1] / "configs").rglob("*.py") if "\ndef search(" in path.read_text()]
    assert files
    for path in files:
        module = command.load_config_file(str(path))
        search = searches.check(module.search(), str(path))
        run = trials(tmp_path, 1, search).next()
        config = command.resolve([f"--config={path}:{run.arguments[1].partition(':')[2]}", *run.arguments[4:]])
        validate(config)
        metric = search.metric.split("/")
        assert metric[0] == "train" or metric[1] in config.data.eval_splits


@pytest.mark.slow
def test_a_search_is_made_and_goes_on(tmp_path):
    path, workdir = tmp_path / "config.py", tmp_path / "runs"
    path.write_text(CONFIG.replace("METRIC", '"eval/test/loss"'))
    arguments = ("--search", "optuna", "--jobs", "1", "--trials")
    status, out, err = sweep(path, workdir, *arguments, "2")
    assert (status, err) == (0, ""), out
    assert out.splitlines()[0] == "2 trials, 0 finished before, 1 at a time"
    status, out, err = sweep(path, workdir, *arguments, "3")
    assert (status, err) == (0, ""), out
    first, run, best, states = out.splitlines()
    assert first == "3 trials, 2 finished before, 1 at a time"
    assert run.startswith("trial=2: done after ")
    study = optuna.load_study(study_name=None, storage=searches._storage(str(workdir)))
    losses = [searches.last_value(str(workdir / f"trial={number}"), "eval/test/loss") for number in range(3)]
    assert [trial.value for trial in study.trials] == losses
    assert best.startswith(f"best: eval/test/loss = {min(losses):.4g} with learning_rate = ")
    assert states == "3 done"
    config = json.loads((workdir / "trial=2" / "config.json").read_text())
    assert config["callbacks"] == ["sigmarep.searches.Pruner"]
    assert config["optimizer"]["learning_rate"] == study.trials[2].params["learning_rate"]


def test_a_metric_that_no_run_has_is_named(tmp_path):
    source = trials(tmp_path, 1, Search(SPACE, "eval/test/bleu"))
    run = source.next()
    write_metrics(tmp_path, run, s1=1.0)
    with pytest.raises(
        BadInput, match=r"metric = 'eval/test/bleu': .*trial=0 has none of that name; it has eval/test/loss"
    ):
        source.ended(run, "done")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--search", "optuna"), "--trials is missing: the number of runs of the search"),
        (("--trials", "3"), "--trials 3: needs --search optuna"),
        (("--search", "optuna", "--trials", "3", "--dry_run"), "--dry_run: does not go with --search"),
        (("--search", "optuna", "--trials", "3"), "has no function search()"),
    ],
)
def test_wrong_flags_of_a_search_are_one_line(tmp_path, arguments, message):
    path = tmp_path / "config.py"
    text = CONFIG.partition("def search")[0] if "no function" in message else CONFIG
    path.write_text(text + "\ndef sweep():\n    return [{}]\n")
    status, out, err = sweep(path, tmp_path / "runs", *arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1
