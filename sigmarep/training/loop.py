"""The one training loop: `train_and_evaluate` and `evaluate`."""

import collections
import math
import os
from typing import Any

import jax
import ml_collections

from sigmarep import doors
from sigmarep.errors import BadInput, Diverged, Stopped
from sigmarep.training import divergence, workdir
from sigmarep.training.checkpoints import Checkpointer
from sigmarep.training.config import default_config, validate
from sigmarep.training.evaluation import Evaluator
from sigmarep.training.experiment import Experiment, build
from sigmarep.training.mesh import fits, input_share
from sigmarep.training.metrics import MetricWriter, read_metrics
from sigmarep.training.panel import panel_metrics
from sigmarep.training.preemption import Preemption
from sigmarep.training.processes import ending_together, steps_in_flight
from sigmarep.training.progress import Clock, Progress
from sigmarep.training.sharpness import Sharpness
from sigmarep.training.step import StepOutput, TrainState

# Steps given to the devices before the host waits for the oldest: enough to keep them busy, few enough that
# collectives of several processes cannot pile up.
STEPS_IN_FLIGHT = 2


def train_and_evaluate(config: ml_collections.ConfigDict, folder: str) -> dict[str, float]:
    """Trains, evaluates and checkpoints; goes on where an earlier call in the same folder stopped.

    Args:
      config: see `sigmarep.training.config.default_config`.
      folder: the workdir; made if missing. See `sigmarep.training.workdir` for what is in it.

    Returns:
      The last evaluation, and `attention/entropy_lowest`, the lowest layer's entropy of the whole run in nats.

    Raises:
      BadInput: the configuration or the folder is wrong. Nothing was changed.
      Diverged: see `config.divergence_factor`; the last checkpoint before it is kept, `diagnosis.json` is written.
      Stopped: SIGTERM arrived; the state is saved.
    """
    experiment = build(validate(config))
    # What is wrong with a split to be evaluated shows now, before anything is written.
    evaluator = Evaluator(experiment)
    workdir.claim(folder, experiment.config, experiment.task.files(), total_steps=experiment.total_steps)
    with Preemption(Stopped.exit_status) as preemption:
        run = _Run(experiment, evaluator, folder, preemption)
        try:
            # Closing waits for all processes: not where one is gone.
            with ending_together():
                run.train()
        finally:
            run.close()
    return summary(folder)


def evaluate(config: ml_collections.ConfigDict | None, folder: str) -> dict[str, float]:
    """Evaluates the newest checkpoint of a workdir on the task's splits; changes nothing there.

    Args:
      config: the stored one if None; else one of the same model, with other splits or ways to decode.

    Raises:
      BadInput: the folder holds no run or no checkpoint, or `config` is of another model.
    """
    experiment, step, state = restore(config, folder)
    return {"step": step, **Evaluator(experiment)(state)}


def restore(config: ml_collections.ConfigDict | None, folder: str) -> tuple[Experiment, int, TrainState]:
    """The experiment of a workdir, and the step and state of its newest checkpoint, on the devices of this machine.

    Args:
      config: the stored one if None; else one of the same model.

    Raises:
      BadInput: the folder holds no run or no checkpoint, `config` is of another model, or its run had another vocabulary
        than the data give now.
    """
    stored = restored_config(folder) if config is None else config
    if config is None and not fits(stored.mesh):
        # The run had other devices; evaluation gives the same numbers on these.
        stored.mesh.update({"data": -1, "fsdp": 1, "tensor": 1})
    checked = validate(stored)
    if config is not None:
        workdir.check_same_model(folder, checked)
    experiment = build(checked)
    checkpoints = Checkpointer(os.path.join(folder, "checkpoints"), keep=stored.keep_checkpoints)
    try:
        restored = checkpoints.restore(experiment.abstract_state)
    finally:
        checkpoints.close()
    if restored is None:
        raise BadInput(f"--workdir {folder}: holds no checkpoint yet")
    workdir.check_vocabulary(folder, experiment.task.files())
    step, state, _ = restored
    return experiment, step, state


