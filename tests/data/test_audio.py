"""Reading sound, resampling, log-mel features against their definition, and the masks of SpecAugment."""

import concurrent.futures
import math
import re
import struct
import tracemalloc

import numpy as np
import pytest
import soundfile

from sigmarep.data.audio import features as audio
from sigmarep.errors import BadInput


def defined(samples, *, rate=16000, filters=80, window=400, hop=160, low=20.0):
    """Kaldi's log-mel features in float64, sum by sum: a direct transform, each filter a loop."""
    size = 1
    while size < window:
        size *= 2
    turn = np.exp(-2j * np.pi * np.outer(np.arange(size // 2 + 1), np.arange(window)) / size)

    def mel(f):
        return 1127 * math.log(1 + f / 700)

    step = (mel(rate / 2) - mel(low)) / (filters + 1)
    rows = []
    start = 0
    while start + window <= len(samples):
        frame = [32768 * float(x) for x in samples[start : start + window]]
        mean = sum(frame) / window
        frame = [x - mean for x in frame]
        frame = [x - 0.97 * (frame[i - 1] if i else x) for i, x in enumerate(frame)]
        frame = [x * (0.5 - 0.5 * math.cos(2 * math.pi * i / (window - 1))) ** 0.85 for i, x in enumerate(frame)]
        power = np.abs(turn @ np.array(frame)) ** 2
        row = []
        for number in range(filters):
            left, centre, right = (mel(low) + step * (number + i) for i in range(3))
            total = 0.0
            for i in range(size // 2 + 1):
                at = mel(i * rate / size)
                if left < at < right:
                    total += power[i] * ((at - left) if at <= centre else (right - at)) / step
            row.append(math.log(max(total, 2.0**-23)))
        rows.append(row)
        start += hop
    return np.array(rows)


def noise(count, seed=0, scale=0.1):
    return (scale * np.random.default_rng(seed).standard_normal(count)).astype(np.float32)


@pytest.mark.parametrize("offset", [0.0, 0.3])
def test_log_mel_is_its_definition(offset):
    samples = noise(2900) * np.linspace(0.01, 1, 2900, dtype=np.float32) + np.float32(offset)
    found = audio.LogMel()(samples)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, defined(samples), rtol=1e-3, atol=1e-3)


def test_log_mel_of_another_rate_and_number_of_filters():
    samples = noise(1000, seed=1)
    features = audio.LogMel(sample_rate=8000, num_filters=23, low_hz=100.0)
    assert (features.window, features.hop, features.fft_size) == (200, 80, 256)
    expected = defined(samples, rate=8000, filters=23, window=200, hop=80, low=100.0)
    np.testing.assert_allclose(features(samples), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("samples", "frames"), [(0, 0), (399, 0), (400, 1), (559, 1), (560, 2), (16000, 98), (50000, 311)]
)
def test_frames_lie_wholly_within_the_signal(samples, frames):
    features = audio.LogMel()
    assert features.frames(samples) == frames
    assert features(noise(samples)).shape == (frames, 80)


def test_frames_do_not_depend_on_how_long_the_signal_is():
    samples = noise(160 * 600)
    features = audio.LogMel()
    np.testing.assert_allclose(features(samples)[500:], features(samples[160 * 500 :]), atol=1e-4)


def test_silence_is_finite_and_integers_are_the_same_signal():
    features = audio.LogMel()
    np.testing.assert_allclose(features(np.zeros(1000, np.float32)), math.log(2.0**-23), rtol=1e-6)
    whole = audio.to_int16(noise(4000))
    np.testing.assert_allclose(features(whole), features(whole / 32768), atol=1e-4)


def test_threads_share_one_instance():
    features = audio.LogMel()
    signals = [noise(20000, seed=i) for i in range(8)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        at_once = list(pool.map(features, signals))
    for signal, found in zip(signals, at_once, strict=True):
        np.testing.assert_array_equal(found, features(signal))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_filters": 400}, "num_filters = 400: expected 1 or more, each wide enough"),
        ({"num_filters": 0}, "num_filters = 0"),
        ({"low_hz": 8000.0}, "low_hz = 8000.0: expected at least 0 and below 8000.0"),
        ({"hop_seconds": 0.0}, "hop_seconds = 0.0"),
        ({"window_seconds": 0.0}, "window_seconds = 0.0"),
        ({"sample_rate": 0}, "sample_rate = 0"),
    ],
)
def test_impossible_features_are_refused(fields, message):
    with pytest.raises(BadInput, match=re.escape(message)):
        audio.LogMel(**fields)


MASKS = {"freq_masks": 0, "freq_width": 10, "time_masks": 0, "time_width": 20, "time_fraction": 1.0}


def bands(masked, features, axis):
    """Lengths of the stretches of rows or columns that were changed, which must hold the mean wholly."""
    changed = masked != features
    whole = changed.all(axis=axis)
    np.testing.assert_array_equal(changed.any(axis=axis), whole)
    np.testing.assert_array_equal(masked[changed], np.float32(features.mean(dtype=np.float64)))
    edges = np.flatnonzero(np.diff(np.concatenate([[0], whole.astype(int), [0]])))
    return (edges[1::2] - edges[::2]).tolist()


@pytest.mark.parametrize(("kind", "axis", "widest"), [("freq", 0, 10), ("time", 1, 20)])
def test_one_mask_has_every_width_up_to_the_widest_and_changes_nothing_else(kind, axis, widest):
    features = noise(100 * 40).reshape(100, 40)
    widths = set()
    for seed in range(400):
        masked = audio.spec_augment(features, np.random.default_rng(seed), **{**MASKS, f"{kind}_masks": 1})
        found = bands(masked, features, axis)
        assert len(found) <= 1
        widths.add(sum(found))
    assert widths == set(range(widest + 1))


def test_masks_reach_both_ends_and_are_as_many_as_asked():
    features = noise(100 * 40).reshape(100, 40)
    counts, touched = set(), np.zeros(100, bool)
    for seed in range(300):
        masked = audio.spec_augment(features, np.random.default_rng(seed), **{**MASKS, "time_masks": 3})
        counts.add(len(bands(masked, features, 1)))
        touched |= (masked != features).any(axis=1)
    assert max(counts) == 3
    assert touched.all()


def test_time_masks_keep_to_a_fraction_of_a_short_utterance():
    features = noise(30 * 40).reshape(30, 40)
    arguments = {**MASKS, "time_masks": 1, "time_fraction": 0.1}
    widths = {
        sum(bands(audio.spec_augment(features, np.random.default_rng(seed), **arguments), features, 1))
        for seed in range(100)
    }
    assert widths == {0, 1, 2, 3}


def test_masking_is_reproducible_and_leaves_its_input_alone():
    features = noise(100 * 40).reshape(100, 40)
    before = features.copy()
    arguments = {**MASKS, "freq_masks": 2, "time_masks": 2}
    first, second = (audio.spec_augment(features, np.random.default_rng(5), **arguments) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(features, before)
    assert audio.spec_augment(features[:0], np.random.default_rng(0), **arguments).shape == (0, 40)


@pytest.mark.parametrize("rate", [8000, 22050, 44100])
def test_a_resampled_sine_is_the_sine(rate):
    samples = np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
    found = audio.resampled(samples, rate, 16000)
    assert found.dtype == np.float32
    assert len(found) == 16000
    expected = np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    # The signal is taken to be zero before and after, which the ends show.
    np.testing.assert_allclose(found[200:-200], expected[200:-200], atol=2e-3)


def test_what_is_too_loud_is_clipped():
    assert audio.to_int16(np.array([-2.0, -1.0, 0.0, 0.5, 1.0])).tolist() == [-32768, -32768, 0, 16384, 32767]


@pytest.mark.parametrize(("name", "tolerance"), [("a.wav", 1e-4), ("a.flac", 1e-4), ("a.ogg", 0.1)])
def test_files_are_read_with_their_channels_averaged(name, tolerance, tmp_path):
    time = np.arange(8000) / 8000
    left, right = 0.4 * np.sin(2 * np.pi * 200 * time), 0.2 * np.sin(2 * np.pi * 300 * time)
    soundfile.write(tmp_path / name, np.stack([left, right], axis=1), 8000)
    samples, rate, channels, _ = audio.read(tmp_path / name)
    assert (samples.dtype, samples.shape, rate, channels) == (np.float32, (8000,), 8000, 2)
    np.testing.assert_allclose(samples, (left + right) / 2, atol=tolerance)
    soundfile.write(tmp_path / name, left, 8000)
    assert audio.read(str(tmp_path / name)).channels == 1


def test_unusable_files_are_named(tmp_path):
    (tmp_path / "void.wav").write_bytes(b"")
    (tmp_path / "text.flac").write_text("no sound at all " * 50)
    soundfile.write(tmp_path / "none.wav", np.zeros(0), 8000)
    soundfile.write(tmp_path / "nan.wav", np.array([0.0, np.nan, 0.1]), 8000, subtype="FLOAT")
    (tmp_path / "folder.wav").mkdir()
    for name, message in {
        "void.wav": "cannot be decoded",
        "text.flac": "cannot be decoded",
        "none.wav": "holds no samples",
        "nan.wav": "holds samples that are not finite",
        "absent.wav": "cannot be read (No such file or directory)",
        "folder.wav": "cannot be read (Is a directory)",
    }.items():
        with pytest.raises(audio.AudioError, match=re.escape(f"{tmp_path / name}: {message}")) as raised:
            audio.read(tmp_path / name)
        assert "\n" not in str(raised.value)


def header(path, **values):
    """Overwrites fields of a file's header: the rate of a WAV file, or the number of samples of a FLAC file."""
    content = bytearray(path.read_bytes())
    if "rate" in values:
        content[24:28] = struct.pack("<I", values["rate"])
    if "samples" in values:
        # STREAMINFO begins at byte 8; the number is the lowest 36 bits of its bytes 13 to 17.
        content[21] = content[21] & 0xF0 | values["samples"] >> 32
        content[22:26] = struct.pack(">I", values["samples"] & 0xFFFFFFFF)
    path.write_bytes(content)


@pytest.mark.parametrize("subtype", ["FLOAT", "DOUBLE"])
@pytest.mark.parametrize(
    ("peak", "divisor"), [(1.0, 1.0), (1.5, 1.5), (16.0, 16.0), (17.0, 32768.0), (30000.0, 32768.0)]
)
def test_floats_beyond_one_keep_their_form(peak, divisor, subtype, tmp_path):
    wave = peak * np.sin(np.arange(4000) / 40 * np.pi + np.pi / 2)
    soundfile.write(tmp_path / "a.wav", wave, 16000, subtype=subtype)
    recording = audio.read(tmp_path / "a.wav")
    assert recording.divisor == divisor
    np.testing.assert_allclose(recording.samples, wave / divisor, rtol=1e-6, atol=1e-6)


def test_floats_beyond_the_range_of_16_bits_are_refused(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.array([0.0, 2e6]), 16000, subtype="FLOAT")
    with pytest.raises(audio.AudioError, match=r"a\.wav: holds samples up to 2e\+06; expected floats within 1 or"):
        audio.read(tmp_path / "a.wav")


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("a.wav", {"rate": 1}, "claims 1 Hz; expected 4,000 to 384,000"),
        ("a.wav", {"rate": 2**31 - 1}, "claims 2,147,483,647 Hz; expected 4,000 to 384,000"),
        ("a.flac", {"samples": 2**36 - 1}, "claims 68,719,476,735 samples, 8,589,935 s; expected at most 21,600 s and"),
        # Within the limits; only what is present is read.
        ("a.flac", {"samples": 2**27}, "cannot be decoded"),
        ("a.flac", {"samples": 900}, "cannot be decoded"),
    ],
)
def test_claims_of_a_header_cost_no_memory(name, values, message, tmp_path):
    soundfile.write(tmp_path / name, noise(800), 8000)
    header(tmp_path / name, **values)
    tracemalloc.start()
    with pytest.raises(audio.AudioError, match=re.escape(f"{tmp_path / name}: {message}")):
        audio.read(tmp_path / name)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 30e6


def test_a_cut_mp3_is_refused(tmp_path):
    soundfile.write(tmp_path / "a.mp3", noise(40000), 16000)
    assert audio.read(tmp_path / "a.mp3").samples.shape == (40000,)
    content = (tmp_path / "a.mp3").read_bytes()
    (tmp_path / "a.mp3").write_bytes(content[: len(content) // 2])
    with pytest.raises(audio.AudioError, match=r"a\.mp3: cannot be decoded \(truncated: [\d,]+ of 40,000 samples"):
        audio.read(tmp_path / "a.mp3")


def test_many_blocks_are_one_recording(tmp_path):
    samples = np.stack([noise(audio.READ_BLOCK, seed) for seed in (0, 1)], axis=1)
    soundfile.write(tmp_path / "a.wav", samples, 16000, subtype="FLOAT")
    np.testing.assert_array_equal(audio.read(tmp_path / "a.wav").samples, samples.mean(axis=1))
