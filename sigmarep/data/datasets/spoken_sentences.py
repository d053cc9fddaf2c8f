"""Synthesized English speech: phrases of Python's reference pages, spoken by the synthesizer espeak-ng.

No person speaks here: an error rate on this set tells that a recognizer learns, not how well it would recognize people.

The text consists of some two thousand distinct phrases of two to six words, of the letters a to z and the apostrophe,
from the pages of `sigmarep.data.datasets.python_docs`; phrases with the most frequent words are chosen. A voice is an
accent and a speaker of espeak-ng. A hash of voice and text determines rate and pitch of an utterance, and with them,
for one build of the library, every bit of the sound.

- train: phrases spoken by training voices.
- dev: other phrases spoken by training voices, for choosing decoding options.
- test_sentences: held-out phrases spoken by training voices.
- test: the same held-out phrases spoken by held-out speakers.

The phrases of train, dev and test are disjoint, and none contains a phrase of another set. The sets share words, pairs
of words, the synthesizer, and the accents, which held-out speakers use too.

The library comes with the wheel `espeakng-loader` (GPL 3, part of the extra "packaged"); the text has the PSF license.
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
# Ranges of the rate, and of the pitch on espeak-ng's scale, where 50 is the speaker's natural pitch.
WORDS_PER_MINUTE = (110, 180)
PITCH = (35, 65)
# A phrase ends at punctuation and before conjunctions and prepositions.
PHRASE_END = re.compile(
    r"[.,;:()?!]+(?:\s|$)|\s\(|\s-+\s|\s(?=(?:and|or|but|that|which|where|when|while|if|unless|because|as|by|for|from"
    r"|in|on|than|to|with|without)\s)"
)
WORD = re.compile(r"[a-z]+(?:'[a-z]+)?")
# Listings, interpreter sessions and grammars.
NOT_PROSE = re.compile(r"\s{5,}|\s*(?:>>>|\.\.\.|\(Pdb\))|.*::=")
# `espeak_ERROR`, `espeak_AUDIO_OUTPUT` and parameters of espeak-ng's speak_lib.h.
SYNCHRONOUS, DO_NOT_EXIT, UTF8, BY_CHARACTER, SPEED, PITCH_PARAMETER = 2, 0x8000, 1, 1, 1, 3


class Utterance(NamedTuple):
    """A text and the voice that speaks it: an accent, "+" and a speaker."""

    text: str
    voice: str


def version(python: tuple[int, int, int]) -> str:
    """The version of the data set that a version of Python has: each has its own text, and the last digit is the builder's.
    A number, because a version must not begin a part with a zero."""
    major, minor, patch = python
    return f"{major}.{minor}.{10 * patch + 1}"


class SpokenSentences(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of the utterances; needs the wheel `espeakng-loader` and no TensorFlow.

    Args:
      sentences: largest number of distinct phrases.
      held_out: number of phrases for testing.
      chosen_on: number of phrases for "dev", before those that contain a phrase for testing are dropped.
      repeats: number of voices that speak each training phrase.
    """

    name = "spoken_sentences"
    VERSION = tfds.core.Version(version(sys.version_info[:3]))
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
    """Chooses at most `count` distinct phrases of the pages, those whose rarest word is most frequent; sorted."""
    candidates: set[str] = set()
    frequency: Counter[str] = Counter()
    for page in pages:
        frequency.update(WORD.findall(page.lower()))
        for paragraph in re.split(r"\n\s*\n", page):
            if any(NOT_PROSE.match(line) for line in paragraph.split("\n")):
                continue
            for piece in PHRASE_END.split(" ".join(paragraph.split())):
                words = piece.strip().lower().split()
                # Other single letters are names of variables.
                if 2 <= len(words) <= 6 and all(WORD.fullmatch(w) and (len(w) > 1 or w in "ai") for w in words):
                    candidates.add(" ".join(words))
    rarest = {phrase: min(frequency[word] for word in phrase.split()) for phrase in candidates}
    return sorted(sorted(candidates, key=lambda phrase: (-rarest[phrase], splitting.fraction(phrase)))[:count])


def split(texts: list[str], held_out: int, chosen_on: int) -> tuple[list[str], list[str], list[str]]:
    """Splits phrases by their hash into training, dev and test.

    The first `held_out` phrases are for testing, the next `chosen_on` for dev, the others for training. Phrases of dev
    and training that contain a phrase of a later set in this list, or are part of one, are dropped.
    """
    order = sorted(texts, key=splitting.fraction)
    testing = order[:held_out]
    development = apart(order[held_out : held_out + chosen_on], testing)
    training = apart(order[held_out + chosen_on :], [*testing, *development])
    return sorted(training), sorted(development), sorted(testing)


def apart(texts: list[str], others: list[str]) -> list[str]:
    """Phrases that neither contain one of the others nor are part of one."""
    runs, chosen = {run for phrase in others for run in _runs(phrase)}, set(others)
    return [phrase for phrase in texts if phrase not in runs and not chosen & _runs(phrase)]


def cast(texts: list[str], voices: list[str], repeats: int) -> list[Utterance]:
    """Assigns `repeats` voices to every text, by a hash of voice and text."""
    utterances = []
    for text in texts:
        order = {voice: splitting.fraction(f"{voice} {text}") for voice in voices}
        utterances += [Utterance(text, voice) for voice in sorted(voices, key=order.__getitem__)[:repeats]]
    return utterances


def spoken(utterance: Utterance) -> np.ndarray:
    """Synthesizes an utterance as int16 samples (n,) at 16 kHz.

    Raises:
      BadInput: espeak-ng is missing or does not know the voice.
    """
    key = f"{utterance.voice} {utterance.text}"
    rate = _between(WORDS_PER_MINUTE, f"rate {key}")
    samples, sample_rate = _synthesized(utterance, rate, _between(PITCH, f"pitch {key}"))
    return features.to_int16(features.resampled(samples / features.FULL_SCALE, sample_rate, RATE))


def _runs(phrase: str) -> set[str]:
    words = phrase.split()
    return {" ".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1)}


def _between(ends: tuple[int, int], key: str) -> int:
    return ends[0] + int(splitting.fraction(key) * (ends[1] - ends[0] + 1))


def _synthesized(utterance: Utterance, words_per_minute: int, pitch: int) -> tuple[np.ndarray, int]:
    """Returns int16 samples (n,) and their rate in Hz."""
    try:
        import _ctypes

        import espeakng_loader
    except ImportError:
        raise BadInput(
            "config.data.name = 'spoken_sentences': needs espeak-ng; pip install \"sigmarep[packaged]\""
        ) from None
    # Loaded again for every utterance (some milliseconds): the library keeps phases and the state of its noise between
    # calls, so that the sound would depend on earlier utterances.
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
        # Otherwise breath noise depends on the time of day.
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
