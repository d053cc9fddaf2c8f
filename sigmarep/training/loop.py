"""The one training loop: `train_and_evaluate`."""

import collections
import contextlib
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from sigmarep.errors import BadInput, Diverged, Stopped, one_line
from sigmarep.tasks.protocol import Batch
from sigmarep.training import init_from, workdir
from sigmarep.training.callbacks import Callback, Callbacks, Stop, named_callbacks
from sigmarep.training.checkpoint_files import check_path
from sigmarep.training.checkpoints import Checkpointer, has_checkpoint
from sigmarep.training.config import validate
from sigmarep.training.divergence import DivergenceCheck, GoodCheckpoints
from sigmarep.training.evaluation import Evaluator
from sigmarep.training.experiment import Experiment, Programs, build
from sigmarep.training.lanes import Alone, LaneOutput
from sigmarep.training.mesh import input_share, path_name
from sigmarep.training.metrics import MetricWriter
from sigmarep.training.panel import panel_metrics
from sigmarep.training.preemption import Preemption
from sigmarep.training.processes import ending_together, steps_in_flight
from sigmarep.training.progress import Clock, Progress, announce, waiting
from sigmarep.training.requests import Pause, StepRequest, Steps, alone
from sigmarep.training.schedules import create_schedule
from sigmarep.training.step import StepOutput, TrainState
from sigmarep.training.stopped import FILE as STOPPED
from sigmarep.training.stopped import StoppedEarly, stopped_early, write_stopped
from sigmarep.training.summary import summary
from sigmarep.training.workdir_lock import WorkdirLock

# Steps given to the devices before the host waits for the oldest: enough to keep them busy, few enough that
# collectives of several processes cannot pile up.
STEPS_IN_FLIGHT = 2


def train_and_evaluate(
    config: ml_collections.ConfigDict,
    folder: str,
    callbacks: Sequence[Callback] = (),
    *,
    programs: Programs | None = None,
) -> dict[str, Any]:
    """Trains, evaluates and checkpoints; goes on where an earlier call in the same folder stopped.

    Args:
      config: see `sigmarep.training.config.default_config`.
      folder: the workdir; made if missing. See `sigmarep.training.workdir` for what is in it.
      callbacks: called after those of `config.callbacks`; see `sigmarep.training.callbacks`.
      programs: compiled programs of other runs, to be used again and added to; by default those of this process.

    Returns:
      The last evaluation; `attention/entropy_lowest`, the lowest layer's entropy of the whole run in nats; and
      `stopped_early`, the reason, if a callback ended the run.

    Raises:
      BadInput: the configuration or the folder is wrong, or another process trains in it. Nothing was changed.
      CallbackError: a callback or a writer that is not this project's failed; the message names it.
      Diverged: see `config.divergence_factor`; the last good checkpoint is the newest then, `diagnosis.json` is written.
      Stopped: SIGTERM arrived; the state is saved.
    """
    return alone(training(config, folder, callbacks, programs=programs))


def training(
    config: ml_collections.ConfigDict,
    folder: str,
    callbacks: Sequence[Callback] = (),
    *,
    programs: Programs | None = None,
    place: Alone | None = None,
) -> Steps:
    """Does what `train_and_evaluate` does, and yields the steps that are to be made.

    Args:
      place: where the run is made; alone on its devices if None.
    """
    place = place or Alone()
    check_path(folder)
    config = validate(config)
    announce(f"{config.task} in {folder}: opens the data, then compiles its first step", mode=config.writers.progress)
    with waiting("opening the data", mode=config.writers.progress):
        experiment = build(config, programs=programs, data=place.open_data(config))
        # What is wrong with the place, or with a split to be evaluated, shows now, before anything is written.
        place.runner(experiment.runner)
        evaluator = experiment.evaluator()
        others = named_callbacks(experiment.config.callbacks, callbacks)
        files = experiment.data.files()
        start = None
        if config.init_from.path and not has_checkpoint(folder):
            start = init_from.read(config, experiment.layers)
            files = {**files, **start.files}
    workdir.check(folder, experiment.config, files)
    _check_length(folder, experiment)
    with WorkdirLock(folder) as lock, place.preemption() as preemption:
        workdir.claim(
            folder,
            experiment.config,
            files,
            total_steps=experiment.total_steps,
            primary_metric=experiment.task.primary_metric,
        )
        run = _Run(experiment, evaluator, others, folder, place, preemption, lock, start)
        try:
            # Closing waits for all processes: not where one is gone.
            with ending_together():
                yield from run.train()
        except Diverged:
            run.leave_good_checkpoint()
            raise
        finally:
            run.close()
        return summary(folder)


