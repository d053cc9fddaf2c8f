"""Sounds, and the examples of sets of them, for tests."""

import numpy as np


def rows(source):
    """Examples with their strings decoded."""
    return [
        {name: value.decode() if isinstance(value, bytes) else value for name, value in source[i].items()}
        for i in range(len(source))
    ]


def sine(seconds, rate, channels=1):
    wave = 0.3 * np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate)) / rate)
    return wave if channels == 1 else np.stack([wave] * channels, axis=1)
