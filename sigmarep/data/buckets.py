"""Batches of examples of different sizes, in few shapes.

An example belongs to the smallest bucket that holds it. A bucket's batches have as many rows as fit into the batch size,
padding included. As in `sigmarep.data.pipeline`, seed and number determine a batch, so the position of a stream is the
number of its next batch.
"""

import collections
import concurrent.futures
import functools
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from sigmarep.errors import BadInput

Batch = dict[str, np.ndarray]
# Least number of batches prepared in advance.
MIN_PREFETCH = 4


def checked(boundaries: Sequence[float]) -> tuple[float, ...]:
    """Returns the boundaries of buckets as a tuple.

    Raises:
      BadInput: they are not increasing positive numbers.
    """
    lengths = tuple(boundaries)
    numbers = all(isinstance(each, int | float) and not isinstance(each, bool) for each in lengths)
    if not lengths or not numbers or list(lengths) != sorted(set(lengths)) or lengths[0] <= 0:
        raise BadInput(f"config.data.buckets = {lengths}: expected rising lengths above 0")
    return lengths


def planned_rows(boundaries: Sequence[float], batch_size: float, rows_multiple: int) -> list[int]:
    """Rows of a batch of each bucket; 0 where not even `rows_multiple` rows fit into a batch."""
    return [int(batch_size // size) // rows_multiple * rows_multiple for size in boundaries]


class Share(NamedTuple):
    """One process's rows of a global batch.

    Attributes:
      bucket: index among the buckets that have examples.
      members: examples, at most `rows`.
      rows: rows of this process, including empty ones.
      first_row: row of the first member in the global batch.
      number: number of the batch in training, None in evaluation.
    """

    bucket: int
    members: np.ndarray
    rows: int
    first_row: int
    number: int | None

    def numbers(self) -> np.ndarray:
        """Example of each row, (rows,) int32; −1 for empty rows."""
        index = np.full(self.rows, -1, np.int32)
        index[: len(self.members)] = self.members
        return index


class Buckets:
    """Assignment of examples to batches.

    Attributes:
      shapes: (rows, size) of each bucket that has examples.
      members: the examples of each of these buckets.
      batches_per_epoch: the same in every epoch.
      size: of all examples, each padded to its bucket, in the unit of the batch size.
    """

    def __init__(
        self,
        sizes: np.ndarray,
        boundaries: Sequence[float],
        *,
        batch_size: float,
        unit: str,
        rows_multiple: int,
        seed: int,
        num_threads: int,
    ):
        """Assigns examples to buckets.

        Args:
          sizes: (n,), none above the last boundary.
          boundaries: largest size of each bucket, increasing.
          batch_size: size of a global batch, in `unit`.
          unit: name of the unit of sizes, for messages.
          rows_multiple: the number of rows of every batch is a multiple of this.
          seed: determines the order of training batches, at least 0.
          num_threads: threads that make batches.

        Raises:
          BadInput: an argument is invalid, or `rows_multiple` rows of a bucket do not fit into a batch.
        """
        boundaries = checked(boundaries)
        if seed < 0:
            raise BadInput(f"config.seed = {seed}: expected 0 or more")
        if rows_multiple < 1:
            raise BadInput(f"config.data.rows_multiple = {rows_multiple}: expected at least 1")
        self._seed, self._rows_multiple, self._num_threads = seed, rows_multiple, num_threads
        of_example = np.searchsorted(boundaries, sizes)
        self.shapes: list[tuple[int, float]] = []
        self.members: list[np.ndarray] = []
        for bucket, (size, rows) in enumerate(
            zip(boundaries, planned_rows(boundaries, batch_size, rows_multiple), strict=True)
        ):
            members = np.flatnonzero(of_example == bucket)
            if not len(members):
                continue
            if not rows:
                raise BadInput(
                    f"config.batch_size = {batch_size}: {unit}, too few for {rows_multiple} rows "
                    f"(config.data.rows_multiple) of {size} (config.data.buckets)"
                )
            self.shapes.append((rows, size))
            self.members.append(members)
        # (bucket, number of the batch in its bucket), in order.
        self._all = [
            (bucket, number)
            for bucket, members in enumerate(self.members)
            for number in range(-(-len(members) // self.shapes[bucket][0]))
        ]
        self.batches_per_epoch = len(self._all)
        self.size = float(
            sum(len(members) * size for members, (_, size) in zip(self.members, self.shapes, strict=True))
        )
        self._epoch = functools.lru_cache(maxsize=2)(self._shuffled)

    def stream(
        self, make: Callable[[Share], Batch], *, start: int, process_index: int = 0, process_count: int = 1
    ) -> Generator[Batch, None, None]:
        """Yields `make(share)` for this process's rows of the global batches `start`, `start + 1`, …, without end.

        Every epoch has each example once.

        Raises:
          BadInput: `rows_multiple` does not divide over the processes.
        """
        self._check(process_count)
        with concurrent.futures.ThreadPoolExecutor(max(self._num_threads, 1)) as pool:
            waiting: collections.deque[concurrent.futures.Future] = collections.deque()
            number = start
            try:
                while True:
                    while len(waiting) < max(MIN_PREFETCH, 2 * self._num_threads):
                        waiting.append(pool.submit(self._training_batch, make, number, process_index, process_count))
                        number += 1
                    yield waiting.popleft().result()
            finally:
                pool.shutdown(cancel_futures=True)

    def evaluation(
        self, make: Callable[[Share], Batch], *, process_index: int = 0, process_count: int = 1
    ) -> Iterator[Batch]:
        """Yields `make(share)` for this process's rows of batches that hold every example once, bucket by bucket."""
        self._check(process_count)
        for bucket, number in self._all:
            rows = self.shapes[bucket][0]
            members = self.members[bucket][number * rows : (number + 1) * rows]
            yield make(self._share(bucket, members, None, process_index, process_count))

    def _check(self, process_count: int) -> None:
        if self._rows_multiple % process_count:
            raise BadInput(
                f"config.data.rows_multiple = {self._rows_multiple}: does not divide over {process_count} processes; use a "
                f"multiple of {process_count}"
            )

    def _shuffled(self, epoch: int) -> tuple[list[tuple[int, int]], list[np.ndarray]]:
        rng = np.random.default_rng([self._seed, epoch])
        members = [rng.permutation(each) for each in self.members]
        return [self._all[i] for i in rng.permutation(len(self._all))], members

    def _training_batch(self, make, number: int, process_index: int, process_count: int) -> Batch:
        epoch, place = divmod(number, self.batches_per_epoch)
        order, members = self._epoch(epoch)
        bucket, within = order[place]
        rows = self.shapes[bucket][0]
        chosen = members[bucket][within * rows : (within + 1) * rows]
        return make(self._share(bucket, chosen, number, process_index, process_count))

    def _share(self, bucket: int, members: np.ndarray, number: int | None, process_index: int, process_count: int):
        local = self.shapes[bucket][0] // process_count
        mine = members[process_index * local : (process_index + 1) * local]
        return Share(bucket, mine, local, process_index * local, number)