def _check_length(folder: str, experiment: Experiment) -> None:
    """Raises BadInput if the workdir's run was to have another number of steps, and steps that it has made depend on it."""
    old, new = workdir.stored_total_steps(folder), experiment.total_steps
    if old is None or old == new:
        return
    steps = jnp.arange(min(old, new))
    config, warmup = experiment.config.optimizer, experiment.warmup_steps
    rates = [jax.vmap(create_schedule(config, total_steps=each, warmup_steps=warmup))(steps) for each in (old, new)]
    differing = np.flatnonzero(np.asarray(rates[0] != rates[1]))
    if differing.size:
        raise BadInput(
            f"--workdir {folder}: its run has {old} steps and config.total_* asks for {new}: the learning rate of "
            f"config.optimizer.schedule = {config.schedule!r} depends on that from step "
            f"{differing[0] + 1} on; keep {old}, or choose another folder"
        )


def _checked(extra: Mapping[str, Any], path: str) -> dict[str, Any]:
    """What the checkpoint at `path` holds beside the state, with empty entries for what it lacks.

    Raises:
      BadInput: it is not what a run saves.
    """
    try:
        good, first_loss = extra.get("good", {}), extra.get("first_loss")
        return {
            "clock": {name: float(seconds) for name, seconds in extra.get("clock", {}).items()},
            "good": {name: None if value is None else value + 0 for name, value in good.items()},
            "first_loss": None if first_loss is None else float(first_loss),
            "callbacks": dict(extra.get("callbacks", {})),
        }
    except (AttributeError, TypeError, ValueError) as error:
        raise BadInput(f"{path}: what is kept beside the state cannot be read ({one_line(error)})") from error