def restored_config(folder: str) -> ml_collections.ConfigDict:
    """The configuration that a workdir was made with.

    Raises:
      BadInput: there is none, it does not fit this version, or it names code that the user did not (`sigmarep.doors`).
    """
    stored = workdir.stored_config(folder)
    doors.check_stored(stored, folder)
    config = default_config(stored.get("task", ""))
    try:
        config.update(_without_none(stored))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BadInput(f"--workdir {folder}: config.json does not fit this version ({error})") from error
    return config


def _without_none(stored: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _without_none(value) if isinstance(value, dict) else value
        for name, value in stored.items()
        if value is not None
    }


def summary(folder: str) -> dict[str, Any]:
    """The last evaluation of a run, the lowest layer's attention entropy in nats, and where and when it was."""
    rows = read_metrics(os.path.join(folder, "metrics.jsonl"))
    last: dict[str, Any] = {}
    for row in rows:
        last |= {name: value for name, value in row.items() if name.startswith("eval/")}
    layers = divergence.diagnose(rows)["layers"]
    if layers:
        name = min(layers, key=lambda each: layers[each]["lowest"])
        last["attention/entropy_lowest"] = layers[name]["lowest"]
        last["attention/entropy_lowest_layer"] = name
        last["attention/entropy_lowest_step"] = layers[name]["lowest_step"]
    return last


