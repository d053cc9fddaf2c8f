"""Statistics of a single loss curve: the step at which it rose, its end, and its spike score."""

import collections
import itertools
import math
import statistics
from collections.abc import Sequence

# Number of logged points in the running median that decides whether a loss rose.
WINDOW = 5
# The loss rose if that median exceeds its lowest value by this many median differences of successive losses, and by this
# share of the first loss; or by the first loss itself, whatever the differences are.
JUMPS = 3.0
SHARE = 0.02
# OLMo 2's spike score.
SPIKE_WINDOW = 1000
SPIKE_DEVIATIONS = 7.0
# Fewest values from which a standard deviation is taken.
SPIKE_LEAST = 20
# The loss at the end is the mean of this share of the logged losses.
END = 10


def tenth(count: int) -> int:
    """Number of the last of `count` logged losses that make the loss at the end: a tenth, at least one."""
    return max(count // END, 1)


def at_end(losses: Sequence[float]) -> float:
    """The loss at the end, by which runs are judged: the mean of the last tenth of the logged losses.

    ∞ if one of these is not finite, or none is logged.
    """
    last = losses[-tenth(len(losses)) :]
    return statistics.mean(last) if last and all(map(math.isfinite, last)) else math.inf


def span(values: Sequence[float], digits: int = 4) -> str:
    """The values in words: `low to high`, or one number where they agree in so many digits."""
    low, high = f"{min(values):.{digits}g}", f"{max(values):.{digits}g}"
    return low if low == high else f"{low} to {high}"


def rise(steps: Sequence[int], losses: Sequence[float]) -> int | None:
    """Finds the step at which the loss first rose; None if it never did.

    The loss rose if the median of `WINDOW` successive losses exceeds the lowest such median before by the margin of
    `JUMPS` and `SHARE`. The step is that of the first loss in the window above the margin. A loss that is not finite is
    above everything.
    """
    losses = [loss if math.isfinite(loss) else math.inf for loss in losses]
    if not losses or math.inf in losses[:1]:
        return steps[0] if losses else None
    finite = [loss for loss in losses if loss < math.inf]
    jumps = [abs(b - a) for a, b in itertools.pairwise(finite)]
    margin = max(JUMPS * statistics.median(jumps) if jumps else 0.0, SHARE * abs(losses[0]))
    margin = min(margin, abs(losses[0])) if losses[0] else margin
    lowest = losses[0]
    for end in range(WINDOW, len(losses) + 1):
        window = losses[end - WINDOW : end]
        middle = statistics.median(window)
        if middle > lowest + margin:
            above = next(i for i, loss in enumerate(window) if loss > lowest + margin)
            return steps[end - WINDOW + above]
        lowest = min(lowest, middle)
    # The last losses may be too few to move the median.
    return steps[losses.index(math.inf)] if math.inf in losses else None


def spike_score(values: Sequence[float]) -> float:
    """Percentage of values at least 7 standard deviations from the mean of the 1000 values before them (OLMo 2, 2025).

    Near the start fewer values serve, but at least `SPIKE_LEAST`. A value that is not finite is a spike and does not enter
    the means. NaN if no value has enough values before it.
    """
    earlier: collections.deque[float] = collections.deque()
    origin = next((value for value in values if math.isfinite(value)), 0.0)
    total = squares = 0.0
    spikes = counted = 0
    for value in values:
        if not math.isfinite(value):
            spikes, counted = spikes + 1, counted + 1
            continue
        # Sums are relative to the first value, so that its magnitude costs no precision.
        value -= origin
        if len(earlier) >= SPIKE_LEAST:
            mean = total / len(earlier)
            deviation = math.sqrt(max(squares / len(earlier) - mean * mean, 0.0))
            counted += 1
            spikes += abs(value - mean) > 0 and abs(value - mean) >= SPIKE_DEVIATIONS * deviation
        earlier.append(value)
        total, squares = total + value, squares + value * value
        if len(earlier) > SPIKE_WINDOW:
            oldest = earlier.popleft()
            total, squares = total - oldest, squares - oldest * oldest
    return 100 * spikes / counted if counted else math.nan
