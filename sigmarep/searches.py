"""Searches: a sweep whose runs are chosen one after another by optuna, from what the runs before have shown.

A configuration file's `search()` returns a `Search`:

    from optuna.distributions import CategoricalDistribution, FloatDistribution

    def search():
        space = {
            "learning_rate": FloatDistribution(1e-3, 1.0, log=True),
            "config.optimizer.weight_decay": CategoricalDistribution([0.0, 0.1]),
        }
        return Search(space, metric="eval/test/accuracy", direction="maximize")

`scripts/sweep.py --search optuna --trials 40` makes its runs. Names are those of a sweep's points: an argument of the file,
or `config.` and a field. The tree-structured Parzen estimator chooses; a run whose metric is worse than the median of the
runs before at the same step is ended by the callback `Pruner`. What optuna knows is kept in `study.journal` in the sweep's
folder: the same command goes on with the search, and `optuna.load_study` opens it.
"""

import contextlib
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from sigmarep.errors import BadInput, one_line
from sigmarep.sweep_execution import FINAL, PlannedRun, Point
from sigmarep.training.callbacks import Callback, Run, StopTraining
from sigmarep.training.metrics import read_metrics

if TYPE_CHECKING:
    import optuna

STUDY = "study.journal"
PRUNER = "sigmarep.searches.Pruner"
DIRECTIONS = ("minimize", "maximize")
# Runs that are made to their end before the first one may be pruned.
WHOLE_RUNS = 5


class Search(NamedTuple):
    """A space of runs, and the figure by which they are judged.

    Attributes:
      space: optuna's distribution of each name.
      metric: name of a metric in the run's `metrics.jsonl`, such as "eval/test/accuracy"; its last value counts. The median
        pruner compares the values of an evaluation, or of a log for "train/loss", at the same step.
      direction: "minimize" or "maximize".
    """

    space: Mapping[str, "optuna.distributions.BaseDistribution"]
    metric: str
    direction: str = "minimize"


class Trials:
    """The trials of a study, as runs to make.

    Args:
      search: what is searched.
      workdir: folder of the sweep, which keeps the study.
      count: number of trials, those of earlier starts among them.
      plan: the run of a point, in a folder of the given name.

    Raises:
      BadInput: optuna is missing, the search is wrong, or the folder holds another search.
    """

    def __init__(self, search: Search, workdir: str, count: int, plan: Callable[[Point, str], PlannedRun]):
        self._search, self._workdir, self._count, self._plan = search, workdir, count, plan
        self._study = _study(workdir, search)
        # Trials that an earlier start has begun and not ended; their runs go on where they were.
        self._open = [trial.number for trial in self._study.trials if not trial.state.is_finished()]

    @property
    def finished(self) -> int:
        """Number of trials that have ended."""
        return sum(trial.state.is_finished() for trial in self._study.trials)

    def next(self) -> PlannedRun | None:
        """The next run; None if all trials have been begun."""
        if self._open:
            number = self._open.pop(0)
            return self._plan(self._study.trials[number].params, trial_name(number))
        if len(self._study.trials) >= self._count:
            return None
        try:
            trial = self._study.ask(dict(self._search.space))
        except ValueError as error:
            raise BadInput(f"{os.path.join(self._workdir, STUDY)}: {one_line(error)}; choose another folder") from None
        return self._plan(trial.params, trial_name(trial.number))

    def ended(self, run: PlannedRun, state: str) -> None:
        """Tells the study how a run has ended.

        A diverged run counts as pruned, which the estimator takes for worse than all that were not; one that was stopped
        from outside stays open; one that failed tells nothing.
        """
        import optuna

        number = int(run.name.rpartition("=")[2])
        if state == "stopped":
            return
        value = last_value(os.path.join(self._workdir, run.name), self._search.metric) if state == "done" else None
        if value is not None:
            self._study.tell(number, value)
        elif state in FINAL and state != "done":
            self._study.tell(number, state=optuna.trial.TrialState.PRUNED)
        else:
            self._study.tell(number, state=optuna.trial.TrialState.FAIL)

    def best(self) -> tuple[str, float, Point] | None:
        """Folder, value and point of the best trial; None if no run has reached its end."""
        import optuna

        if not self._study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,)):
            return None
        trial = self._study.best_trial
        assert trial.value is not None
        return os.path.join(self._workdir, trial_name(trial.number)), trial.value, trial.params


