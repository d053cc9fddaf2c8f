"""The data side of language modeling: windows of text."""

import functools
import math

import ml_collections
import numpy as np

from sigmarep.data import pipeline
from sigmarep.data.text import baselines, documents, vocabulary
from sigmarep.tasks.language_modeling.model import LanguageModeling
from sigmarep.tasks.protocol import Evaluation, Files, TaskData, split_name


def open_data(config: ml_collections.ConfigDict, files: Files | None = None) -> "LanguageModelingData":
    """The data side; see `sigmarep.tasks.protocol.Task.open_data`.

    Raises:
      BadInput: a field of `config.data` is wrong, or the data set is not prepared.
    """
    return LanguageModelingData(config, files)


class LanguageModelingData(TaskData):
    """Windows of tokens; see `sigmarep.tasks.protocol.TaskData`."""

    unit = "tokens"

    def __init__(self, config: ml_collections.ConfigDict, files: Files | None):
        self.config = config
        self.vocabulary: vocabulary.Vocabulary = (
            documents.open_vocabulary(config.data) if files is None else vocabulary.from_bytes(files[vocabulary.FILE])
        )

    @functools.cached_property
    def train_windows(self) -> documents.Windows:
        """Windows of the training split."""
        return documents.open_windows(self.config.data, self.vocabulary, self.config.data.train_split, train=True)

    @property
    def num_train_examples(self):
        return len(self.train_windows)

    def units_per_step(self):
        return self.config.batch_size * self.config.data.sequence_length

    def files(self):
        return documents.run_files(self.vocabulary, self.train_windows)

    def train_stream(self, *, start, process_index, process_count):
        return pipeline.training_stream(
            self.train_windows,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            start=start,
            process_index=process_index,
            process_count=process_count,
            num_threads=self.config.data.num_threads,
        )

    def evaluations(self, model):
        return [self._evaluation(model, split) for split in self.config.data.eval_splits]

    def _evaluation(self, model: LanguageModeling, split: str) -> Evaluation:
        windows = documents.open_windows(self.config.data, self.vocabulary, split, train=False)

        def batches(*, process_index, process_count):
            return pipeline.evaluation_batches(
                windows,
                batch_size=self.config.batch_size,
                process_index=process_index,
                process_count=process_count,
                num_threads=self.config.data.num_threads,
            )

        @functools.cache
        def of_baselines():
            if not self.config.baselines:
                return {}
            nats = baselines.unigram(self.train_windows, windows, self.vocabulary.size)
            return {
                "unigram_perplexity": math.exp(nats / windows.num_tokens),
                "unigram_bits_per_byte": nats / math.log(2) / windows.num_bytes,
                "gzip_bits_per_byte": baselines.gzip_bits_per_byte(documents.texts(self.config.data, split)),
            }

        def finish(results):
            nats = float(np.sum([result["nll"] for result in results], dtype=np.float64))
            tokens = float(np.sum([result["tokens"] for result in results], dtype=np.float64))
            return {
                "loss": nats / tokens,
                "perplexity": _exp(nats / tokens),
                "word_perplexity": _exp(nats / windows.num_words),
                "bits_per_byte": nats / math.log(2) / windows.num_bytes,
                **of_baselines(),
            }

        return Evaluation(split_name(split), batches, model.evaluate, finish)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
