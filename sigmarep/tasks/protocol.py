"""What the trainer asks of a task.

A task is model, data, loss and metrics. It returns sums and weights, never means: the trainer divides once, after
adding over microbatches and devices, so that padding and uneven shares never skew a mean.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

Batch = Mapping[str, np.ndarray]
Variables = dict[str, Any]
# A sum over examples or tokens, and the number of them it is a sum over.
Sum = tuple[jax.Array, jax.Array]
# Under pmap (config.parallel) a task's loss sees one device's share of the batch, with this axis bound: what depends on
# the whole batch, such as a contrastive loss or batch normalisation, gathers over it. Under jit arrays are global.
AXIS = "devices"
# What an abstract task takes the training split to have where nothing says how many there are. Of the program only the
# constants of a schedule given in epochs depend on it.
UNKNOWN_EXAMPLES = 1_000_000


class LossOutput(NamedTuple):
    """Of one microbatch: `loss` and every one of `metrics` as a sum with its weight; the changed non-parameter
    collections `model_state`; and `attention`, the statistics of `sigmarep.nn.MultiHeadAttention`, if asked for."""

    loss: Sum
    metrics: dict[str, Sum]
    model_state: Variables
    attention: Variables


class Outputs(NamedTuple):
    """What a model made of a split: `files` by name, kept in the workdir; `samples`, lines for whoever watches."""

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


class Task(Protocol):
    """See the module docstring; `create(config)` of a task's module makes one.

    `create(config, abstract=True)` makes one that has read no data, for programs that are compiled and not run. It knows
    of its data what the configuration says and what is published of well-known sets, and has all of this but streams,
    evaluations and files.

    What has a default here is for tasks whose `config.batch_size` is a number of examples.
    """

    config: Any
    # Of the training split, in the unit of config.batch_size.
    num_train_examples: int
    # What a step's batch is a number of, for the speed that is shown.
    unit: str = "examples"
    # The evaluation metric that says how well a run went, as eval/<split>/<metric>, and the words for it.
    headline: str

    def init(self, rng: jax.Array) -> Variables:
        """Initial variables, `params` among them."""

    def abstract_batches(self) -> list[dict[str, jax.ShapeDtypeStruct]]:
        """What `train_stream` yields where there is one process: every shape of it, the largest last."""

    def train_stream(self, *, start: int, process_index: int, process_count: int) -> Iterator[Batch]:
        """This process's part of the global batches `start`, `start + 1`, …"""

    def loss(self, params: Any, model_state: Variables, batch: Batch, rng: jax.Array, *, attention: bool) -> LossOutput:
        """The loss of one microbatch, in training mode."""

    def evaluations(self) -> list[Evaluation]:
        """The splits to evaluate, in order."""

    def batch_rows(self) -> tuple[int, ...]:
        """The numbers of rows that a global batch may have; each must divide over devices and microbatches."""
        return (self.config.batch_size,)

    def units_per_step(self) -> int:
        """How many of `unit` a step takes."""
        return self.config.batch_size

    def files(self) -> dict[str, bytes]:
        """What belongs to a run beside its configuration, by file name, such as a vocabulary. It is kept in the workdir,
        and a run goes on with the same alone."""
        return {}
