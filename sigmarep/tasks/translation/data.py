"""The data side of translation: sentence pairs in buckets, and their scores."""

import functools
import re
from collections.abc import Sequence

import ml_collections
import numpy as np

from sigmarep.data.pipeline import check_batch_size
from sigmarep.data.text import baselines, parallel, vocabulary
from sigmarep.errors import BadInput
from sigmarep.tasks.protocol import Evaluation, Files, Outputs, TaskData, split_name
from sigmarep.tasks.translation.model import Translation

SAMPLES = 3
# BLEU's tokenizers that leave words as spaces part them.
SPACED = ("13a", "intl", "none")
UNSPACED = re.compile("[\u0e00-\u0eff\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]")


def open_data(config: ml_collections.ConfigDict, files: Files | None = None) -> "TranslationData":
    """The data side; see `sigmarep.tasks.protocol.Task.open_data`.

    Raises:
      BadInput: a field of `config.data` is wrong, or the data set is not prepared.
    """
    return TranslationData(config, files)


class TranslationData(TaskData):
    """Batches of sentence pairs; see `sigmarep.tasks.protocol.TaskData`."""

    unit = "tokens"

    def __init__(self, config: ml_collections.ConfigDict, files: Files | None):
        self.config = config
        self.vocabulary: vocabulary.Vocabulary = (
            parallel.open_vocabulary(config.data) if files is None else vocabulary.from_bytes(files[vocabulary.FILE])
        )

    @functools.cached_property
    def corpus(self) -> parallel.PairCorpus:
        """Pairs of the training split."""
        return parallel.PairCorpus(self.config.data, self.vocabulary, self.config.data.train_split)

    @functools.cached_property
    def train_batches(self) -> parallel.BucketedBatches:
        """Batches of the training split."""
        batches = self._batches(self.corpus)
        check_batch_size(self.config.batch_size, batches.size)
        return batches

    def _batches(self, corpus):
        return parallel.BucketedBatches(corpus, batch_tokens=self.config.batch_size, seed=self.config.seed)

    @property
    def num_train_examples(self):
        return self.train_batches.batches_per_epoch * self.config.batch_size

    def files(self):
        return parallel.run_files(self.vocabulary, self.corpus)

    def train_stream(self, *, start, process_index, process_count):
        return self.train_batches.stream(start=start, process_index=process_index, process_count=process_count)

    def evaluations(self, model):
        if self.config.data.eval_splits:
            # A missing package should not wait for the end of the training.
            bleu([""], [""], tokenizer=self.config.bleu_tokenizer)
        return [self._evaluation(model, split) for split in self.config.data.eval_splits]

    def _evaluation(self, model: Translation, split: str) -> Evaluation:
        corpus = parallel.PairCorpus(self.config.data, self.vocabulary, split)
        batches = self._batches(corpus)
        score_of = functools.partial(bleu, tokenizer=self.config.bleu_tokenizer)

        @functools.cache
        def of_baselines():
            if not self.config.baselines:
                return {}
            train = [self.corpus.texts(i) for i in range(len(self.corpus))]
            sources, references = zip(*(corpus.texts(i) for i in range(len(corpus))), strict=True)
            nearest = baselines.nearest_neighbor([s for s, _ in train], [t for _, t in train], sources)
            return {
                "copy_bleu": score_of(sources, references)[0],
                "nearest_neighbour_bleu": score_of(nearest, references)[0],
            }

        def finish(results):
            nats = float(np.sum([result["nll"] for result in results], dtype=np.float64))
            tokens = float(np.sum([result["tokens"] for result in results], dtype=np.float64))
            written = self._written(corpus, results)
            _, references, hypotheses = zip(*written, strict=True)
            return {
                "loss": nats / tokens,
                "perplexity": float(np.exp(nats / tokens)),
                "bleu": score_of(hypotheses, references)[0],
                **of_baselines(),
            }

        def outputs(results):
            written = self._written(corpus, results)
            _, references, hypotheses = zip(*written, strict=True)
            score, signature = score_of(hypotheses, references)
            rows = ["\t".join(part.replace("\t", " ").replace("\n", " ") for part in row) for row in written]
            spread = [written[i * len(written) // SAMPLES] for i in range(min(SAMPLES, len(written)))]
            samples = [f"{source} → {hypothesis} (reference: {target})" for source, target, hypothesis in spread]
            if self.config.bleu_tokenizer in SPACED and unspaced(references):
                samples.append(
                    "BLEU counts words between spaces, which these references do not have: see config.bleu_tokenizer"
                )
            return Outputs(
                files={
                    "translations.tsv": "\n".join(["source\treference\ttranslation", *rows, ""]),
                    "bleu.txt": f"BLEU {score:.2f} {signature}\n",
                },
                samples=samples,
            )

        return Evaluation(split_name(split), batches.evaluation, model.evaluate, finish, outputs)

    def _written(self, corpus, results) -> list[tuple[str, str, str]]:
        """(source, reference, translation) of every pair, in the order of the corpus."""
        translations = {
            int(index): self.vocabulary.decode(tokens)
            for result in results
            for index, tokens in zip(result["index"], result["translation"], strict=True)
            if index >= 0
        }
        return [(*corpus.texts(index), translations[index]) for index in sorted(translations)]


def unspaced(references: Sequence[str]) -> bool:
    """True if most characters of the texts are of scripts without spaces between words: Han, Kana, Thai, Lao, Khmer."""
    text = "".join(references)
    return 2 * len(UNSPACED.findall(text)) > len(text)


def bleu(hypotheses: Sequence[str], references: Sequence[str], *, tokenizer: str = "13a") -> tuple[float, str]:
    """Corpus BLEU in per cent and its signature, by sacreBLEU with one of its tokenizers.

    Raises:
      BadInput: a package is not installed.
    """
    try:
        import sacrebleu

        metric = sacrebleu.metrics.BLEU(tokenize=tokenizer)
    except (ImportError, RuntimeError) as error:
        package = {"ja-mecab": "sacrebleu[ja]", "ko-mecab": "sacrebleu[ko]"}.get(tokenizer, "sigmarep[text]")
        raise BadInput(
            f'config.bleu_tokenizer = {tokenizer!r}: needs a package that is not installed; pip install "{package}"'
        ) from error
    score = metric.corpus_score(list(hypotheses), [list(references)])
    return score.score, str(metric.get_signature())