class _Run:
    """One call of `train_and_evaluate`: the state between steps, and the order of events. Callbacks see it as their run."""

    def __init__(
        self,
        experiment: Experiment,
        evaluator: Evaluator,
        others: Mapping[str, Callback],
        folder: str,
        place: Alone,
        preemption: Preemption,
        lock: WorkdirLock,
        start: init_from.Start | None,
    ):
        config = experiment.config
        self.experiment, self.evaluator, self.workdir = experiment, evaluator, folder
        self.place, self.preemption, self.lock = place, preemption, lock
        self.runner = place.runner(experiment.runner)
        self.total_steps = experiment.total_steps
        self.clock = Clock()
        # Every process would say the same.
        mode = config.writers.progress if jax.process_index() == 0 else "off"
        self.progress = Progress(self.total_steps, mode=mode, unit=experiment.data.unit)
        self.checkpoints = Checkpointer(
            os.path.join(folder, "checkpoints"), keep=config.keep_checkpoints, say=self.progress.message
        )
        restored = self.checkpoints.restore(experiment.abstract_state)
        with self.progress.waiting("initializing the parameters"):
            self.step, state, extra = restored or (0, self._initial_state(start), {})
        extra = _checked(extra, os.path.join(folder, "checkpoints", str(self.step)))
        if restored is not None:
            self.progress.message(f"resumed from the checkpoint of step {self.step}")
        self._state = self.runner.put_state(state)
        self.clock.load_state_dict(extra["clock"])
        self.good = GoodCheckpoints(config.divergence_factor, extra["good"])
        self.checkpoints.last_good = self.good.step
        self.divergence = DivergenceCheck(
            folder, config.divergence_factor, lambda: self.good.step, first_loss=extra["first_loss"]
        )
        self.writer = MetricWriter(
            folder,
            resume_step=self.step,
            tensorboard=config.writers.tensorboard,
            wandb_project=config.writers.wandb_project,
            extra=config.writers.extra,
            run_config=config.to_dict(),
            say=self.progress.message,
        )
        self.callbacks = Callbacks([self.writer, self.divergence, self.progress], others)
        self.callbacks.load_state_dict(extra["callbacks"])
        self.sharpness = experiment.sharpness()
        # Shapes of batches, with and without the panel, whose programs are compiled.
        self.programs: set[Any] = set()
        self.in_flight: collections.deque[StepOutput | LaneOutput] = collections.deque()
        self.output: StepOutput | LaneOutput | None = None
        self.unlogged: tuple[int, StepOutput | LaneOutput] | None = None
        self.evaluated_step: int | None = None
        self.saved_step = self.step
        # The last checkpoint and the output of the step after it, whose loss judges it.
        self.unproven: tuple[int, StepOutput | LaneOutput] | None = None
        if start is not None and restored is None:
            # A run that resumes before its first other checkpoint needs the file of the weights no more.
            self.save()

    def _initial_state(self, start: init_from.Start | None) -> TrainState:
        """The state before the first step."""
        if start is None:
            return jax.block_until_ready(self.experiment.create_state())
        for line in start.lines:
            self.progress.message(line)
        shardings = self.experiment.runner.shardings.params
        sharding_of = {path_name(path): each for path, each in jax.tree_util.tree_leaves_with_path(shardings)}
        loaded = {
            name: jax.make_array_from_callback(x.shape, sharding_of[name], x.__getitem__)
            for name, x in start.params.items()
        }
        return jax.block_until_ready(self.experiment.create_state(loaded))

    @property
    def config(self) -> ml_collections.FrozenConfigDict:
        return self.experiment.config

    @property
    def state(self) -> TrainState:
        return self.runner.get_state(self._state)

    def write(self, metrics: Mapping[str, Any]) -> None:
        self.writer.write(self.step, metrics)

    def train(self) -> Steps:
        """Makes the steps that are left, until a callback ends the run.

        After step s come, in this order: its log, sharpness, the evaluation, the checkpoint. A run that resumes from the
        checkpoint of step s has therefore every line up to s, and the writer drops those after it.
        """
        total, due = self.total_steps, self.experiment.due
        if stopped := stopped_early(self.workdir):
            self.progress.message(f"{stopped}; remove {os.path.join(self.workdir, STOPPED)} to go on")
            return
        if self.step >= total:
            self.progress.message(f"all {total} steps are done already")
            return
        share = input_share(self.experiment.runner.mesh)
        stream = self.experiment.data.train_stream(start=self.step, process_index=share.part, process_count=share.parts)
        self.callbacks.emit("on_start", self)
        for step, batch in zip(range(self.step + 1, total + 1), stream, strict=False):
            if self.callbacks.stop:
                break
            first = not self.programs
            yield from self.make_step(step, batch)
            self.callbacks.emit("on_step", self)
            if first:
                # No device waits: the next step may be another program, which has to be compiled.
                self.log()
            if due("sharpness", step):
                self.log()
                self.measure_sharpness()
            if due("eval", step):
                self.log()
                yield from self.evaluate()
            signalled = self.preemption.stops_after(step)
            if due("checkpoint", step) or signalled:
                self.log()
                self.save()
            if signalled and step < total and not self.callbacks.stop:
                yield Pause()
                self.checkpoints.wait()
                raise Stopped(f"stopped by SIGTERM after step {step} of {total}; the state is saved in {self.workdir}")
        self.log()
        if self.callbacks.stop and self.step < total:
            yield from self.end_early(self.callbacks.stop)
        yield Pause()
        self.checkpoints.wait()

    def make_step(self, step: int, batch: Batch) -> Steps:
        """Gives the devices a step, and logs an earlier one that waited for it."""
        intervention = self.experiment.intervention_step
        first = not self.programs
        if intervention is not None and step > intervention and (first or step == intervention + 1):
            self.intervene()
            first = True
        logging = step == 1 or self.experiment.due("log", step)
        program = (logging, *(array.shape for array in batch.values()))
        known = program in self.programs and not first
        self.programs.add(program)
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.clock.measure("training" if known else "compiling"))
            if not known:
                stack.enter_context(self.progress.waiting("compiling the training step"))
            self.preemption.nothing_to_save = first
            self.lock.check()
            self._state, self.output = yield StepRequest(self.runner, self._state, batch, logging)
            if self.saved_step == self.step:
                self.unproven = (self.step, self.output)
            self.step = step
            self.in_flight.append(self.output)
            if first or len(self.in_flight) > steps_in_flight(STEPS_IN_FLIGHT):
                jax.block_until_ready(self.in_flight.popleft())
            self.preemption.nothing_to_save = False
        self.clock.step(self.experiment.data.units_per_step())
        # The log of a step is fetched after the next one was given to the devices, which then do not wait for it.
        self.log()
        if logging:
            self.unlogged = (step, self.output)

    def prove(self, step: int) -> None:
        """Judges the last checkpoint by the loss of the step after it, where that is `step` or an earlier one."""
        if self.unproven is None or self.unproven[0] >= step:
            return
        (saved, output), self.unproven = self.unproven, None
        self.good.judge(saved, float(output.scalars["loss"]))
        self.checkpoints.last_good = self.good.step

    def leave_good_checkpoint(self) -> None:
        """Makes the last good checkpoint the newest, once the run has diverged; the initial state if none was saved."""
        if self.good.step is None:
            return
        self.checkpoints.set_aside_after(self.good.step)
        if not self.checkpoints.all_steps():
            good = {**self.good.state_dict(), "step": 0}
            self.checkpoints.save(0, self.experiment.create_state(), extra={"good": good})
            self.checkpoints.wait()

    def intervene(self) -> None:
        """Goes on with the experiment that `config.intervention` makes of this one."""
        self.experiment = self.experiment.intervened()
        self.runner = self.place.runner(self.experiment.runner)
        self.programs.clear()
        self.evaluator, self.sharpness = self.experiment.evaluator(), self.experiment.sharpness()
        changes = self.experiment.config.intervention
        self.progress.message(
            f"after step {self.experiment.intervention_step}: attention temperature times "
            f"{changes.attention_temperature:g}, learning rate times {changes.learning_rate_factor:g}"
        )

    def log(self) -> None:
        """Hands over the metrics of the last step to be logged, if that was not done yet."""
        if self.unlogged is None:
            return
        (step, output), self.unlogged = self.unlogged, None
        output = output.on_host()
        self.prove(step)
        scalars = {f"train/{name}": float(value) for name, value in output.scalars.items()}
        speed = {f"train/{self.experiment.data.unit}_per_second": self.clock.units_per_second}
        self.callbacks.emit(
            "on_log", self, step, {**scalars, **speed, **panel_metrics(output.panel, self.experiment.layers.stacks)}
        )

    def log_undue(self, output: StepOutput | LaneOutput) -> None:
        """Logs the last step, though no log was due: its loss ends the run, and belongs into the metrics."""
        self.unlogged = (self.step, output)
        self.log()

    def measure_sharpness(self) -> None:
        with self.clock.measure("evaluating"):
            self.write(self.sharpness(self.state))

    def evaluate(self) -> Steps:
        """Evaluates the state, and keeps what the model made; never one whose loss says that the run diverged."""
        if self.output is not None and self.divergence.reason(float(self.output.scalars["loss"])):
            self.log_undue(self.output)
        with self.clock.measure("evaluating"), self._first_evaluation():
            metrics = yield from self.evaluator.steps(self.runner.evaluation_variables(self._state))
        self.evaluated_step = self.step
        self.callbacks.emit("on_evaluation", self, self.step, metrics)
        if jax.process_index() == 0:
            workdir.write_outputs(self.workdir, self.evaluator.outputs)
        for outputs in self.evaluator.outputs.values():
            for line in outputs.samples:
                self.progress.message(f"  {line}")

    def _first_evaluation(self) -> contextlib.AbstractContextManager[None]:
        """Says that it takes long, where it has to be compiled; later ones know their steps."""
        return self.progress.waiting("evaluating") if self.evaluated_step is None else contextlib.nullcontext()

    def save(self) -> None:
        """Saves the state; never one whose loss was not finite."""
        if self.output is not None and not math.isfinite(float(self.output.scalars["loss"])):
            self.log_undue(self.output)
        with self.clock.measure("saving"):
            self.writer.flush()
            self.prove(self.step)
            extra = {
                "good": self.good.state_dict(),
                "first_loss": self.divergence.first_loss,
                "clock": self.clock.state_dict(),
                "next_batch": self.step,
                "callbacks": self.callbacks.state_dict(),
            }
            self.checkpoints.save(self.step, self.state, extra=extra)
        self.saved_step = self.step
        self.callbacks.emit("on_checkpoint", self, self.step)

    def end_early(self, stop: Stop) -> Steps:
        """Ends the run as a callback asked for, and keeps the reason in the workdir."""
        if stop.evaluate and self.evaluated_step != self.step:
            yield from self.evaluate()
        if self.saved_step != self.step:
            self.save()
        self.checkpoints.wait()
        stopped = StoppedEarly(self.step, self.total_steps, stop.reason)
        if jax.process_index() == 0:
            write_stopped(self.workdir, stopped)
        self.progress.message(str(stopped))

    def close(self) -> None:
        """Ends all callbacks; the last call, however the run ended."""
        with contextlib.ExitStack() as stack:
            stack.callback(self.callbacks.end, self)
            self.checkpoints.close()
