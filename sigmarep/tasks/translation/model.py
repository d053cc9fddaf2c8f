"""The model side of translation: loss, evaluation and beam search."""

import dataclasses
import unicodedata
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from sigmarep import configuration
from sigmarep.data.buckets import planned_rows
from sigmarep.data.text import parallel, vocabulary
from sigmarep.data.text.vocabulary import BOS, EOS, PAD
from sigmarep.errors import BadInput
from sigmarep.fields import field
from sigmarep.models import decoding
from sigmarep.models.seq2seq import Seq2Seq, deepnorm_constants
from sigmarep.nn import consensus, fold
from sigmarep.tasks.protocol import Files, LossOutput, TaskModel
from sigmarep.tasks.transformer_config import TEXT_POSITIONS, create_transformer, transformer_fields

MODEL_FIELDS = ("share_embeddings", "tie_embeddings", "reparam_embedding", "dropout")
ROTARY_BASE = 10_000.0
# Those of sacreBLEU's that download nothing.
BLEU_TOKENIZERS = ("13a", "intl", "char", "zh", "ja-mecab", "ko-mecab", "none")


FIELDS: dict[str, Any] = {
    "model": {
        **transformer_fields(depth=3, width=128, num_heads=4, mlp_dim=512),
        "decoder_depth": field(0, "Blocks of the decoder; 0: as many as the encoder.", at_least=0, at_most=2**16),
        "positions": field("sinusoidal", "Position embeddings.", choices=TEXT_POSITIONS),
        "share_embeddings": field(True, "Source and target share one table."),
        "tie_embeddings": field(True, "The decoder's input and output share one table."),
        "reparam_embedding": field(False, "The tables are reparametrized too."),
    },
    "data": parallel.FIELDS,
    "decoding": {
        "beam_size": field(4, "Hypotheses of the beam search.", at_least=1, at_most=2**16),
        "length_penalty": field(0.6, "Exponent α of ((5 + length)/6)^α, which scores are divided by.", at_least=0),
        "length_factor": field(
            1.2,
            "A translation has at most factor · source + extra tokens, and at most data.max_target_length.",
            at_least=0,
        ),
        "length_extra": field(10, "The extra tokens.", at_least=1),
    },
    "bleu_tokenizer": field(
        "13a",
        "Words of BLEU, as sacreBLEU's tokenize: zh, char, ja-mecab or ko-mecab for languages without spaces.",
        choices=BLEU_TOKENIZERS,
    ),
    "label_smoothing": field(0.1, "Share of each target that is spread evenly over all tokens.", at_least=0, below=1),
    "baselines": field(False, "Evaluations also give the BLEU of the source and of the most similar training pair."),
}


def default_config() -> ml_collections.ConfigDict:
    """The fields `model`, `data`, `decoding`, `bleu_tokenizer`, `label_smoothing` and `baselines`.

    `config.model.depth` is that of the encoder and of the decoder, unless `decoder_depth` says otherwise.
    """
    return configuration.make(FIELDS)


def create_model(config: ml_collections.ConfigDict, files: Files) -> "Translation":
    """The model side; `files` holds `vocabulary.model`.

    Raises:
      BadInput: a field of `config.model` or `config.decoding` has an unknown word or an impossible value.
    """
    return Translation(config, vocabulary.from_bytes(files[vocabulary.FILE]))


def planned_files(config: ml_collections.ConfigDict) -> dict[str, bytes]:
    """A vocabulary of made-up words, as large as `config.data.vocabulary` asks for."""
    return {vocabulary.FILE: vocabulary.planned(config.data.vocabulary).to_bytes()}


def create_module(config: ml_collections.ConfigDict, vocabulary_size: int) -> Seq2Seq:
    """The model of `config.model`, without touching any data.

    Raises:
      BadInput: a field has an unknown word or an impossible value.
    """
    fields, data = config.model, config.data
    depths = {"encoder": fields.depth, "decoder": fields.decoder_depth or fields.depth}
    rotary = fields.positions == "rotary"
    if min(depths.values()) < 1:
        raise BadInput(
            f"config.model.depth = {fields.depth}, decoder_depth = {fields.decoder_depth}: expected at least 1"
        )
    if fields.token_mixing == "consensus":
        raise BadInput(f"config.model.{consensus.NO_CONTEXT}")
    constants = deepnorm_constants(*depths.values()) if fields.norm == "deepnorm" else {"encoder": {}, "decoder": {}}
    stacks = {
        name: create_transformer(config, depth=depth, rotary_base=ROTARY_BASE if rotary else 0.0, **constants[name])
        for name, depth in depths.items()
    }
    try:
        model = Seq2Seq(
            encoder=stacks["encoder"],
            decoder=stacks["decoder"],
            vocabulary_size=vocabulary_size,
            max_length=max(data.max_source_length, data.max_target_length),
            positions="none" if rotary else fields.positions,
            **{name: fields[name] for name in MODEL_FIELDS},
        )
    except ValueError as error:
        raise BadInput(f"config.model.{error}") from error
    return model


