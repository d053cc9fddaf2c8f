"""Shared by the tasks of images: the training split, and pictures in batches for a trained model."""

import functools
import hashlib
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import ml_collections
import numpy as np

from sigmarep.data import pipeline, sources
from sigmarep.data.images import transforms
from sigmarep.tasks.protocol import Batch, TaskData

# Pictures that a trained model is given at a time.
ROWS = 64


def where(data: ml_collections.ConfigDict) -> dict[str, Any]:
    """Arguments of `sigmarep.data.sources` from `config.data`, where a task's data have these fields."""
    return {name: data[name] for name in ("data_dir", "folder", "held_out") if name in data}


class PictureData(TaskData):
    """The part of the data side that is the same for every task of images."""

    def __init__(self, config: ml_collections.ConfigDict):
        self.config = config

    @functools.cached_property
    def description(self) -> sources.Description:
        """The description of `config.data.name`; of a folder of pictures, prints one line on its files."""
        data = self.config.data
        description = sources.describe(data.name, **where(data))
        if description.summary and jax.process_index() == 0:
            # Standard output is the command's own.
            print(description.summary, file=sys.stderr, flush=True)
        return description

    @functools.cached_property
    def train_source(self) -> sources.Source:
        """Examples of the training split, read once under `config.data.in_memory`."""
        source = self.open_source(self.config.data.train_split)
        return [source[i] for i in range(len(source))] if self.config.data.in_memory else source

    def open_source(self, split: str) -> sources.Source:
        """Examples of a split."""
        return sources.open_source(self.config.data.name, split, **where(self.config.data))

    @property
    def num_train_examples(self):
        return len(self.train_source)

    def files(self):
        # Not the sizes of the files: the same pictures compress to others elsewhere.
        data, examples = self.config.data, sorted(self.description.splits.items())
        identity = f"{self.description.full_name}|{data.train_split}|{examples}"
        if not examples:
            identity += sources.fingerprint(data.name, data.train_split, **where(data))
        facts = {"fingerprint": hashlib.sha256(identity.encode()).hexdigest(), "examples": self.num_train_examples}
        if self.description.summary:
            facts["summary"] = self.description.summary
        return {"data.json": json.dumps(facts, indent=2).encode() + b"\n"}

    def stream(self, *, start: int, process_index: int, process_count: int, **transforms: Any) -> Iterator[Batch]:
        """`train_stream` with the transforms of `sigmarep.data.pipeline.training_stream`."""
        data = self.config.data
        return pipeline.training_stream(
            self.train_source,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            start=start,
            process_index=process_index,
            process_count=process_count,
            num_threads=data.num_threads,
            num_workers=data.num_workers,
            **transforms,
        )

    def evaluated(
        self, source: sources.Source, transform: Callable[..., Any], process_index: int, process_count: int
    ) -> Iterator[dict[str, np.ndarray]]:
        """Batches of `sigmarep.data.pipeline.evaluation_batches`."""
        return pipeline.evaluation_batches(
            source,
            batch_size=self.config.batch_size,
            transform=transform,
            process_index=process_index,
            process_count=process_count,
            num_threads=self.config.data.num_threads,
        )


def apply_to_pictures(
    step: Callable[[Any, np.ndarray], jax.Array],
    variables: Any,
    pictures: Iterable[np.ndarray],
    data: ml_collections.ConfigDict,
) -> np.ndarray:
    """Rows of `step(variables, images)` for pictures transformed as those of an evaluation.

    Args:
      step: compiled; takes `ROWS` images (B, size, size, channels) and returns (B, D).
      pictures: uint8 (height, width, channels) of any size.
      data: `config.data`.
    """
    transform = transforms.eval_transform(data)
    waiting, results = iter(pictures), []
    while part := list(itertools.islice(waiting, ROWS)):
        images = [transform({"image": picture, "label": 0})["image"] for picture in part]
        batch = np.stack([*images, *[images[-1]] * (ROWS - len(images))])
        results.append(np.asarray(step(variables, batch))[: len(images)])
    return np.concatenate(results) if results else np.zeros((0, 0), np.float32)
