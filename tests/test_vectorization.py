"""How many runs of one program a sweep makes together, where it is to choose."""

import json
import os
import re

import pytest

from sigmarep import sweeps
from sigmarep.vectorization import TRIED, Given, Measured, even, speed
from sigmarep.worker import TOO_MANY, Worker
from tests.test_sweep import TRAIN, finish, start, write


def test_groups_are_as_even_as_can_be():
    assert [even(waiting, 32) for waiting in (1, 32, 33, 35, 70)] == [1, 32, 17, 18, 24]
    given = Given(8)
    # The last ones of a program are made by the program of the others.
    assert [given.width("a", waiting) for waiting in (18, 12, 6)] == [6, 6, 6]
    assert given.width("b", 3) == 3


def choices(runs, speed_of, memory=1000, programs=1, possible=True):
    """Numbers of runs made together, on a device with a speed by how many there are."""
    measured = Measured({str(i) for i in range(programs)} if possible else set())
    made = []
    for program in range(programs):
        left = runs
        while left:
            width = measured.width(str(program), left)
            if width > memory:
                measured.refuse(width)
                continue
            count = min(width, left)
            left -= count
            made.append(count)
            measured.note(width, [speed_of(width) / width] * count)
    return made


def test_more_runs_are_made_together_while_that_is_faster():
    # A device that does not notice further runs, up to the largest number tried.
    assert choices(105, lambda width: width) == [1, 8, 32, 32, 32]
    assert choices(18, lambda width: width, programs=3) == [1, 8, 5, 4, 18, 18]
    # One that is full with a single run, and one that is full with eight.
    assert choices(18, lambda width: 100 - width) == [1, 8, *[1] * 9]
    assert choices(60, lambda width: min(width, 8) - width / 1000) == [1, 8, 32, 7, 7, 5]
    # Too few runs for a trial.
    assert choices(3, lambda width: width) == [1, 1, 1]
    assert choices(9, lambda width: width, possible=False) == [1] * 9


def test_what_the_memory_does_not_hold_is_not_tried_again():
    assert choices(50, lambda width: width, memory=20) == [1, 8, 7, 7, 7, 7, 7, 6]
    assert choices(50, lambda width: width, memory=4)[:3] == [1, 1, 1]


def test_a_speed_is_that_of_the_last_row_that_has_one():
    rows = [{"step": 1, "train/tokens_per_second": 0.0}, {"step": 2, "train/tokens_per_second": 7.5}, {"step": 2}]
    assert speed(rows) == 7.5
    assert speed(rows[:1]) == speed([]) == 0.0


@pytest.mark.parametrize("memory", [TRIED[-1], 2])
def test_a_sweep_on_an_accelerator_measures_by_its_own_runs(tmp_path, monkeypatch, memory):
    # The workers are real and compute on the CPU; that they have one accelerator, and its memory, is all that is pretended.
    programs, together = Worker.programs, Worker.make_together

    def accelerated(self, arguments):
        named, _ = programs(self, arguments)
        return [(key, True) for key, _ in named], "gpu"

    def bounded(self, runs, width):
        if width <= memory:
            return (yield from together(self, runs, width))
        for number in range(len(runs)):
            yield number, TOO_MANY
        return True

    monkeypatch.setattr(Worker, "programs", accelerated)
    monkeypatch.setattr(Worker, "make_together", bounded)
    path, folder = str(write(tmp_path, "", steps=3)), tmp_path / "sweep"
    folder.mkdir()
    lines = []
    record = sweeps.execute(
        sweeps.runs(path, sweeps.seeds(6), str(folder), TRAIN),
        str(folder),
        jobs=None,
        say=lines.append,
        environment={**os.environ, "JAX_PLATFORMS": "cpu"},
        vectorize=None,
    )
    assert {run["state"] for run in record.values()} == {"done"}
    assert len(record) == 6
    for name in record:
        metrics = (folder / name / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in metrics if "train/loss" in line] == [1, 2, 3]
    assert re.fullmatch(r"1 at a time: trained on \d.* examples a second", lines[2])
    if memory == 2:
        refused = [line for line in lines if "are too many for the device's memory; made with fewer" in line]
        assert len(refused) == 5
    else:
        assert any(line.startswith("5 at a time: ") for line in lines)


def test_a_word_that_is_no_number_is_refused(tmp_path):
    path = write(tmp_path, "seeds(2)")
    status, _, err = finish(start(path, tmp_path / "runs", "--vectorize=all"))
    assert (status, err.strip()) == (2, "sweep.py: --vectorize all: expected auto or a number from 1")
