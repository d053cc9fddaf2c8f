"""The road from a source to batches: resumable at any batch, for any number of processes."""

import itertools
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from sigmarep.data import pipeline
from sigmarep.errors import BadInput


class Numbers:
    """Fifty examples that are their own index."""

    def __len__(self):
        return 50

    def __getitem__(self, index):
        return {"x": np.int64(index)}


def noisy(example, rng):
    return {**example, "noise": rng.normal()}


def swapped(pair, rng):
    return {"x": pair["x"], "partner": pair["x"][::-1], "share": np.full(2, rng.random())}


def take(count, **options):
    options = {"batch_size": 8, "seed": 1, "transform": noisy, "num_threads": 2, **options}
    return list(itertools.islice(pipeline.training_stream(Numbers(), **options), count))


def assert_equal(first, second):
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize("start", [1, 5, 6, 7, 23])
@pytest.mark.parametrize("pairs", [None, swapped])
def test_a_stream_started_anywhere_equals_the_uninterrupted_one(start, pairs):
    assert_equal(take(start + 9, pair_transform=pairs)[start:], take(9, start=start, pair_transform=pairs))


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("pairs", [None, swapped])
def test_processes_share_the_same_global_batches(processes, pairs):
    whole = take(9, start=3, pair_transform=pairs)
    parts = [take(9, start=3, pair_transform=pairs, process_index=i, process_count=processes) for i in range(processes)]
    joined = [
        {name: np.concatenate([part[name] for part in row]) for name in row[0]} for row in zip(*parts, strict=True)
    ]
    assert_equal(whole, joined)


def test_threads_do_not_change_the_batches():
    assert_equal(take(9, num_threads=1), take(9, num_threads=8))


@pytest.mark.slow
def test_worker_processes_do_not_change_the_batches():
    assert_equal(take(12)[3:], take(9, start=3, num_workers=2))


def full(example, rng):
    # Writing to shared memory without room for the page raises this signal.
    os.kill(os.getpid(), signal.SIGBUS)


@pytest.mark.slow
def test_shared_memory_without_room_is_named():
    with pytest.raises(
        BadInput, match=r"config\.data\.num_workers = 1: the shared memory /dev/shm, [\d,]+ MB, has no room"
    ):
        take(1, num_workers=1, transform=full)


ABANDONED = """
import numpy as np
from sigmarep.data import pipeline

class Zeros:
    def __len__(self):
        return 50
    def __getitem__(self, index):
        return {"x": np.zeros(1000)}

if __name__ == "__main__":
    stream = pipeline.training_stream(Zeros(), batch_size=8, seed=0, num_workers=2)
    next(stream)
"""


@pytest.mark.slow
def test_a_program_may_end_while_workers_run(tmp_path):
    (tmp_path / "program.py").write_text(ABANDONED)
    done = subprocess.run([sys.executable, tmp_path / "program.py"], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_workers_end_with_a_program_that_is_killed(tmp_path):
    (tmp_path / "program.py").write_text(
        ABANDONED + "    print('begun', flush=True)\n    import time; time.sleep(100)\n"
    )
    process = subprocess.Popen([sys.executable, tmp_path / "program.py"], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "begun\n"
    process.kill()
    # They have the same pipe, which ends with the last of them.
    killed = time.monotonic()
    assert process.communicate(timeout=50) == ("", None)
    assert time.monotonic() - killed < 10


def test_every_epoch_has_every_example_once_and_another_order():
    seen = np.concatenate([batch["x"] for batch in take(25)])
    epochs = seen.reshape(4, 50)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(50))
    assert not np.array_equal(epochs[0], epochs[1])


def test_the_seed_decides_order_and_noise():
    first, other = take(2), take(2, seed=2)
    assert not np.array_equal(first[0]["x"], other[0]["x"])
    assert not np.array_equal(first[0]["noise"], other[0]["noise"])


def test_noise_differs_from_example_to_example_and_epoch_to_epoch():
    noise = np.concatenate([batch["noise"] for batch in take(25)])
    assert len(np.unique(noise)) == len(noise)


def test_pairs_are_neighbours_in_the_batch():
    for batch in take(3, pair_transform=swapped):
        np.testing.assert_array_equal(batch["partner"].reshape(-1, 2), batch["x"].reshape(-1, 2)[:, ::-1])
        np.testing.assert_array_equal(batch["share"][::2], batch["share"][1::2])


@pytest.mark.parametrize(("batch_size", "repeats"), [(8, 2), (8, 3), (12, 5), (22, 3), (9, 3), (7, 2)])
def test_repeated_examples_are_transformed_anew_and_no_pairs(batch_size, repeats):
    batches = take(30, batch_size=batch_size, repeats=repeats)
    rows = np.stack([batch["x"] for batch in batches])
    noise = np.stack([batch["noise"] for batch in batches])
    assert len(np.unique(noise)) == noise.size
    # As in a list of the shuffled examples in which each stands `repeats` times, cut into batches.
    plain = itertools.chain.from_iterable(batch["x"] for batch in take(40, batch_size=batch_size))
    listed = np.repeat(list(itertools.islice(plain, rows.size)), repeats)[: rows.size].reshape(rows.shape)
    np.testing.assert_array_equal(np.sort(rows), np.sort(listed))
    if batch_size % 2 == 0:
        # Where an epoch ends an example may come again at once.
        whole = rows[: 50 * repeats // batch_size]
        assert np.all(whole[:, ::2] != whole[:, 1::2])
    assert_equal(batches[3:5], take(2, batch_size=batch_size, repeats=repeats, start=3))


def test_more_repeats_than_half_of_the_batch_are_refused():
    with pytest.raises(
        BadInput, match=r"config.data.augment.repeats = 5: expected at most half of config.batch_size = 8"
    ):
        take(1, repeats=5)


@pytest.mark.parametrize(("batch_size", "processes"), [(8, 1), (8, 2), (64, 1), (10, 5)])
def test_evaluation_sees_every_example_once(batch_size, processes):
    parts = [
        list(
            pipeline.evaluation_batches(
                Numbers(), batch_size=batch_size, process_index=i, process_count=processes, num_threads=2
            )
        )
        for i in range(processes)
    ]
    assert len({len(part) for part in parts}) == 1
    rows = [batch for part in parts for batch in part]
    assert all(len(batch["x"]) == batch_size // processes for batch in rows)
    real = np.concatenate([batch["x"][batch["mask"] == 1] for batch in rows])
    np.testing.assert_array_equal(np.sort(real), np.arange(50))


def test_a_negative_seed_is_refused():
    with pytest.raises(BadInput, match=r"config\.seed = -1: expected 0 or more"):
        take(1, seed=-1)


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(BadInput, match=r"config\.batch_size = 8: does not divide over 3 processes"):
        take(1, process_count=3)
    with pytest.raises(BadInput, match="even number"):
        take(1, batch_size=6, process_count=2, pair_transform=swapped)


def test_a_batch_of_the_whole_split_many_times_over_is_refused():
    pipeline.check_batch_size(64 * 50, 50)
    with pytest.raises(BadInput, match=r"^config\.batch_size = 3201: expected at most 64 times .* training split, 50$"):
        pipeline.check_batch_size(3201, 50)