class Translation(TaskModel):
    """Translates; see `sigmarep.tasks.protocol.TaskModel`. `config.batch_size` is a number of tokens, padding among them.

    Attributes:
      model: the Linen module. vocabulary: of both languages.
    """

    primary_metric = "bleu"

    def __init__(self, config: ml_collections.ConfigDict, vocab: vocabulary.Vocabulary):
        self.config, self.vocabulary = config, vocab
        self.model = create_module(config, vocab.size)

    @property
    def plain_module(self) -> Seq2Seq:
        """The module that takes folded parameters (`sigmarep.nn.fold`)."""
        stacks = (dataclasses.replace(each, reparam="none") for each in (self.model.encoder, self.model.decoder))
        encoder, decoder = stacks
        return self.model.clone(encoder=encoder, decoder=decoder, reparam_embedding=False)

    def _buckets(self) -> list[tuple[int, int]]:
        """Length and rows of every bucket that a batch holds."""
        data = self.config.data
        rows = planned_rows(data.buckets, self.config.batch_size, data.rows_multiple)
        return [(length, count) for length, count in zip(data.buckets, rows, strict=True) if count]

    def batch_rows(self):
        # Of the buckets that only an evaluation fills too.
        return tuple(rows for _, rows in self._buckets())

    def init(self, rng):
        tokens = jnp.zeros((1, 8), jnp.int32)
        return self.model.init(rng, tokens, tokens, tokens, method="losses")

    def abstract_batches(self):
        return [
            {
                **{name: jax.ShapeDtypeStruct((rows, length), jnp.int32) for name in ("source", "inputs", "targets")},
                "index": jax.ShapeDtypeStruct((rows,), jnp.int32),
            }
            for length, rows in self._buckets()
        ]

    def loss(self, params, model_state, batch, rng, *, attention):
        losses, updates = self.model.apply(
            {"params": params, **model_state},
            batch["source"],
            batch["inputs"],
            batch["targets"],
            deterministic=False,
            rngs={"dropout": rng},
            mutable=[*model_state, "attention"] if attention else list(model_state),
            method="losses",
        )
        smoothing, weights = self.config.label_smoothing, (batch["targets"] != PAD).astype(jnp.float32)
        count = jnp.sum(weights)
        total = (1 - smoothing) * losses.nll + smoothing * losses.uniform
        changed: dict[str, Any] = dict(updates)
        recorded = changed.pop("attention", {})
        return LossOutput(
            loss=(jnp.sum(weights * total), count),
            metrics={"nll": (jnp.sum(weights * losses.nll), count)},
            model_state={**model_state, **changed},
            attention=recorded,
        )

    def evaluate(self, variables: Any, batch: Any) -> dict[str, jax.Array]:
        """Nats and tokens of a batch, and the translations of its sources (B, L) with the numbers of the pairs."""
        losses: Any = self.model.apply(variables, batch["source"], batch["inputs"], batch["targets"], method="losses")
        weights = (batch["targets"] != PAD).astype(jnp.float32)
        return {
            "nll": jnp.sum(weights * losses.nll),
            "tokens": jnp.sum(weights),
            "index": batch["index"],
            "translation": self.search(variables, batch["source"]).tokens[:, 0],
        }

    def translate(self, variables: Any, sentences: Sequence[str], *, names: Sequence[str], rows: int = 32) -> list[str]:
        """Translations of sentences, an empty one of an empty one.

        Args:
          variables: of the model, reparametrised or not.
          names: what a message calls each sentence.
          rows: sentences translated at a time.

        Raises:
          BadInput: a sentence has more tokens than `config.data.max_source_length`, its end among them.
        """
        limit = self.config.data.max_source_length
        # The form of the text that the vocabulary was trained on (`token_cache.feature`).
        texts = [unicodedata.normalize("NFC", sentence).strip() for sentence in sentences]
        ids = [[*self.vocabulary.encode(text), EOS] for text in texts]
        for name, each in zip(names, ids, strict=True):
            if len(each) > limit:
                raise BadInput(
                    f"{name}: has {len(each)} tokens with its end; the model takes at most {limit} "
                    "(config.data.max_source_length)"
                )
        translate = jax.jit(lambda variables, source: self.search(variables, source).tokens[:, 0])
        translations = [""] * len(ids)
        # Those of about one length together, in the lengths of the buckets: few programs, little padding.
        of_bucket = np.searchsorted(self.config.data.buckets, [len(each) for each in ids])
        for bucket, length in enumerate(self.config.data.buckets):
            members = [i for i in np.flatnonzero(of_bucket == bucket) if len(ids[i]) > 1]
            for part in range(0, len(members), rows):
                source = np.full((rows, min(length, limit)), PAD, np.int32)
                for row, member in zip(source, members[part : part + rows], strict=False):
                    row[: len(ids[member])] = ids[member]
                tokens = np.asarray(translate(variables, source))
                for member, each in zip(members[part : part + rows], tokens, strict=False):
                    translations[member] = self.vocabulary.decode(each)
        return translations

    def search(self, variables: Any, source: jax.Array) -> decoding.Hypotheses:
        """The best translations of sentences (B, S), padded with 0, that the beam search of `config.decoding` finds."""
        c = self.config.decoding
        plain = {"params": fold(variables)}
        model = self.plain_module
        words = jnp.sum(source != PAD, axis=-1)
        longest = self.config.data.max_target_length
        longest = min(longest, int(c.length_factor * source.shape[1]) + c.length_extra)
        limits = (c.length_factor * words).astype(jnp.int32) + c.length_extra
        memory: Any = model.apply(plain, source, method="encode")
        memory, sources = (jnp.repeat(x, c.beam_size, axis=0) for x in (memory, source))

        def step(tokens, position, cache):
            logits, cache = model.apply(
                {**plain, **cache},
                tokens[:, None],
                memory,
                sources,
                positions=jnp.full((1, 1), position),
                cache_length=longest,
                mutable=["cache"],
                method="next_token",
            )
            return logits[:, 0], cache

        return decoding.beam_search(
            step,
            decoding.empty_cache(step, len(sources)),
            batch=len(source),
            beam_size=c.beam_size,
            max_length=longest,
            limits=limits,
            alpha=c.length_penalty,
            bos=BOS,
            eos=EOS,
            pad=PAD,
        )
