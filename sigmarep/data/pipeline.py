"""The one road from a source to batches, for every kind of data.

A stream's position is nothing but the number of its next global batch. Which examples a batch holds, and every random
number of their augmentation, follow from that number and the seed alone: not from the number of processes, threads or
workers, and not from where the stream was started. Resuming is therefore starting at a number, and is exact.
"""

import atexit
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any

import grain
import numpy as np
from absl import flags

from sigmarep.data.sources import Source
from sigmarep.errors import BadInput

Example = Mapping[str, Any]

_streams: weakref.WeakSet[Generator] = weakref.WeakSet()


def training_stream(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    transform: Callable[[Example, np.random.Generator], Example] | None = None,
    pair_transform: Callable[[Example, np.random.Generator], Example] | None = None,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 8,
    num_workers: int = 0,
) -> Generator[dict[str, np.ndarray], None, None]:
    """This process's rows of the global batches `start`, `start + 1`, …, for ever.

    Each epoch is shuffled anew; what is left at its end goes into the next epoch's first batch.

    Args:
      batch_size: rows of a global batch. Process p of n has rows p·B/n to (p + 1)·B/n.
      transform: applied to every example.
      pair_transform: applied to two consecutive examples as a batch of two (mixup, CutMix).
      num_threads: threads that read and transform.
      num_workers: processes that do, 0 for none.

    Raises:
      BadInput: the batch does not divide over the processes, or not into pairs; the seed is negative.
    """
    if seed < 0:
        raise BadInput(f"config.seed = {seed}: expected 0 or more")
    local = _local_size(batch_size, process_count)
    # As good as for ever. Grain's own for ever is too long for batches of one, by rounding.
    dataset = grain.MapDataset.source(source).seed(seed).shuffle().repeat(2**60 // len(source))
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
        # Grain's workers read absl's flags, which a notebook never parses.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        iterable = iterable.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers))
    stream = _closing(iter(iterable))
    _streams.add(stream)
    return stream


def evaluation_batches(
    source: Source,
    *,
    batch_size: int,
    transform: Callable[[Example], Example] | None = None,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 8,
) -> Iterator[dict[str, np.ndarray]]:
    """Every example once, in order, this process's rows of each global batch.

    The last batch is filled up with copies; `mask` (rows,) float32 is 1 for examples and 0 for those. All processes
    yield equally many batches.

    Raises:
      BadInput: the batch does not divide over the processes.
    """
    local = _local_size(batch_size, process_count)
    batches = -(-len(source) // batch_size)
    last = len(source) - 1

    def example(row: int) -> dict[str, Any]:
        found = source[min(row, last)]
        found = dict(transform(found) if transform is not None else found)
        return {**found, "mask": np.float32(row <= last)}

    dataset = grain.MapDataset.range(batches * batch_size).map(example).batch(local)[process_index::process_count]
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=max(2 * num_threads, 2))
    return iter(dataset.to_iter_dataset(options))


def _closing(iterator: Any) -> Generator[dict[str, np.ndarray], None, None]:
    try:
        yield from iterator
    finally:
        iterator.close()


@atexit.register
def _close_streams() -> None:
    """Ends worker processes and frees the memory shared with them while the modules that do so still exist."""
    for stream in list(_streams):
        stream.close()


def _local_size(batch_size: int, process_count: int) -> int:
    if batch_size % process_count:
        raise BadInput(
            f"config.batch_size = {batch_size}: does not divide over {process_count} processes; "
            f"use a multiple of {process_count}"
        )
    return batch_size // process_count


def _joined(pairs: list[Example]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([pair[name] for pair in pairs]) for name in pairs[0]}
