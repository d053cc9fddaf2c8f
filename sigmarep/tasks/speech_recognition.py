"""Speech recognition with CTC, scored by word and character error rates."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from sigmarep.data.audio import baselines, labels, speech
from sigmarep.data.audio.ngram import NGram
from sigmarep.data.buckets import planned_rows
from sigmarep.errors import BadInput
from sigmarep.models import ctc
from sigmarep.models.speech import SpeechTransformer
from sigmarep.tasks import error_rates, transcripts
from sigmarep.tasks.protocol import UNKNOWN_EXAMPLES, Evaluation, LossOutput, Task
from sigmarep.tasks.transformer_config import create_transformer, transformer_defaults

# Fields of config.model that are the speech model's own.
MODEL_FIELDS = (
    "conv_kernel",
    "conv_stride",
    "conv_reparam",
    "normalise",
    "freq_scale",
    "max_global_shift",
    "max_local_shift",
    "max_scale",
)
LANGUAGE_MODELS = ("none", "ngram")
# config.model.qkv for what the paper's code calls its disjoint type.
DISJOINT = {0: "fused", 1: "qk_v", 2: "separate"}


def default_config() -> ml_collections.ConfigDict:
    """The fields `model`, `data`, `decoding` and `baselines`: the paper's speech model, but smaller."""
    config = ml_collections.ConfigDict()
    config.model = transformer_defaults(
        depth=4,
        width=128,
        num_heads=4,
        mlp_dim=512,
        norm="post",
        norm_epsilon=1e-5,
        reparam="sigma",
        qkv="qk_v",
        use_bias=False,
        activation="relu",
        branch_dropout=False,
        attention_shift=True,
        kernel_init="normal",
        init_std=0.1,
    )
    config.model.conv_kernel = 7
    config.model.conv_stride = 3
    config.model.conv_reparam = False
    config.model.normalise = True
    # CAPE: radians a second; shifts of a whole utterance in seconds and of one output in outputs; the largest stretch.
    config.model.freq_scale = 30.0
    config.model.max_global_shift = 30.0
    config.model.max_local_shift = 0.0
    config.model.max_scale = 1.0
    config.data = speech.default_config()
    config.decoding = ml_collections.ConfigDict()
    # 0 decodes greedily; else the beam of prefix beam search, for which the labels of a frame below `prune` of its
    # probability are passed over.
    config.decoding.beam_size = 0
    config.decoding.prune = 1e-4
    # "ngram" learns from the transcripts of the training split.
    config.decoding.language_model = "none"
    config.decoding.ngram_order = 6
    config.decoding.language_weight = 0.5
    config.decoding.insertion_bonus = 0.0
    # Prints the error rates of the most frequent transcript and of the most similar utterance's.
    config.baselines = False
    return config


def create(config: ml_collections.ConfigDict, *, abstract: bool = False) -> "SpeechRecognition":
    """The task of a resolved configuration; see `sigmarep.tasks.protocol.Task` for `abstract`.

    Raises:
      BadInput: a field of `config.model`, `config.data` or `config.decoding` is wrong, or the data set is not prepared.
    """
    return SpeechRecognition(config, abstract=abstract)


def create_model(config: ml_collections.ConfigDict, num_labels: int) -> SpeechTransformer:
    """The model of `config.model`, without touching any data.

    Raises:
      BadInput: a field has an unknown word or an impossible value.
    """
    speech.filterbank(config.data)
    try:
        model = SpeechTransformer(
            create_transformer(config),
            num_labels,
            dropout=config.model.dropout,
            frame_seconds=config.data.hop_seconds,
            **{name: config.model[name] for name in MODEL_FIELDS},
        )
        jax.eval_shape(model.init, jax.random.key(0), *example(config))
    except ValueError as error:
        raise BadInput(f"config.model.{error}") from error
    return model


def example(config: ml_collections.ConfigDict) -> tuple[jax.Array, jax.Array]:
    """Features and frames of one short utterance."""
    length = 8 * max(config.model.conv_stride, 1)
    return jnp.zeros((1, length, config.data.num_filters)), jnp.full(1, length, jnp.int32)


class Decoded(NamedTuple):
    """Numbers of the utterances, what was heard in each, and what greedy decoding hears, in the order of the corpus."""

    utterances: list[int]
    texts: list[str]
    greedy: list[str]


