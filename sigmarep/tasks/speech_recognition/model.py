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

from sigmarep import configuration
from sigmarep.data.audio import features, labels, speech
from sigmarep.data.audio.ngram import NGram
from sigmarep.data.buckets import planned_rows
from sigmarep.errors import BadInput
from sigmarep.fields import field
from sigmarep.models import ctc
from sigmarep.models.speech import SpeechTransformer
from sigmarep.tasks.protocol import Files, LossOutput, TaskModel
from sigmarep.tasks.transformer_config import create_transformer, transformer_fields

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


FIELDS: dict[str, Any] = {
    "model": {
        **transformer_fields(
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
        ),
        "conv_kernel": field(7, "Frames of the front end's convolution.", at_least=1, at_most=2**14),
        "conv_stride": field(3, "Frames from one output of it to the next.", at_least=1, at_most=2**14),
        "conv_reparam": field(False, "The convolution is reparametrized too."),
        "normalise": field(True, "Normalizes the features of each utterance."),
        "freq_scale": field(30.0, "CAPE's scale of positions in radians a second.", above=0),
        "max_global_shift": field(30.0, "CAPE's largest shift of a whole utterance in seconds.", at_least=0),
        "max_local_shift": field(0.0, "CAPE's largest shift of one output, in outputs.", at_least=0),
        "max_scale": field(1.0, "CAPE's largest stretch.", at_least=1),
    },
    "data": speech.FIELDS,
    "decoding": {
        "beam_size": field(0, "Prefixes of the beam search; 0 decodes greedily.", at_least=0, at_most=2**16),
        "prune": field(1e-4, "Labels below this probability are skipped at each frame.", at_least=0, below=1),
        "language_model": field(
            "none", "ngram: a character n-gram of the training transcripts.", choices=LANGUAGE_MODELS
        ),
        "ngram_order": field(6, "Order of the n-gram.", at_least=1, at_most=100),
        "language_weight": field(0.5, "Weight of its log-probability.", at_least=0),
        "insertion_bonus": field(0.0, "Added to the score for every label."),
    },
    "baselines": field(
        False, "Evaluations also give the error rates of the most frequent and the most similar utterance's transcript."
    ),
}


def default_config() -> ml_collections.ConfigDict:
    """The fields `model`, `data`, `decoding` and `baselines`: the paper's speech model, but smaller."""
    return configuration.make(FIELDS)


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
        losses = ctc.ctc_losses(output.logits, output.frames, batch["labels"], batch["label_lengths"])
        weights = batch["weights"] * losses.possible
        total, count = jnp.sum(weights * losses.nll), jnp.sum(weights * batch["label_lengths"])
        changed: dict[str, Any] = dict(updates)
        recorded = changed.pop("attention", {})
        return LossOutput(
            loss=(total, count),
            metrics={"impossible": (jnp.sum(batch["weights"] * ~losses.possible), jnp.sum(batch["weights"]))},
            model_state={**model_state, **changed},
            attention=recorded,
        )

    def evaluate(self, variables: Any, batch: Any) -> dict[str, jax.Array]:
        """Nats and labels of a batch, utterances that cannot be aligned, and what decoding needs of each."""
        output: Any = self.model.apply(variables, batch["features"], batch["frames"])
        losses = ctc.ctc_losses(output.logits, output.frames, batch["labels"], batch["label_lengths"])
        weights = batch["weights"] * losses.possible
        results = {
            "nll": jnp.sum(weights * losses.nll),
            "count": jnp.sum(weights * batch["label_lengths"]),
            "impossible": jnp.sum(batch["weights"] * ~losses.possible),
            "index": batch["index"],
            "frames": output.frames,
        }
        results["best"] = ctc.greedy(output.logits, output.frames)
        if self.config.decoding.beam_size:
            results["log_probabilities"] = jax.nn.log_softmax(output.logits)
        return results

    def decoded(self, results: list[Any], decoding: ml_collections.ConfigDict | None = None) -> Decoded:
        """Transcripts of the results of an evaluation, decoded as `decoding` says, else as `config.decoding` does."""
        best, greedy = {}, {}
        for result in results:
            for row, index in enumerate(result["index"]):
                if index >= 0:
                    best[int(index)], greedy[int(index)] = self.texts(result, row, decoding)
        order = sorted(best)
        return Decoded(order, [best[index] for index in order], [greedy[index] for index in order])

    def texts(self, result: Any, row: int, decoding: ml_collections.ConfigDict | None = None) -> tuple[str, str]:
        """The transcript of an utterance, and that of greedy decoding."""
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
    if c.language_model != "none" and not c.beam_size:
        raise BadInput("config.decoding.language_model: needs config.decoding.beam_size of at least 1")
