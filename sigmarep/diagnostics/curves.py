"""What a curve of losses says by itself: when it rose, and how often it jumped."""

import collections
import itertools
import math
import statistics
from collections.abc import Sequence

# The running median that says whether a loss rose is over so many logged points.
WINDOW = 5
# The loss rose if that median exceeds its lowest value by this many typical jumps between neighbours, and by this share of
# the first loss.
JUMPS = 3.0
SHARE = 0.02
# OLMo 2's spike score.
SPIKE_WINDOW = 1000
SPIKE_DEVIATIONS = 7.0
# Deviations of fewer points than these say nothing.
SPIKE_LEAST = 20


def rise(steps: Sequence[int], losses: Sequence[float]) -> int | None:
    """The step at which the loss rose first; None if it never did.

    The median of the last `WINDOW` losses is held against the lowest such median before. What it must exceed is in
    `JUMPS` and `SHARE`; the step is that of the first loss of the window above it. A loss that is no number is above
    everything.
    """
    losses = [loss if math.isfinite(loss) else math.inf for loss in losses]
    if not losses or math.inf in losses[:1]:
        return steps[0] if losses else None
    finite = [loss for loss in losses if loss < math.inf]
    jumps = [abs(b - a) for a, b in itertools.pairwise(finite)]
    margin = max(JUMPS * statistics.median(jumps) if jumps else 0.0, SHARE * abs(losses[0]))
    lowest = losses[0]
    for end in range(WINDOW, len(losses) + 1):
        window = losses[end - WINDOW : end]
        middle = statistics.median(window)
        if middle > lowest + margin:
            above = next(i for i, loss in enumerate(window) if loss > lowest + margin)
            return steps[end - WINDOW + above]
        lowest = min(lowest, middle)
    # The last losses may be too few for the median.
    return steps[losses.index(math.inf)] if math.inf in losses else None


def spike_score(values: Sequence[float]) -> float:
    """The share of values at least 7 standard deviations from the mean of the 1000 before them, in per cent (OLMo 2, 2025).

    Fewer earlier values serve where there are no 1000, but not fewer than `SPIKE_LEAST`. A value that is not finite is a
    spike, and is left out of the means. NaN without any value that has enough before it.
    """
    earlier: collections.deque[float] = collections.deque()
    origin = next((value for value in values if math.isfinite(value)), 0.0)
    total = squares = 0.0
    spikes = counted = 0
    for value in values:
        if not math.isfinite(value):
            spikes, counted = spikes + 1, counted + 1
            continue
        # Sums relative to the first value: its size costs no precision.
        value -= origin
        if len(earlier) >= SPIKE_LEAST:
            mean = total / len(earlier)
            deviation = math.sqrt(max(squares / len(earlier) - mean**2, 0.0))
            counted += 1
            spikes += abs(value - mean) > 0 and abs(value - mean) >= SPIKE_DEVIATIONS * deviation
        earlier.append(value)
        total, squares = total + value, squares + value**2
        if len(earlier) > SPIKE_WINDOW:
            gone = earlier.popleft()
            total, squares = total - gone, squares - gone**2
    return 100 * spikes / counted if counted else math.nan