class SpeechRecognition(Task):
    """See `sigmarep.tasks.protocol.Task`. `config.batch_size` is the most seconds of a batch, padding among them."""

    headline = "wer"
    unit = "seconds"

    def __init__(self, config: ml_collections.ConfigDict, *, abstract: bool):
        self.config = config
        _check_decoding(config.decoding)
        if abstract:
            self.model = create_model(config, labels.planned_size(config.data.labels))
            self._shapes = speech.planned_shapes(
                config.data, batch_seconds=config.batch_size, stride=config.model.conv_stride
            )
            self.num_train_examples = UNKNOWN_EXAMPLES
            return
        error_rates.check_installed()
        self.labels = speech.open_labels(config.data)
        self.model = create_model(config, self.labels.size)
        self.corpus = self.open_corpus(config.data.train_split)
        self.train_batches = self._batches(self.corpus)
        self._shapes = self.train_batches.shapes
        self.num_train_examples = self.train_batches.batches_per_epoch * config.batch_size

    def open_corpus(self, split: str) -> speech.SpeechCorpus:
        """The utterances of a split."""
        return speech.SpeechCorpus(self.config.data, self.labels, split, stride=self.config.model.conv_stride)

    def _batches(self, corpus):
        c = self.config
        return speech.SpeechBatches(corpus, batch_seconds=c.batch_size, seed=c.seed, stride=c.model.conv_stride)

    def batch_rows(self):
        # Of the buckets that only an evaluation fills too.
        c = self.config
        rows = planned_rows(c.data.buckets, c.batch_size, c.data.rows_multiple)
        return tuple(count for count in rows if count)

    def units_per_step(self):
        return self.train_batches.seconds_per_batch

    def files(self):
        return speech.run_files(self.labels, self.corpus)

    def init(self, rng):
        return self.model.init(rng, *example(self.config))

    def abstract_batches(self):
        def batch(rows, length, most):
            shapes = {
                "features": ((rows, length, self.config.data.num_filters), jnp.float32),
                "frames": ((rows,), jnp.int32),
                "labels": ((rows, most), jnp.int32),
                "label_lengths": ((rows,), jnp.int32),
                "index": ((rows,), jnp.int32),
                "weights": ((rows,), jnp.float32),
            }
            return {name: jax.ShapeDtypeStruct(*each) for name, each in shapes.items()}

        return [batch(*shape) for shape in self._shapes]

    def train_stream(self, *, start, process_index, process_count):
        return self.train_batches.stream(start=start, process_index=process_index, process_count=process_count)

    def loss(self, params, model_state, batch, rng, *, attention):
        output, updates = self.model.apply(
            {"params": params, **model_state},
            batch["features"],
            batch["frames"],
            deterministic=False,
            rngs={"dropout": rng},
            mutable=[*model_state, "attention"] if attention else list(model_state),
        )
        found = ctc.ctc_losses(output.logits, output.frames, batch["labels"], batch["label_lengths"])
        weights = batch["weights"] * found.possible
        total, count = jnp.sum(weights * found.nll), jnp.sum(weights * batch["label_lengths"])
        changed: dict[str, Any] = dict(updates)
        recorded = changed.pop("attention", {})
        return LossOutput(
            loss=(total, count),
            metrics={"impossible": (jnp.sum(batch["weights"] * ~found.possible), jnp.sum(batch["weights"]))},
            model_state={**model_state, **changed},
            attention=recorded,
        )

    def evaluations(self):
        return [self.evaluation(split) for split in self.config.data.eval_splits]

    def evaluation(self, split: str) -> Evaluation:
        """Of one split, also one that `config.data.eval_splits` does not name."""
        corpus = self.open_corpus(split)
        last: list[tuple[Any, Decoded]] = []

        def decoded(results):
            # `finish` and `outputs` are given the same results; a beam search is made once.
            if not last or last[0][0] is not results:
                last[:] = [(results, self.decoded(results))]
            return last[0][1]

        @functools.cache
        def of_baselines():
            return self._baselines(corpus) if self.config.baselines else {}

        def finish(results):
            nats = float(np.sum([result["nll"] for result in results], dtype=np.float64))
            count = float(np.sum([result["count"] for result in results], dtype=np.float64))
            found = decoded(results)
            references = [corpus.texts[i] for i in found.utterances]
            return {
                "loss": nats / count if count else math.nan,
                **_rates(references, found.texts),
                **self._greedy_rates(references, found.greedy),
                **of_baselines(),
                "impossible": float(np.sum([result["impossible"] for result in results])) / len(corpus),
                "unknown_characters": float(np.mean(~corpus.scored)),
            }

        def outputs(results):
            found = decoded(results)
            return transcripts.outputs(corpus, found.utterances, found.texts)

        return Evaluation(split.split("[")[0], self._batches(corpus).evaluation, self._evaluate, finish, outputs)

    def _evaluate(self, variables, batch):
        output: Any = self.model.apply(variables, batch["features"], batch["frames"])
        found = ctc.ctc_losses(output.logits, output.frames, batch["labels"], batch["label_lengths"])
        weights = batch["weights"] * found.possible
        results = {
            "nll": jnp.sum(weights * found.nll),
            "count": jnp.sum(weights * batch["label_lengths"]),
            "impossible": jnp.sum(batch["weights"] * ~found.possible),
            "index": batch["index"],
            "frames": output.frames,
        }
        results["best"] = ctc.greedy(output.logits, output.frames)
        if self.config.decoding.beam_size:
            results["log_probabilities"] = jax.nn.log_softmax(output.logits)
        return results

    def word_error_rate(
        self, corpus: speech.SpeechCorpus, results: list[Any], decoding: ml_collections.ConfigDict
    ) -> float:
        """Of a split, from the results of its evaluation's step, decoded as `decoding` says: a `config.decoding`."""
        found = self.decoded(results, decoding)
        return _rates([corpus.texts[i] for i in found.utterances], found.texts)["wer"]

    def decoded(self, results: list[Any], decoding: ml_collections.ConfigDict | None = None) -> Decoded:
        """What is heard in the results of an evaluation, decoded as `decoding` says, else as `config.decoding` does."""
        best, greedy = {}, {}
        for result in results:
            for row, index in enumerate(result["index"]):
                if index >= 0:
                    best[int(index)], greedy[int(index)] = self._texts(result, row, decoding)
        order = sorted(best)
        return Decoded(order, [best[index] for index in order], [greedy[index] for index in order])

    def _texts(self, result, row: int, decoding=None) -> tuple[str, str]:
        """What is heard in an utterance, and what greedy decoding hears."""
        frames, c = int(result["frames"][row]), decoding or self.config.decoding
        greedy = self.labels.decode(ctc.collapse(result["best"][row][:frames]))
        if not c.beam_size:
            return greedy, greedy
        hypotheses = ctc.prefix_beam_search(
            result["log_probabilities"][row][:frames],
            beam_size=c.beam_size,
            label_log_probability=None if self._language_model is None else self._language_model.log_probabilities,
            language_weight=c.language_weight,
            end_log_probability=None if self._language_model is None else self._language_model.log_end,
            insertion_bonus=c.insertion_bonus,
            prune=c.prune,
        )
        return self.labels.decode(hypotheses[0].labels), greedy

    @functools.cached_property
    def _language_model(self):
        c = self.config.decoding
        if c.language_model == "none":
            return None
        return NGram.train(self.corpus.labels_of, order=c.ngram_order, vocabulary_size=self.labels.size)

    def _greedy_rates(self, references, greedy) -> dict[str, float]:
        """Beside those of a beam search."""
        if not self.config.decoding.beam_size:
            return {}
        return {f"greedy_{name}": value for name, value in _rates(references, greedy).items() if name in ("wer", "cer")}

    def _baselines(self, corpus) -> dict[str, float]:
        train = self.corpus
        most = baselines.most_frequent(train.texts)
        nearest = baselines.nearest_neighbour(
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

    def transcribe(self, variables: Any, utterances: Sequence[np.ndarray], *, rows: int = 8) -> list[str]:
        """What is said in each of `utterances`, arrays (n,) of samples in [−1, 1] at `config.data.sample_rate`. Of those
        longer than the last of `config.data.buckets` the model has seen none.
        """
        rows = max(min(rows, len(utterances)), 1)
        log_mel, stride = speech.filterbank(self.config.data), self.config.model.conv_stride
        features = [log_mel(samples) for samples in utterances]
        order = sorted(range(len(features)), key=lambda i: len(features[i]))
        step = jax.jit(self._evaluate)
        found = [""] * len(features)
        for first in range(0, len(order), rows):
            members = order[first : first + rows]
            # Powers of two: few programs for any lengths.
            frames = max(len(features[members[-1]]), 32 * stride)
            length = stride * 2 ** math.ceil(math.log2(frames / stride))
            batch = {
                "features": np.zeros((rows, length, log_mel.num_filters), np.float32),
                "frames": np.zeros(rows, np.int32),
                "labels": np.zeros((rows, 1), np.int32),
                "label_lengths": np.zeros(rows, np.int32),
                "weights": np.zeros(rows, np.float32),
                "index": np.full(rows, -1, np.int32),
            }
            for row, member in enumerate(members):
                batch["features"][row, : len(features[member])] = features[member]
                batch["frames"][row] = len(features[member])
                batch["index"][row] = member
            result = jax.device_get(step(variables, batch))
            for row, member in enumerate(members):
                found[member], _ = self._texts(result, row)
        return found


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


def _check_decoding(c: ml_collections.ConfigDict) -> None:
    if c.beam_size < 0:
        raise BadInput(f"config.decoding.beam_size = {c.beam_size}: expected at least 0 (0 decodes greedily)")
    if c.language_model not in LANGUAGE_MODELS:
        raise BadInput(
            f"config.decoding.language_model = {c.language_model!r}: expected one of {', '.join(LANGUAGE_MODELS)}"
        )
    if c.language_model != "none" and not c.beam_size:
        raise BadInput("config.decoding.language_model: needs config.decoding.beam_size of at least 1")
    if c.ngram_order < 1:
        raise BadInput(f"config.decoding.ngram_order = {c.ngram_order}: expected at least 1")
    if not 0 <= c.prune < 1:
        raise BadInput(f"config.decoding.prune = {c.prune}: expected a probability from 0 to below 1")