class _Run:
    """One call of `train_and_evaluate`: the state between steps, and what is written when."""

    def __init__(self, experiment: Experiment, evaluator: Evaluator, folder: str, preemption: Preemption):
        config = experiment.config
        self.experiment, self.folder, self.preemption = experiment, folder, preemption
        self.clock = Clock()
        # Every process would say the same.
        mode = config.writers.progress if jax.process_index() == 0 else "off"
        self.progress = Progress(experiment.total_steps, mode=mode, unit=experiment.task.unit)
        self.checkpoints = Checkpointer(
            os.path.join(folder, "checkpoints"), keep=config.keep_checkpoints, say=self.progress.message
        )
        self.first_loss: float | None = None
        self.unlogged: tuple[int, StepOutput] | None = None
        restored = self.checkpoints.restore(experiment.abstract_state)
        if restored is None:
            self.start = 0
            state = experiment.create_state()
        else:
            self.start, state, extra = restored
            self.first_loss = extra["first_loss"]
            self.clock.load_state_dict(extra["clock"])
            self.progress.message(f"resumed from the checkpoint of step {self.start}")
        self.saved_step = self.start
        self.state = experiment.runner.put_state(state)
        self.evaluator = evaluator
        self.sharpness = Sharpness(experiment)
        # Shapes of batches, with and without the panel, whose programs are compiled.
        self.programs: set[Any] = set()
        self.writer = MetricWriter(
            folder,
            resume_step=self.start,
            tensorboard=config.writers.tensorboard,
            wandb_project=config.writers.wandb_project,
            run_config=config.to_dict(),
        )

    def train(self) -> None:
        """Makes the steps that are left.

        After step s come, in this order: its log, the evaluation, the checkpoint. A run that resumes from the
        checkpoint of step s has therefore every line up to s, and the writer drops those after it.
        """
        total = self.experiment.total_steps
        intervention = self.experiment.intervention_step
        if self.start >= total:
            self.progress.message(f"all {total} steps are done already")
            return
        share, most = input_share(self.experiment.runner.mesh), steps_in_flight(STEPS_IN_FLIGHT)
        stream = self.experiment.task.train_stream(
            start=self.start, process_index=share.part, process_count=share.parts
        )
        in_flight: collections.deque[jax.Array] = collections.deque()
        for step, batch in zip(range(self.start + 1, total + 1), stream, strict=False):
            first = step == self.start + 1
            if intervention is not None and step > intervention and (first or step == intervention + 1):
                self.intervene()
                first = True
            experiment = self.experiment
            logging = step == 1 or experiment.due("log", step)
            program = (logging, *(array.shape for array in batch.values()))
            known = program in self.programs and not first
            self.programs.add(program)
            with self.clock.measure("training" if known else "compiling"):
                self.preemption.nothing_to_save = first
                self.state, output = experiment.runner.step(self.state, batch, panel=logging)
                in_flight.append(output.scalars["loss"])
                if first or len(in_flight) > most:
                    jax.block_until_ready(in_flight.popleft())
                self.preemption.nothing_to_save = False
            self.clock.step(self.experiment.task.units_per_step())
            # The log of a step is fetched after the next one was given to the devices, which then do not wait for it.
            self.log()
            if logging:
                self.unlogged = (step, output)
            if experiment.due("sharpness", step):
                self.log()
                with self.clock.measure("evaluating"):
                    self.writer.write(step, self.sharpness(self.state))
            if experiment.due("eval", step):
                self.log()
                self.evaluate(step, output)
            stopping = self.preemption.stops_after(step)
            if experiment.due("checkpoint", step) or stopping:
                self.log()
                self.save(step, output)
            if stopping and step < total:
                self.checkpoints.wait()
                raise Stopped(f"stopped by SIGTERM after step {step} of {total}; the state is saved in {self.folder}")
        self.log()
        self.checkpoints.wait()

    def intervene(self) -> None:
        """Goes on with the experiment that `config.intervention` makes of this one."""
        self.experiment = self.experiment.intervened()
        self.programs.clear()
        self.evaluator, self.sharpness = Evaluator(self.experiment), Sharpness(self.experiment)
        changes = self.experiment.config.intervention
        self.progress.message(
            f"after step {self.experiment.intervention_step}: attention temperature times "
            f"{changes.attention_temperature:g}, learning rate times {changes.learning_rate_factor:g}"
        )

    def log(self) -> None:
        """Writes the metrics of the last step to be logged, if they are not written yet."""
        if self.unlogged is None:
            return
        (step, output), self.unlogged = self.unlogged, None
        output = jax.device_get(output)
        scalars = {f"train/{name}": float(value) for name, value in output.scalars.items()}
        panel = panel_metrics(output.panel)
        speed = {f"train/{self.experiment.task.unit}_per_second": self.clock.units_per_second}
        self.writer.write(step, {**scalars, **speed, **panel})
        loss = scalars["train/loss"]
        self.check(step, loss)
        self.first_loss = loss if self.first_loss is None else self.first_loss
        self.progress.update(
            step,
            loss=loss,
            entropy_min=panel.get("attention/entropy_min"),
            units_per_second=self.clock.units_per_second,
        )

    def check(self, step: int, loss: float) -> None:
        """Raises Diverged, with the diagnosis written, if `loss` says so."""
        why = divergence.reason(loss, self.first_loss, self.experiment.config.divergence_factor)
        if why is None:
            return
        self.writer.flush()
        rows = read_metrics(os.path.join(self.folder, "metrics.jsonl"))
        message = divergence.write_diagnosis(self.folder, step, why, rows)
        kept = self.checkpoints.all_steps()
        raise Diverged(f"{message}; last finite checkpoint: {f'step {kept[-1]}' if kept else 'none'}")

    def evaluate(self, step: int, output: StepOutput) -> None:
        self.check(step, float(output.scalars["loss"]))
        with self.clock.measure("evaluating"):
            metrics = self.evaluator(self.experiment.runner.get_state(self.state))
        self.writer.write(step, metrics)
        words = ", ".join(f"{name.removeprefix('eval/')} {value:.4g}" for name, value in metrics.items())
        self.progress.message(f"step {step}: {words}")
        if jax.process_index() == 0:
            workdir.write_outputs(self.folder, self.evaluator.outputs)
        for outputs in self.evaluator.outputs.values():
            for line in outputs.samples:
                self.progress.message(f"  {line}")

    def save(self, step: int, output: StepOutput) -> None:
        """Saves the state after `step`; never one whose loss was not finite."""
        loss = float(output.scalars["loss"])
        if not math.isfinite(loss):
            self.check(step, loss)
        with self.clock.measure("saving"):
            self.writer.flush(sync=True)
            extra = {"first_loss": self.first_loss, "clock": self.clock.state_dict(), "next_batch": step}
            self.checkpoints.save(step, self.experiment.runner.get_state(self.state), extra=extra)

    def close(self) -> None:
        self.checkpoints.close()
        self.writer.close()
        self.progress.close()
