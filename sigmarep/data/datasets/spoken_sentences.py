"""Synthesised English speech: phrases of Python's reference pages spoken by the synthesiser espeak-ng.

Nobody speaks here: an error rate on this set says that a recogniser learns, not how well it would hear people.

The text is some two thousand distinct phrases of two to six words, of the letters a to z and the apostrophe, out of
the pages of `sigmarep.data.datasets.python_docs`; those of the most frequent words are taken. A voice is an accent and a
speaker of espeak-ng; rate and pitch of every utterance follow from a hash of its name, and so does the sound, to the
last bit, on one build of the library.

- train: phrases spoken by training voices.
- dev: other phrases spoken by training voices, for choosing how to decode.
- test_sentences: held-out phrases spoken by training voices.
- test: the same held-out phrases spoken by held-out speakers.

No phrase of one of these three sets of phrases is one of another, stands within one or holds one. Shared are words,
pairs of words, the synthesiser, and the accents: a held-out speaker has them too.

The wheel `espeakng-loader` (GPL 3, part of the extra "packaged") brings the library; the text is of the PSF licence.
"""

import ctypes
import re
import sys
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from sigmarep.data import splitting
from sigmarep.data.audio import features
from sigmarep.errors import BadInput

RATE = 16000
ACCENTS = ("en", "en-us", "en-us-nyc", "en-gb-x-rp", "en-gb-x-gbclan", "en-gb-scotland")
SPEAKERS = ("m1", "m2", "m3", "m5", "m6", "m8", "f1", "f2", "f4", "f5", "klatt2", "klatt4")
HELD_OUT_SPEAKERS = ("m4", "m7", "f3", "klatt3")
# Words a minute, and espeak-ng's scale of pitch, on which 50 is the speaker's own.
WORDS_PER_MINUTE = (110, 180)
PITCH = (35, 65)
# A phrase ends at punctuation, and before a word that begins another.
PHRASE_END = re.compile(
    r"[.,;:()?!]+(?:\s|$)|\s\(|\s-+\s|\s(?=(?:and|or|but|that|which|where|when|while|if|unless|because|as|by|for|from"
    r"|in|on|than|to|with|without)\s)"
)
WORD = re.compile(r"[a-z]+(?:'[a-z]+)?")
# Listings, grammars and sessions of the interpreter.
NOT_PROSE = re.compile(r"\s{5,}|\s*(?:>>>|\.\.\.|\(Pdb\))|.*::=")
# `espeak_ERROR`, `espeak_AUDIO_OUTPUT` and parameters of espeak-ng's speak_lib.h.
SYNCHRONOUS, DO_NOT_EXIT, UTF8, BY_CHARACTER, SPEED, PITCH_PARAMETER = 2, 0x8000, 1, 1, 1, 3


class Utterance(NamedTuple):
    """What is said; `voice` is an accent, "+" and a speaker."""

    text: str
    voice: str


