"""Audio: reading files, resampling, log-mel filterbank features and SpecAugment."""

import dataclasses
import functools
import math
import os
import re
import struct
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from sigmarep.errors import BadInput

# As in Kaldi, features are computed from samples in the range of 16-bit integers.
FULL_SCALE = 32768.0
# Lower bound of mel energies before the logarithm.
FLOOR = float(np.finfo(np.float32).eps)
# Floats above 1 and up to this are taken for an overshoot, larger ones for integers of 16 bits stored as floats.
OVERSHOOT = 16.0
# Rates of recordings that are read, in Hz: half of telephony's to the highest of studio converters.
RATES = (4_000, 384_000)
# Longest recording that is read, in seconds and in samples a channel (2 GiB).
LONGEST_SECONDS = 6 * 3600
MOST_SAMPLES = 2**29
# Samples read at a time.
READ_BLOCK = 2**18
# Samples of a frame of MPEG's layer III; decoders differ by up to two in what they take for padding.
MPEG_FRAME = 1152
# Number of frames transformed together: they fit into a core's cache.
BLOCK = 256


class AudioError(ValueError):
    """Unusable audio; the message names the file and its fault."""


class Recording(NamedTuple):
    """Samples of an audio file.

    Attributes:
      samples: float32 (n,) in [-1, 1], the mean over channels.
      rate: in Hz.
      channels: number of channels in the file.
      divisor: number that the file's samples were divided by, see `read`; 1.0 for samples within [-1, 1].
    """

    samples: np.ndarray
    rate: int
    channels: int
    divisor: float = 1.0


def read(path: str | os.PathLike) -> Recording:
    """Reads a WAV, FLAC, OGG or MP3 file.

    Files of floats outside [-1, 1] are not clipped: values up to `OVERSHOOT` are divided by the largest, and larger ones,
    in the range of 16-bit integers, by 32,768. Lossy formats may exceed 1 by their decoder's rounding.

    Raises:
      AudioError: the file is missing or truncated, cannot be decoded, has no samples or a sample that is not finite or
        outside the range of 16-bit integers, or claims a rate or a length outside `RATES` and `LONGEST_SECONDS`.
    """
    import soundfile

    try:
        # Opened here because libsndfile reports a missing file as "System error".
        with open(path, "rb") as file:
            _check_length(file)
            # An MPEG stream whose encoder did not write down its length has an estimated one.
            counted = re.search(rb"Xing|Info", file.read(8192)) is not None
            file.seek(0)
            with soundfile.SoundFile(file) as sound:
                estimated = sound.format == "MP3" and not counted
                samples, rate, channels = _mono(sound, estimated=estimated), sound.samplerate, sound.channels
                divisor = _divisor(samples, floats=sound.subtype in ("FLOAT", "DOUBLE"))
    except OSError as error:
        raise AudioError(f"{os.fspath(path)}: cannot be read ({error.strerror or error})") from None
    except _Unusable as error:
        raise AudioError(f"{os.fspath(path)}: {error}") from None
    except MemoryError:
        raise AudioError(f"{os.fspath(path)}: does not fit into memory") from None
    except (soundfile.SoundFileError, RuntimeError, TypeError, ValueError) as error:
        reason = getattr(error, "error_string", "") or str(error)
        raise AudioError(f"{os.fspath(path)}: cannot be decoded ({' '.join(reason.split())})") from None
    return Recording(samples if divisor == 1 else samples / np.float32(divisor), int(rate), channels, divisor)


class _Unusable(Exception):
    """A fault of a recording in words that follow the file's name."""


