"""When a loss rose and how often it jumped, on curves whose answer is known."""

import math
import random

import pytest

from sigmarep.diagnostics import curves

STEPS = list(range(10, 1010, 10))


def falling(noise=0.0):
    random.seed(0)
    return [2.0 * math.exp(-i / 30) + 0.5 + noise * random.gauss(0, 1) for i in range(100)]


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.2])
def test_a_loss_that_falls_never_rose_however_noisy(noise):
    assert curves.rise(STEPS, falling(noise)) is None


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_a_loss_that_rises_rose_where_it_left_the_lowest(noise):
    losses = falling(noise)
    losses[60:] = [loss + 1.0 for loss in losses[60:]]
    assert curves.rise(STEPS, losses) == STEPS[60]


def test_one_high_loss_is_no_rise_and_three_of_five_are():
    losses = [1.0] * 30
    losses[10] = 9.0
    assert curves.rise(STEPS[:30], losses) is None
    losses[12] = losses[14] = 9.0
    assert curves.rise(STEPS[:30], losses) == STEPS[10]


@pytest.mark.parametrize(
    ("losses", "step"),
    [
        ([], None),
        ([math.nan], 1),
        ([math.inf, 1.0], 1),
        ([2.0], None),
        ([2.0, math.nan], 2),
        ([2.0, 2.0, 2.0, math.inf], 4),
        ([2.0] * 9 + [math.nan], 10),
    ],
)
def test_few_losses_and_broken_ones(losses, step):
    assert curves.rise(range(1, len(losses) + 1), losses) == step


def test_the_spike_score_is_the_share_of_values_seven_deviations_off():
    random.seed(1)
    values = [random.gauss(1000.0, 1.0) for _ in range(220)]
    assert curves.spike_score(values) == 0
    values[100] += 20
    values[150] -= 40
    # Twenty values come before the first that is judged.
    assert curves.spike_score(values) == pytest.approx(100 * 2 / 200)


def test_only_the_last_thousand_values_count():
    # 1 and 3 in turn: mean 2, deviation 1; a thousand zeros and ones later, mean 0.5 and deviation 0.5.
    values = [1.0, 3.0] * 100 + [0.0, 1.0] * 500
    # 5 is nine deviations from the last thousand alone, four from all.
    assert curves.spike_score([*values, 5.0]) == pytest.approx(100 / 1181)


def test_values_that_are_no_numbers_are_spikes_and_constants_are_not():
    assert curves.spike_score([1.0] * 39 + [math.nan]) == pytest.approx(100 / 20)
    assert curves.spike_score([1.0] * 40) == 0
    assert math.isnan(curves.spike_score([1.0] * 20))
    assert math.isnan(curves.spike_score([]))


def test_a_loss_of_twice_its_start_rose_however_wild_it_is():
    losses = [2.3, 307.0, 657.0, 101.0, 720.0, 180.0, 160.0, 34.0, 94.0]
    assert curves.rise(range(1, 10), losses) == 2