class SpokenSentences(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of the utterances; needs the wheel `espeakng-loader` and no TensorFlow.

    Args:
      sentences: how many distinct phrases to take at most.
      held_out: how many of them to hold out for testing.
      chosen_on: how many of them to hold out for "dev"; some are dropped, see the module docstring.
      repeats: how many voices speak each phrase of training.
    """

    name = "spoken_sentences"
    # The text is another one with every version of Python; the last digit is this builder's own.
    VERSION = tfds.core.Version("{}.{}.{}1".format(*sys.version_info[:3]))
    RELEASE_NOTES = {str(VERSION): "The help of this Python; the split dev."}  # noqa: RUF012

    def __init__(
        self, *, sentences: int = 2500, held_out: int = 300, chosen_on: int = 150, repeats: int = 2, **options
    ):
        self._sizes = (sentences, held_out, chosen_on, repeats)
        super().__init__(**options)

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "audio": tfds.features.Tensor(shape=(None,), dtype=np.int16),
                    **{name: tfds.features.Text() for name in ("text", "speaker", "id")},
                }
            ),
            homepage="https://github.com/espeak-ng/espeak-ng",
        )

    def _split_generators(self, dl_manager):
        from pydoc_data.topics import topics

        count, held_out, chosen_on, repeats = self._sizes
        training, development, testing = split(phrases(topics.values(), count), held_out, chosen_on)
        voices = [f"{accent}+{speaker}" for accent in ACCENTS for speaker in SPEAKERS]
        others = [f"{accent}+{speaker}" for accent in ACCENTS for speaker in HELD_OUT_SPEAKERS]
        return {
            "train": self._generate_examples("train", cast(training, voices, repeats)),
            "dev": self._generate_examples("dev", cast(development, voices, 1)),
            "test_sentences": self._generate_examples("test_sentences", cast(testing, voices, 1)),
            "test": self._generate_examples("test", cast(testing, others, 1)),
        }

    def _generate_examples(self, name, utterances):
        for i, utterance in enumerate(utterances):
            example = {"audio": spoken(utterance), "text": utterance.text, "speaker": utterance.voice}
            yield i, {**example, "id": f"{name}-{i:05}"}


def phrases(pages: Iterable[str], count: int) -> list[str]:
    """At most `count` distinct phrases of the pages in alphabetical order: those whose rarest word is the most frequent."""
    found: set[str] = set()
    frequency: Counter[str] = Counter()
    for page in pages:
        frequency.update(WORD.findall(page.lower()))
        for paragraph in re.split(r"\n\s*\n", page):
            if any(NOT_PROSE.match(line) for line in paragraph.split("\n")):
                continue
            for piece in PHRASE_END.split(" ".join(paragraph.split())):
                words = piece.strip().lower().split()
                # Single letters other than these are names of variables.
                if 2 <= len(words) <= 6 and all(WORD.fullmatch(w) and (len(w) > 1 or w in "ai") for w in words):
                    found.add(" ".join(words))
    rarest = {phrase: min(frequency[word] for word in phrase.split()) for phrase in found}
    kept = sorted(found, key=lambda phrase: (-rarest[phrase], splitting.fraction(phrase)))[:count]
    return sorted(kept)


def split(found: list[str], held_out: int, chosen_on: int) -> tuple[list[str], list[str], list[str]]:
    """Phrases for training, for choosing and for testing: `held_out` for testing; of the next `chosen_on` for choosing
    those that hold none of them and stand in none of them; of the others for training those of which the same holds.
    """
    order = sorted(found, key=splitting.fraction)
    testing = order[:held_out]
    development = apart(order[held_out : held_out + chosen_on], testing)
    training = apart(order[held_out + chosen_on :], [*testing, *development])
    return sorted(training), sorted(development), sorted(testing)


def apart(found: list[str], others: list[str]) -> list[str]:
    """The phrases that are none of the others, hold none of them and stand in none of them."""
    runs, chosen = {run for phrase in others for run in _runs(phrase)}, set(others)
    return [phrase for phrase in found if phrase not in runs and not chosen & _runs(phrase)]


def cast(texts: list[str], voices: list[str], repeats: int) -> list[Utterance]:
    """Every text with `repeats` of the voices, chosen by a hash of the text."""
    found = []
    for text in texts:
        order = {voice: splitting.fraction(f"{voice} {text}") for voice in voices}
        found += [Utterance(text, voice) for voice in sorted(voices, key=order.__getitem__)[:repeats]]
    return found


def spoken(utterance: Utterance) -> np.ndarray:
    """int16 samples (n,) at 16 kHz.

    Raises:
      BadInput: espeak-ng is missing, or does not know the voice.
    """
    key = f"{utterance.voice} {utterance.text}"
    rate = _between(WORDS_PER_MINUTE, f"rate {key}")
    samples, sample_rate = _synthesised(utterance, rate, _between(PITCH, f"pitch {key}"))
    return features.to_int16(features.resampled(samples / features.FULL_SCALE, sample_rate, RATE))


def _runs(phrase: str) -> set[str]:
    words = phrase.split()
    return {" ".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1)}


def _between(ends: tuple[int, int], key: str) -> int:
    return ends[0] + int(splitting.fraction(key) * (ends[1] - ends[0] + 1))


def _synthesised(utterance: Utterance, words_per_minute: int, pitch: int) -> tuple[np.ndarray, int]:
    """int16 samples and their rate."""
    try:
        import _ctypes

        import espeakng_loader
    except ImportError:
        raise BadInput(
            "config.data.name = 'spoken_sentences': needs espeak-ng; pip install \"sigmarep[packaged]\""
        ) from None
    # Loaded anew for every utterance (some milliseconds): the library keeps phases and the state of its noise from one
    # call to the next, so that the sound would depend on what was said before.
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    try:
        folder = espeakng_loader.get_data_path()
        sample_rate = library.espeak_Initialize(SYNCHRONOUS, 0, folder.encode(), DO_NOT_EXIT)
        if sample_rate <= 0:
            raise BadInput(f"espeak-ng does not start with the data in {folder}; its path may be too long")
        pieces: list[bytes] = []

        @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
        def receive(samples, count, events):
            if samples and count > 0:
                pieces.append(ctypes.string_at(samples, 2 * count))
            return 0

        library.espeak_SetSynthCallback(receive)
        # Otherwise the noise of breath follows from the time of day.
        library.espeak_ng_SetRandSeed(ctypes.c_long(1))
        if library.espeak_SetVoiceByName(utterance.voice.encode()):
            raise BadInput(f"espeak-ng has no voice {utterance.voice!r}")
        library.espeak_SetParameter(SPEED, words_per_minute, 0)
        library.espeak_SetParameter(PITCH_PARAMETER, pitch, 0)
        text = utterance.text.encode()
        library.espeak_Synth(text, ctypes.c_size_t(len(text) + 1), 0, BY_CHARACTER, 0, UTF8, None, None)
        library.espeak_Terminate()
    finally:
        _ctypes.dlclose(library._handle)
    return np.frombuffer(b"".join(pieces), np.int16), sample_rate
