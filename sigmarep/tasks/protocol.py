"""The interface of a task: three functions, and the two sides that they make.

A task is a module, or any object, with

    default_config() -> ConfigDict               its fields of a configuration, beside the trainer's own
    create_model(config, files) -> TaskModel     the model side: from the configuration and the run's files alone
    open_data(config, files=None) -> TaskData    the data side: reads data sets

and, where the model needs files of the data such as a vocabulary, `planned_files(config)`, which makes them up in the
sizes that the configuration asks for, so that a program can be compiled before there is any data.

Runs of a sweep that differ in the seed and the optimizer's rates alone share one model side in one process: it must not
read `config.seed` or `config.optimizer`, nor change while it is used. Every run has its own data side.

A run keeps `TaskData.files()` in its folder. To train, the data side is opened first and the model is made from its
files. To use or evaluate a trained model, the model is made from the files of the folder, and the data side, if any is
wanted, is opened with the same files: it must not read the training split until something needs it.

Fields named `data_dir`, `num_threads` and `num_workers` may change while a run goes on; so may `folder` and `file`, if
`TaskData.files()` has a fingerprint of the examples.

Losses and metrics are sums and weights, never means: the trainer divides once, after adding over microbatches and devices,
so that padding and uneven shares never skew a mean.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import ml_collections
import numpy as np

Batch = Mapping[str, np.ndarray]
Variables = dict[str, Any]
# Contents by file name.
Files = Mapping[str, bytes]
# A sum over examples or tokens, and the number of them it is a sum over.
Sum = tuple[jax.Array, jax.Array]
# Under pmap (config.parallel) a task's loss sees one device's share of the batch, with this axis bound: what depends on
# the whole batch, such as a contrastive loss or batch normalisation, gathers over it. Under jit arrays are global.
AXIS = "devices"


class LossOutput(NamedTuple):
    """Result of one microbatch: `loss` and every one of `metrics` as a sum with its weight; the changed non-parameter
    collections `model_state`; and `attention`, the statistics of `sigmarep.nn.MultiHeadAttention`, if asked for."""

    loss: Sum
    metrics: dict[str, Sum]
    model_state: Variables
    attention: Variables


class Outputs(NamedTuple):
    """Outputs of a model for a split: `files` by name, kept in the workdir; `samples`, lines for whoever watches."""

    files: dict[str, str]
    samples: list[str]


class Evaluation(NamedTuple):
    """One split to evaluate.

    `batches(process_index=…, process_count=…)` yields this process's padded batches. `step(variables, batch)` is pure
    and compiled by the trainer. `finish` turns the host copies of all its results into metrics, and `outputs` into
    what can be read.
    """

    name: str
    batches: Callable[..., Iterable[Batch]]
    step: Callable[[Variables, Batch], Any]
    finish: Callable[[list[Any]], dict[str, float]]
    outputs: Callable[[list[Any]], Outputs] | None = None


def split_name(split: str) -> str:
    """The name of a split in metrics: "train" for "train[:10%]"."""
    return split.split("[")[0]


class TaskModel(Protocol):
    """A model with its loss. It reads no data set.

    A model may have more, each for the method of that name of `sigmarep.inference.Run`, which has more to say of it:

        generate(variables, prompts, rng, *, max_length, temperature, top_k, top_p) -> texts
        translate(variables, sentences, *, names, rows) -> texts
        transcribe(variables, recordings, *, rows) -> texts           and recording(path) -> samples
        classify(variables, pictures) -> probabilities (N, C)         and class_names, picture(path) -> uint8 array
        features(variables, pictures) -> features (N, D)              and picture(path) -> uint8 array
        plain_module                                                  the Linen module that takes folded parameters
        serving() -> function, example                                function(plain variables, batch) -> outputs, and the
                                                                      jax.ShapeDtypeStruct of one example of its batch

    One whose other collections follow from the parameters, as a momentum encoder does, has for `config.init_from`

        follow_parameters(variables) -> variables                     as before the first step with these parameters

    Attributes:
      config: the validated configuration.
      primary_metric: the metric of an evaluation that tells how well a run went.
      model_fields: beginnings of the names of the fields that decide the shapes and the meaning of parameters and inputs.
        A checkpoint can be evaluated under a configuration that differs in others alone.
      microbatches: a batch may be cut into microbatches (`config.accumulation`): no example's loss depends on others.
      takes_progress: `loss` has one more argument, `progress`: () float32, the fraction of the run's steps made before.
    """

    config: Any
    primary_metric: str
    model_fields: tuple[str, ...] = ("model.",)
    microbatches: bool = True
    takes_progress: bool = False

    def init(self, rng: jax.Array) -> Variables:
        """Initial variables, `params` among them."""

    def loss(self, params: Any, model_state: Variables, batch: Batch, rng: jax.Array, *, attention: bool) -> LossOutput:
        """The loss of one microbatch, in training mode."""

    def abstract_batches(self) -> list[dict[str, jax.ShapeDtypeStruct]]:
        """Every shape of a global batch that `TaskData.train_stream` may yield, the largest last."""

    def batch_rows(self) -> tuple[int, ...]:
        """The numbers of rows that a global batch may have; each must divide over devices and microbatches."""
        return (self.config.batch_size,)


class TaskData(Protocol):
    """The data sets of a run.

    Attributes:
      config: the validated configuration.
      unit: a step's batch is a number of these; the speed is shown in them.
    """

    config: Any
    unit: str = "examples"

    @property
    def num_train_examples(self) -> int:
        """Size of the training split, in the unit of `config.batch_size`; durations in epochs are multiples of it."""

    def train_stream(self, *, start: int, process_index: int, process_count: int) -> Iterator[Batch]:
        """This process's rows of the global batches `start`, `start + 1`, …

        A batch follows from `config.seed` and its number alone: a run that resumes continues with the same ones.
        """

    def evaluations(self, model: Any) -> list[Evaluation]:
        """The splits to evaluate, in order; `model` is the task's own TaskModel.

        Raises:
          BadInput: a split cannot be read.
        """

    def units_per_step(self) -> float:
        """Mean number of `unit` in a step's batch."""
        return self.config.batch_size

    def files(self) -> dict[str, bytes]:
        """Files that belong to the run, by name: all that the model side needs, and `data.json`, a JSON object whose
        `fingerprint` names the training examples.

        A run goes on with the same alone; of `data.json` only the fingerprint is compared. A run that has it may find its
        data under another path.
        """
        return {}


class Task(Protocol):
    """See the module docstring. A module is one."""

    def default_config(self) -> ml_collections.ConfigDict:
        """The fields of a configuration that are the task's own, with their defaults."""

    def create_model(self, config: ml_collections.ConfigDict, files: Files) -> TaskModel:
        """The model of a validated configuration.

        Raises:
          BadInput: a field is wrong.
          KeyError: `files` lacks one that this model needs.
        """

    def open_data(self, config: ml_collections.ConfigDict, files: Files | None = None) -> TaskData:
        """The data of a validated configuration.

        Args:
          files: those of a run, for evaluating it; None: to be made from the training split.

        Raises:
          BadInput: a field is wrong, or a data set is not prepared.
        """
