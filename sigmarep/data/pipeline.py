"""Batches from a source of examples of one size, for training and evaluation.

The position of a stream is the number of its next global batch, and nothing else. That number and the seed determine the
examples of a batch and every random number of their augmentation, whatever the number of processes, threads or workers
and wherever the stream was started. A run resumes exactly by starting its stream at a number.
"""

import atexit
import functools
import os
import shutil
import signal
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any

import grain
import numpy as np
from absl import flags

from sigmarep import signals
from sigmarep.data.sources import Source
from sigmarep.errors import BadInput

Example = Mapping[str, Any]

# Folder of shared memory.
SHARED = "/dev/shm"

# Times that a batch may hold the whole training split. More is a mistake, which would fill the memory before it shows.
MOST_EPOCHS = 64

_streams: weakref.WeakSet[Generator] = weakref.WeakSet()


def training_stream(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    transform: Callable[[Example, np.random.Generator], Example] | None = None,
    pair_transform: Callable[[Example, np.random.Generator], Example] | None = None,
    repeats: int = 1,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 8,
    num_workers: int = 0,
) -> Generator[dict[str, np.ndarray], None, None]:
    """Yields this process's rows of the global batches `start`, `start + 1`, …, without end.

    Every epoch has its own order; examples left at the end of an epoch go into the first batch of the next.

    Args:
      source: the examples.
      batch_size: B, rows of a global batch. Process p of n has rows p·B/n to (p + 1)·B/n.
      seed: determines order and augmentation, at least 0.
      start: number of the first batch.
      transform: applied to every example.
      pair_transform: applied to two consecutive examples as a batch of two (mixup, CutMix).
      repeats: times that each example comes, each time transformed anew, in rows that are no neighbors; an epoch is then
        as many rows as there are examples, of fewer of them.
      process_index, process_count: p and n.
      num_threads: threads that read and transform.
      num_workers: processes that read and transform; 0 for none.

    Raises:
      BadInput: the batch does not divide over the processes or into pairs, the seed is negative, or there are more repeats
        than half of the batch.
    """
    if seed < 0:
        raise BadInput(f"config.seed = {seed}: expected 0 or more")
    local = _local_size(batch_size, process_count)
    # Practically endless. Grain's own endless repeat overflows by rounding for batches of one.
    dataset = grain.MapDataset.source(source).seed(seed).shuffle().repeat(2**60 // len(source))
    if repeats > max(batch_size // 2, 1):
        raise BadInput(
            f"config.data.augment.repeats = {repeats}: expected at most half of config.batch_size = {batch_size}"
        )
    if repeats > 1:
        dataset = _repeated(dataset, batch_size, repeats).seed(seed)
    if transform is not None:
        dataset = dataset.random_map(transform)
    if pair_transform is not None:
        if local % 2:
            raise BadInput(
                f"config.batch_size = {batch_size}: mixup and cutmix mix pairs, so each of the {process_count} "
                "processes needs an even number of examples"
            )
        dataset = dataset.batch(2).random_map(pair_transform)
        dataset = dataset.batch(local // 2, batch_fn=lambda pairs: _joined(pairs))
    else:
        dataset = dataset.batch(local)
    dataset = dataset[process_index + process_count * start :: process_count]
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=max(2 * num_threads, 2))
    iterable = dataset.to_iter_dataset(options)
    if num_workers:
        # Grain's workers read absl's flags, which nobody has parsed in a notebook.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        # Without this they would outlive a process that is killed.
        end = functools.partial(_end_with, os.getpid())
        iterable = iterable.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers), worker_init_fn=end)
    stream = _closing(iter(iterable), num_workers)
    _streams.add(stream)
    return stream


def _repeated(examples: grain.MapDataset, batch_size: int, repeats: int) -> grain.MapDataset:
    """Every example `repeats` times within a batch, or where it ends within two.

    A batch is made of parts, as of the devices that share it in the method's first use: the copies of an example are at
    one place of as many parts, so that pairs of rows are never of one example.
    """
    even = 1 + (batch_size % 2 == 0)
    divisors = (parts for parts in range(repeats, batch_size) if batch_size % (even * parts) == 0)
    parts = next(divisors, batch_size)

    def example(index: int) -> Example:
        batch, row = divmod(index, batch_size)
        part, place = divmod(row, batch_size // parts)
        result: Example = examples[(batch * batch_size + place * parts + part) // repeats]
        return result

    return grain.MapDataset.range(2**60).map(example)


def _end_with(parent: int, index: int, count: int) -> None:
    signals.end_with(parent)


def evaluation_batches(
    source: Source,
    *,
    batch_size: int,
    transform: Callable[[Example], Example] | None = None,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 8,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields this process's rows of global batches that hold every example once, in order.

    The last batch is filled up with copies of the last example; `mask` (rows,) float32 is 1 for examples and 0 for
    copies. All processes yield the same number of batches. Arguments as in `training_stream`, except that `transform`
    takes no generator.

    Raises:
      BadInput: the batch does not divide over the processes.
    """
    local = _local_size(batch_size, process_count)
    batches = -(-len(source) // batch_size)
    last = len(source) - 1

    def example(row: int) -> dict[str, Any]:
        raw = source[min(row, last)]
        return {**(transform(raw) if transform is not None else raw), "mask": np.float32(row <= last)}

    dataset = grain.MapDataset.range(batches * batch_size).map(example).batch(local)[process_index::process_count]
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=max(2 * num_threads, 2))
    return iter(dataset.to_iter_dataset(options))


def _closing(iterator: Any, num_workers: int) -> Generator[dict[str, np.ndarray], None, None]:
    try:
        yield from iterator
    except RuntimeError as error:
        # Workers hand over batches in shared memory; a page for which there is no room ends them with this signal.
        if f"exit code {-signal.SIGBUS}" not in str(error):
            raise
        raise BadInput(
            f"config.data.num_workers = {num_workers}: the shared memory {SHARED}, {_size(SHARED)}, has no room for the "
            "batches of so many; enlarge it (docker run --shm-size), or set fewer, 0 for none"
        ) from error
    finally:
        iterator.close()


@atexit.register
def _close_streams() -> None:
    """Ends worker processes and frees their shared memory before the interpreter unloads the modules needed for that."""
    for stream in list(_streams):
        stream.close()


def _size(folder: str) -> str:
    try:
        return f"{shutil.disk_usage(folder).total / 1e6:,.0f} MB"
    except OSError:
        return "which is missing"


def check_batch_size(batch_size: int, available: float) -> None:
    """Refuses a batch that would hold every example of the training split many times over.

    Args:
      batch_size: `config.batch_size`.
      available: size of the training split in the same unit.

    Raises:
      BadInput: it is more than `MOST_EPOCHS` times as large.
    """
    if batch_size > MOST_EPOCHS * available:
        raise BadInput(
            f"config.batch_size = {batch_size}: expected at most {MOST_EPOCHS} times the size of the training split, "
            f"{available:,.0f}"
        )


def _local_size(batch_size: int, process_count: int) -> int:
    if batch_size % process_count:
        raise BadInput(
            f"config.batch_size = {batch_size}: does not divide over {process_count} processes; "
            f"use a multiple of {process_count}"
        )
    return batch_size // process_count


def _joined(pairs: list[Example]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([pair[name] for pair in pairs]) for name in pairs[0]}
