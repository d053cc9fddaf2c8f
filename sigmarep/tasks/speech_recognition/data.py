"""The data side of speech recognition: utterances in buckets, and error rates."""

import functools
from typing import Any

import ml_collections
import numpy as np

from sigmarep.data.audio import baselines, labels, speech
from sigmarep.data.pipeline import check_batch_size
from sigmarep.tasks import error_rates, transcripts
from sigmarep.tasks.protocol import Evaluation, Files, TaskData, split_name
from sigmarep.tasks.speech_recognition.model import TRANSCRIPTS, Decoded, SpeechRecognition


def open_data(config: ml_collections.ConfigDict, files: Files | None = None) -> "SpeechRecognitionData":
    """The data side; see `sigmarep.tasks.protocol.Task.open_data`.

    Raises:
      BadInput: a field of `config.data` is wrong, or the data set is not prepared.
    """
    return SpeechRecognitionData(config, files)


class SpeechRecognitionData(TaskData):
    """Batches of utterances; see `sigmarep.tasks.protocol.TaskData`."""

    unit = "seconds"

    def __init__(self, config: ml_collections.ConfigDict, files: Files | None):
        error_rates.check_installed()
        self.config = config
        self.labels = (
            speech.open_labels(config.data)
            if files is None
            else labels.from_bytes(files[labels.FILE], lowercase=config.data.labels.lowercase)
        )

    def open_corpus(self, split: str) -> speech.SpeechCorpus:
        """The utterances of a split."""
        return speech.SpeechCorpus(self.config.data, self.labels, split, stride=self.config.model.conv_stride)

    @functools.cached_property
    def corpus(self) -> speech.SpeechCorpus:
        """Utterances of the training split."""
        return self.open_corpus(self.config.data.train_split)

    @functools.cached_property
    def train_batches(self) -> speech.SpeechBatches:
        """Batches of the training split."""
        batches = self._batches(self.corpus)
        check_batch_size(self.config.batch_size, batches.size)
        return batches

    def _batches(self, corpus):
        c = self.config
        return speech.SpeechBatches(corpus, batch_seconds=c.batch_size, seed=c.seed, stride=c.model.conv_stride)

    @property
    def num_train_examples(self):
        return self.train_batches.batches_per_epoch * self.config.batch_size

    def units_per_step(self):
        return self.train_batches.seconds_per_batch

    def files(self):
        files = speech.run_files(self.labels, self.corpus)
        if self.config.decoding.language_model == "ngram":
            files[TRANSCRIPTS] = "".join(f"{text}\n" for text in self.corpus.texts).encode()
        return files

    def train_stream(self, *, start, process_index, process_count):
        return self.train_batches.stream(start=start, process_index=process_index, process_count=process_count)

    def evaluations(self, model):
        return [self.evaluation(model, split) for split in self.config.data.eval_splits]

    def evaluation(self, model: SpeechRecognition, split: str) -> Evaluation:
        """The evaluation of one split, also of one that `config.data.eval_splits` does not name."""
        corpus = self.open_corpus(split)
        last: list[tuple[Any, Decoded]] = []

        def decoded(results):
            # `finish` and `outputs` are given the same results; a beam search is made once.
            if not last or last[0][0] is not results:
                last[:] = [(results, model.decoded(results))]
            return last[0][1]

        @functools.cache
        def of_baselines():
            return self._baselines(corpus) if self.config.baselines else {}

        def finish(results):
            nats = float(np.sum([result["nll"] for result in results], dtype=np.float64))
            count = float(np.sum([result["count"] for result in results], dtype=np.float64))
            decoding = decoded(results)
            references = [corpus.texts[i] for i in decoding.utterances]
            return {
                # A split without a transcript to align has no loss; NaN would be the model's.
                **({"loss": nats / count} if count else {}),
                **_rates(references, decoding.texts),
                **self._greedy_rates(references, decoding.greedy),
                **of_baselines(),
                "impossible": float(np.sum([result["impossible"] for result in results])) / len(corpus),
                "unknown_characters": float(np.mean(~corpus.scored)),
            }

        def outputs(results):
            decoding = decoded(results)
            return transcripts.outputs(corpus, decoding.utterances, decoding.texts)

        return Evaluation(split_name(split), self._batches(corpus).evaluation, model.evaluate, finish, outputs)

    def _greedy_rates(self, references, greedy) -> dict[str, float]:
        """Beside those of a beam search."""
        if not self.config.decoding.beam_size:
            return {}
        return {f"greedy_{name}": value for name, value in _rates(references, greedy).items() if name in ("wer", "cer")}

    def _baselines(self, corpus) -> dict[str, float]:
        train = self.corpus
        most = baselines.most_frequent(train.texts)
        nearest = baselines.nearest_neighbor(
            [train.features(i) for i in range(len(train))],
            train.texts,
            [corpus.features(i) for i in range(len(corpus))],
        )
        guesses = {"most_frequent": [most] * len(corpus), "nearest_neighbour": nearest}
        return {
            f"{name}_{rate}": value
            for name, texts in guesses.items()
            for rate, value in _rates(corpus.texts, texts).items()
            if rate in ("wer", "cer")
        }


def word_error_rate(corpus: speech.SpeechCorpus, heard: Decoded) -> float:
    """The word error rate of a split as it was decoded."""
    return _rates([corpus.texts[i] for i in heard.utterances], heard.texts)["wer"]


def _rates(references, hypotheses) -> dict[str, float]:
    words = error_rates.word_errors(references, hypotheses)
    characters = error_rates.character_errors(references, hypotheses)
    count = max(words.reference_length, 1)
    return {
        "wer": words.rate,
        "cer": characters.rate,
        "insertions": words.insertions / count,
        "deletions": words.deletions / count,
        "substitutions": words.substitutions / count,
    }