def _mono(sound: Any, *, estimated: bool) -> np.ndarray:
    """Samples (n,) of an open `soundfile.SoundFile`, the mean over channels.

    Read in blocks, so that memory follows what the file holds and not what its header claims.

    Args:
      estimated: the number of samples that the file claims is no more than an estimate.
    """
    claimed = sound.frames
    if not RATES[0] <= sound.samplerate <= RATES[1]:
        raise _Unusable(f"claims {sound.samplerate:,} Hz; expected {RATES[0]:,} to {RATES[1]:,}")
    if claimed > min(LONGEST_SECONDS * sound.samplerate, MOST_SAMPLES):
        raise _Unusable(
            f"claims {claimed:,} samples, {claimed / sound.samplerate:,.0f} s; expected at most {LONGEST_SECONDS:,} s "
            f"and {MOST_SAMPLES:,} samples"
        )
    blocks: list[np.ndarray] = []
    count, size = 0, max(READ_BLOCK // sound.channels, 1)
    while len(block := sound.read(min(size, max(claimed - count, 1)), dtype="float32", always_2d=True)):
        blocks.append(block[:, 0].copy() if block.shape[1] == 1 else block.mean(axis=1))
        count += len(block)
    if count < claimed - (2 * MPEG_FRAME if sound.format == "MP3" else 0) and not estimated:
        raise ValueError(f"truncated: {count:,} of {claimed:,} samples are present")
    if not count:
        raise _Unusable("holds no samples")
    return np.concatenate(blocks)


def _divisor(samples: np.ndarray, *, floats: bool) -> float:
    """The number that brings `samples` into [-1, 1]; 1.0 for those that were not stored as floats."""
    peak = float(np.abs(samples).max())
    if not math.isfinite(peak):
        raise _Unusable("holds samples that are not finite")
    if not floats:
        return 1.0
    if peak > FULL_SCALE:
        raise _Unusable(f"holds samples up to {peak:.3g}; expected floats within 1 or in the range of 16-bit integers")
    return 1.0 if peak <= 1 else peak if peak <= OVERSHOOT else FULL_SCALE


def _check_length(file: BinaryIO) -> None:
    """Raises ValueError if a WAV file is shorter than its header tells; libsndfile would read the remainder silently."""
    riff, size, wave = struct.unpack("<4sI4s", file.read(12).ljust(12, b"\0"))
    present = file.seek(0, os.SEEK_END) - 8
    file.seek(0)
    # Streaming writers do not know the length and write 0 or the largest number.
    if riff == b"RIFF" and wave == b"WAVE" and present < size < 0xFFFF0000:
        raise ValueError(f"truncated: {present:,} of {size:,} bytes are present")


def resampled(samples: np.ndarray, rate: int, to: int) -> np.ndarray:
    """Resamples (n,) at `rate` Hz to float32 (ceil(n · to / rate),) at `to` Hz, by `scipy.signal.resample_poly`."""
    if rate == to:
        return np.asarray(samples, np.float32)
    from scipy import signal

    common = math.gcd(rate, to)
    return signal.resample_poly(np.asarray(samples, np.float32), to // common, rate // common).astype(np.float32)


def to_int16(samples: np.ndarray) -> np.ndarray:
    """Converts samples in [-1, 1] to int16; values outside are clipped."""
    return np.clip(np.rint(np.asarray(samples) * FULL_SCALE), -FULL_SCALE, FULL_SCALE - 1).astype(np.int16)


@dataclasses.dataclass(frozen=True)
class LogMel:
    """Log-mel filterbank features as Kaldi defines them (`compute-fbank-feats` with --dither=0 and its other defaults).

    Only frames that lie entirely within the signal are used (`snip_edges`). For each frame, with samples in the range of
    16-bit integers: the mean is subtracted; `preemphasis` times the previous sample is subtracted (the first sample
    counts as its own predecessor); the frame is multiplied by the Povey window, a symmetric Hann window to the power
    0.85, and padded with zeros to a power of two. Each filter takes a weighted sum of the power spectrum; the feature is
    the natural logarithm of the sum, which is first floored at 2⁻²³. The filters are triangles of height 1 on the mel
    scale 1127 ln(1 + f / 700), with `num_filters` + 2 corners equally spaced from `low_hz` to half the sample rate.
    Instances are stateless and may be shared by threads.

    >>> LogMel()(np.zeros(16000, np.float32)).shape
    (98, 80)
    """

    sample_rate: int = 16000
    num_filters: int = 80
    window_seconds: float = 0.025
    hop_seconds: float = 0.010
    low_hz: float = 20.0
    preemphasis: float = 0.97

    def __post_init__(self):
        if self.hop < 1 or self.window < 2:
            raise BadInput(
                f"window_seconds = {self.window_seconds}, hop_seconds = {self.hop_seconds}: expected two samples and one "
                f"or more at sample_rate = {self.sample_rate}"
            )
        if not 0 <= self.low_hz < self.sample_rate / 2:
            raise BadInput(f"low_hz = {self.low_hz}: expected at least 0 and below {self.sample_rate / 2}")
        if self.num_filters < 1 or not _filters(self).any(axis=0).all():
            raise BadInput(
                f"num_filters = {self.num_filters}: expected 1 or more, each wide enough to hold one of the "
                f"{self.fft_size // 2} frequencies"
            )

    @property
    def window(self) -> int:
        """Length of a frame in samples."""
        return round(self.window_seconds * self.sample_rate)

    @property
    def hop(self) -> int:
        """Distance between the starts of frames in samples."""
        return round(self.hop_seconds * self.sample_rate)

    @property
    def fft_size(self) -> int:
        """The smallest power of two that holds a frame."""
        return 1 << (self.window - 1).bit_length()

    def frames(self, num_samples: int) -> int:
        """Number of frames of a signal of `num_samples` samples."""
        return 1 + (num_samples - self.window) // self.hop if num_samples >= self.window else 0

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        """Computes features float32 (frames, num_filters) of samples (n,), floats in [-1, 1] or int16."""
        from scipy import fft

        samples = np.asarray(samples)
        scale = 1.0 if np.issubdtype(samples.dtype, np.integer) else FULL_SCALE
        samples = samples.astype(np.float32)
        count = self.frames(len(samples))
        features = np.empty((count, self.num_filters), np.float32)
        if not count:
            return features
        window = np.float32(scale) * _window(self.window)
        filters = _sparse_filters(self)
        framed = np.lib.stride_tricks.sliding_window_view(samples, self.window)[:: self.hop]
        for start in range(0, count, BLOCK):
            block = framed[start : start + BLOCK]
            block = block - block.mean(axis=1, keepdims=True)
            emphasized = block * np.float32(1 - self.preemphasis)
            np.multiply(block[:, :-1], np.float32(-self.preemphasis), out=emphasized[:, 1:])
            emphasized[:, 1:] += block[:, 1:]
            emphasized *= window
            spectrum = fft.rfft(emphasized, self.fft_size, axis=1)
            power = np.square(spectrum.real)
            power += np.square(spectrum.imag)
            features[start : start + BLOCK] = (filters @ np.ascontiguousarray(power.T)).T
        np.maximum(features, np.float32(FLOOR), out=features)
        return np.log(features, out=features)


def spec_augment(
    features: np.ndarray,
    rng: np.random.Generator,
    *,
    freq_masks: int,
    freq_width: int,
    time_masks: int,
    time_width: int,
    time_fraction: float,
) -> np.ndarray:
    """Returns a copy of features (T, F) with bands of filters and stretches of frames set to the mean of all features.

    This is SpecAugment (Park et al. 2019, arXiv:1904.08779) without time warping; `time_fraction` is its p. The width of a
    mask is uniform from 0 to `freq_width` filters, or from 0 to the smaller of `time_width` and `time_fraction` · T
    frames, both ends included; its position is uniform among those where it fits. Masks may overlap.

    Args:
      features: (T, F).
      rng: source of the random numbers.
      freq_masks, time_masks: number of masks.
      freq_width, time_width: largest widths, in filters and frames.
      time_fraction: largest width of a time mask as a share of T.
    """
    masked = features.copy()
    if not features.size:
        return masked
    length, filters = features.shape
    mean = features.mean(dtype=np.float64)
    for _ in range(freq_masks):
        start, width = _mask(rng, filters, freq_width)
        masked[:, start : start + width] = mean
    for _ in range(time_masks):
        start, width = _mask(rng, length, min(time_width, int(time_fraction * length)))
        masked[start : start + width] = mean
    return masked


def _mask(rng: np.random.Generator, size: int, widest: int) -> tuple[int, int]:
    width = int(rng.integers(0, min(widest, size), endpoint=True))
    return int(rng.integers(0, size - width, endpoint=True)), width


@functools.lru_cache(maxsize=16)
def _window(size: int) -> np.ndarray:
    return np.power(0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / (size - 1)), 0.85).astype(np.float32)


def _mel(hertz):
    return 1127.0 * np.log1p(np.asarray(hertz, np.float64) / 700.0)


@functools.lru_cache(maxsize=16)
def _sparse_filters(settings: LogMel) -> Any:
    """The transpose of `_filters` as a sparse array; a few per cent of it are not zero.

    BLAS would spread a dense product over threads of its own, which block each other when several threads compute
    features at once.
    """
    from scipy import sparse

    return sparse.csr_array(_filters(settings).T)


@functools.lru_cache(maxsize=16)
def _filters(settings: LogMel) -> np.ndarray:
    """Weights of the mel filters, float32 (fft_size / 2 + 1, num_filters)."""
    high = settings.sample_rate / 2
    corners = np.linspace(_mel(settings.low_hz), _mel(high), settings.num_filters + 2)
    at = _mel(np.linspace(0, high, settings.fft_size // 2 + 1))[:, None]
    rising = (at - corners[:-2]) / (corners[1:-1] - corners[:-2])
    falling = (corners[2:] - at) / (corners[2:] - corners[1:-1])
    return np.maximum(0, np.minimum(rising, falling)).astype(np.float32)
