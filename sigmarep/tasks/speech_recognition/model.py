"""The model side of speech recognition: the CTC loss, evaluation and decoding."""

import dataclasses
import functools
import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from sigmarep.data.audio import features, labels, speech
from sigmarep.data.audio.ngram import NGram
from sigmarep.data.buckets import planned_rows
from sigmarep.errors import BadInput
from sigmarep.models import ctc
from sigmarep.models.speech import SpeechTransformer
from sigmarep.tasks.protocol import Files, LossOutput, TaskModel
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
# Its name in the folder of a run: what the n-gram learns from, one text a line.
TRANSCRIPTS = "transcripts.txt"
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


def create_model(config: ml_collections.ConfigDict, files: Files) -> "SpeechRecognition":
    """The model side; `files` holds `labels.model`, and `transcripts.txt` if an n-gram is to learn from it.

    Raises:
      BadInput: a field of `config.model` or `config.decoding` has an unknown word or an impossible value.
    """
    transcripts = files[TRANSCRIPTS].decode() if config.decoding.language_model == "ngram" else ""
    known = labels.from_bytes(files[labels.FILE], lowercase=config.data.labels.lowercase)
    return SpeechRecognition(config, known, transcripts.splitlines())


def planned_files(config: ml_collections.ConfigDict) -> dict[str, bytes]:
    """Made-up labels, as many as `config.data.labels` asks for, and nothing for an n-gram to learn from."""
    return {labels.FILE: labels.planned(config.data.labels).to_bytes(), TRANSCRIPTS: b""}


def create_module(config: ml_collections.ConfigDict, num_labels: int) -> SpeechTransformer:
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


class SpeechRecognition(TaskModel):
    """Transcribes speech; see `sigmarep.tasks.protocol.TaskModel`. `config.batch_size` is the most seconds of a batch, with
    its padding.

    Attributes:
      model: the Linen module. labels: that it writes.
    """

    primary_metric = "wer"
    model_fields = (
        "model.",
        *("data.sample_rate", "data.num_filters", "data.window_seconds", "data.hop_seconds", "data.labels."),
    )

    def __init__(self, config: ml_collections.ConfigDict, known: labels.Labels, transcripts: Sequence[str]):
        """`transcripts`: normalised texts for the n-gram."""
        _check_decoding(config.decoding)
        self.config, self.labels, self._transcripts = config, known, transcripts
        self.model = create_module(config, known.size)

    @property
    def plain_module(self) -> SpeechTransformer:
        """The module that takes folded parameters (`sigmarep.nn.fold`)."""
        transformer = dataclasses.replace(self.model.transformer, reparam="none")
        return self.model.clone(transformer=transformer, conv_reparam=False)

    def batch_rows(self):
        # Of the buckets that only an evaluation fills too.
        c = self.config
        rows = planned_rows(c.data.buckets, c.batch_size, c.data.rows_multiple)
        return tuple(count for count in rows if count)

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

        stride = self.config.model.conv_stride
        shapes = speech.planned_shapes(self.config.data, batch_seconds=self.config.batch_size, stride=stride)
        return [batch(*shape) for shape in shapes if shape[0]]

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

    def evaluate(self, variables: Any, batch: Any) -> dict[str, jax.Array]:
        """Nats and labels of a batch, utterances that cannot be aligned, and what decoding needs of each."""
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

    def decoded(self, results: list[Any], decoding: ml_collections.ConfigDict | None = None) -> Decoded:
        """What is heard in the results of an evaluation, decoded as `decoding` says, else as `config.decoding` does."""
        best, greedy = {}, {}
        for result in results:
            for row, index in enumerate(result["index"]):
                if index >= 0:
                    best[int(index)], greedy[int(index)] = self.texts(result, row, decoding)
        order = sorted(best)
        return Decoded(order, [best[index] for index in order], [greedy[index] for index in order])

    def texts(self, result: Any, row: int, decoding: ml_collections.ConfigDict | None = None) -> tuple[str, str]:
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
    def _step(self):
        return jax.jit(self.evaluate)

    @functools.cached_property
    def _language_model(self):
        c = self.config.decoding
        if c.language_model == "none":
            return None
        sequences = [self.labels.encode(text).labels for text in self._transcripts]
        return NGram.train(sequences, order=c.ngram_order, vocabulary_size=self.labels.size)

    def recording(self, path: str | os.PathLike) -> np.ndarray:
        """The samples (n,) of an audio file as `transcribe` takes them.

        Raises:
          BadInput: it cannot be read, or is longer than the last of `config.data.buckets`.
        """
        try:
            recording = features.read(path)
        except features.AudioError as error:
            raise BadInput(str(error)) from None
        seconds, longest = len(recording.samples) / recording.rate, self.config.data.buckets[-1]
        if seconds > longest:
            raise BadInput(
                f"{os.fspath(path)}: lasts {seconds:.1f} s; the model was given at most {longest} s (config.data.buckets)"
            )
        return features.resampled(recording.samples, recording.rate, self.config.data.sample_rate)

    def transcribe(self, variables: Any, recordings: Sequence[np.ndarray], *, rows: int = 8) -> list[str]:
        """The words of each recording, samples (n,) in [−1, 1] at `config.data.sample_rate`; the model has seen none that
        is longer than the last of `config.data.buckets`.

        Args:
          rows: recordings at a time.
        """
        rows = max(min(rows, len(recordings)), 1)
        log_mel, stride = speech.filterbank(self.config.data), self.config.model.conv_stride
        spectra = [log_mel(samples) for samples in recordings]
        order = sorted(range(len(spectra)), key=lambda i: len(spectra[i]))
        texts = [""] * len(spectra)
        for first in range(0, len(order), rows):
            members = order[first : first + rows]
            # Powers of two: few programs for any lengths.
            frames = max(len(spectra[members[-1]]), 32 * stride)
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
                batch["features"][row, : len(spectra[member])] = spectra[member]
                batch["frames"][row] = len(spectra[member])
                batch["index"][row] = member
            result = jax.device_get(self._step(variables, batch))
            for row, member in enumerate(members):
                texts[member], _ = self.texts(result, row)
        return texts


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