class Pruner(Callback):
    """Ends a run of a search that is worse than the median of those before it, at the same step."""

    def __init__(self) -> None:
        self._trial: Any = None
        self._metric = ""

    def on_start(self, run: Run) -> None:
        """Opens the study in the folder above the run's."""
        import optuna

        folder, name = os.path.split(os.path.abspath(run.workdir))
        if not os.path.exists(os.path.join(folder, STUDY)):
            raise BadInput(
                f"config.callbacks = {PRUNER!r}: {folder} has no {STUDY}; leave it out to make this run alone"
            )
        with _quiet():
            study = optuna.load_study(study_name=None, storage=_storage(folder), pruner=_median())
        self._metric = study.user_attrs["metric"]
        frozen = next(trial for trial in study.trials if trial_name(trial.number) == name)
        # The trial was asked for by another process; optuna offers no other way to report to it.
        self._trial = optuna.trial.Trial(study, frozen._trial_id)

    def on_log(self, run: Run, step: int, metrics: Mapping[str, float]) -> None:
        self._judge(run, step, metrics)

    def on_evaluation(self, run: Run, step: int, metrics: Mapping[str, float]) -> None:
        self._judge(run, step, metrics)

    def _judge(self, run: Run, step: int, metrics: Mapping[str, float]) -> None:
        value = metrics.get(self._metric)
        if value is None or not math.isfinite(value):
            return
        with _quiet():
            # A step that is repeated after a stop has been reported already.
            self._trial.report(float(value), step)
            pruned = self._trial.should_prune()
        # At its end there is nothing to be spared.
        if pruned and step < run.total_steps:
            raise StopTraining(
                f"{self._metric} = {value:.4g} is worse than the median of the trials before at step {step}"
            )


def check(search: Any, path: str) -> Search:
    """A file's `search()`, checked.

    Raises:
      BadInput: it is no `Search`, or a part of it is wrong.
    """
    if not isinstance(search, Search):
        raise BadInput(
            f"--config {path}: its search() returns a {type(search).__name__}; expected a sigmarep.searches.Search"
        )
    if search.direction not in DIRECTIONS:
        raise BadInput(f"--config {path}: direction = {search.direction!r}: expected one of {', '.join(DIRECTIONS)}")
    optuna = _optuna()
    for name, each in search.space.items():
        if not isinstance(each, optuna.distributions.BaseDistribution):
            raise BadInput(
                f"--config {path}: space[{name!r}] is a {type(each).__name__}; expected one of optuna.distributions"
            )
    if not search.space:
        raise BadInput(f"--config {path}: its search() has an empty space; give it at least one name")
    return search


def with_pruner(callbacks: Sequence[str]) -> str:
    """The flag of a run that adds `Pruner` to the callbacks of its configuration."""
    return f"--config.callbacks={(*callbacks, PRUNER)!r}"


def trial_name(number: int) -> str:
    """Name of a trial's folder."""
    return f"trial={number}"


def last_value(folder: str, metric: str) -> float | None:
    """The last value of a metric of a run; None if it has none, or one that is no number.

    Raises:
      BadInput: the run has ended and never had that metric.
    """
    rows = read_metrics(os.path.join(folder, "metrics.jsonl"))
    given = [row[metric] for row in rows if metric in row]
    if rows and not given:
        names = sorted({name for row in rows for name in row if name.startswith(("eval/", "train/"))})
        raise BadInput(f"the search's metric = {metric!r}: {folder} has none of that name; it has {', '.join(names)}")
    return float(given[-1]) if given and math.isfinite(given[-1]) else None


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise BadInput('--search optuna: needs the package optuna: pip install "sigmarep[search]"') from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of optuna that a part of it may change, and of steps reported twice."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _storage(workdir: str) -> Any:
    optuna = _optuna()
    from optuna.storages.journal import JournalFileBackend

    return optuna.storages.JournalStorage(JournalFileBackend(os.path.join(workdir, STUDY)))


def _median() -> Any:
    return _optuna().pruners.MedianPruner(n_startup_trials=WHOLE_RUNS)


def _study(workdir: str, search: Search) -> Any:
    optuna = _optuna()
    with _quiet():
        study = optuna.create_study(
            study_name="search",
            storage=_storage(workdir),
            # Several runs at a time: those that are not done are taken for bad ones, so that the next are elsewhere.
            sampler=optuna.samplers.TPESampler(constant_liar=True),
            pruner=_median(),
            direction=search.direction,
            load_if_exists=True,
        )
    earlier = study.user_attrs.get("metric", search.metric), study.direction.name.lower()
    if earlier != (search.metric, search.direction):
        raise BadInput(
            f"{os.path.join(workdir, STUDY)}: holds a search for metric = {earlier[0]!r}, direction = {earlier[1]!r}; "
            "choose another folder"
        )
    study.set_user_attr("metric", search.metric)
    return study
