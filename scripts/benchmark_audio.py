"""Times the computation of audio features in one thread: seconds of audio per second of a processor core.

    python scripts/benchmark_audio.py [--seconds 10] [--utterances 20] [--repeats 15]

The audio is random noise with a syllable-like envelope. Features with and without SpecAugment alternate; printed are
medians over repeats.
"""

import os
import statistics
import time
from collections.abc import Callable

# numpy reads these variables when it is imported.
os.environ.update({f"{library}_NUM_THREADS": "1" for library in ("OPENBLAS", "OMP", "MKL")})

from absl import flags

from sigmarep import command

SECONDS = flags.DEFINE_float("seconds", 10.0, "Length of an utterance.", lower_bound=0.1)
UTTERANCES = flags.DEFINE_integer("utterances", 20, "Utterances per repeat.", lower_bound=1)
REPEATS = flags.DEFINE_integer("repeats", 15, "Number of timings of each contender.", lower_bound=1)


def main() -> None:
    import numpy as np

    from sigmarep.data.audio import features

    filterbank = features.LogMel()
    rng = np.random.default_rng(0)
    count = round(SECONDS.value * filterbank.sample_rate)
    # Four syllables a second.
    envelope = np.abs(np.sin(2 * np.pi * 2 * np.arange(count) / filterbank.sample_rate))
    signals = [(0.1 * envelope * rng.standard_normal(count)).astype(np.float32) for _ in range(UTTERANCES.value)]

    def augmented(signal: np.ndarray) -> np.ndarray:
        spectrum = filterbank(signal)
        return features.spec_augment(
            spectrum, rng, freq_masks=2, freq_width=27, time_masks=2, time_width=100, time_fraction=1.0
        )

    contenders: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "log-mel": filterbank,
        "log-mel and SpecAugment": augmented,
    }
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(REPEATS.value + 1):
        for name, function in contenders.items():
            start = time.process_time()
            for signal in signals:
                function(signal)
            # The first round fills caches.
            if repeat:
                speeds[name].append(SECONDS.value * len(signals) / (time.process_time() - start))
    print(
        f"{os.cpu_count()} CPU cores, 1 thread, {UTTERANCES.value} utterances of {SECONDS.value:g} s at "
        f"{filterbank.sample_rate} Hz, {filterbank.num_filters} filters, median of {REPEATS.value}"
    )
    for name, each in speeds.items():
        print(f"{name}: {statistics.median(each):,.0f} × real time ({min(each):,.0f} to {max(each):,.0f})")


if __name__ == "__main__":
    command.run(main)
