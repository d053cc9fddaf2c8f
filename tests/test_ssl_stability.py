"""Loss spikes as scripts/ssl_stability.py counts them."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

CASES = {
    "a falling loss has none": ([5 - 0.01 * i for i in range(100)], 0),
    "a rise of a twentieth is none": ([1.0] * 30 + [1.05] + [1.0] * 30, 0),
    "one stretch counts once": ([1.0] * 30 + [1.2, 1.5, 1.2] + [1.0] * 30, 1),
    "two stretches count twice": ([1.0] * 30 + [1.2] + [1.0] * 5 + [1.2] + [1.0] * 5, 2),
    "a step up that stays is one": ([1.0] * 30 + [2.0] * 30, 1),
    "the first twenty steps are not judged": ([1.0, 9.0] * 10, 0),
    "a loss that is no number is one": ([1.0] * 30 + [float("nan")], 1),
}


@pytest.fixture(scope="module")
def counted():
    """The spikes of all cases, counted in a process of its own: the script defines flags."""
    code = (
        "import runpy; from math import nan; spikes = runpy.run_path('scripts/ssl_stability.py')['spikes']; "
        f"print([spikes(losses) for losses in {[losses for losses, _ in CASES.values()]!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return dict(zip(CASES, eval(done.stdout), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_spikes_are_stretches_well_above_what_came_before(case, counted):
    assert counted[case] == CASES[case][1]
