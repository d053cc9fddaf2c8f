"""The model side of language modeling: loss, evaluation and generation."""

import dataclasses
import functools
import unicodedata
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from sigmarep import configuration
from sigmarep.data.text import documents, vocabulary
from sigmarep.data.text.vocabulary import BOS, EOS, PAD
from sigmarep.errors import BadInput
from sigmarep.fields import field
from sigmarep.models import decoding
from sigmarep.models.lm import LanguageModel
from sigmarep.nn import fold
from sigmarep.tasks.protocol import Files, LossOutput, TaskModel
from sigmarep.tasks.transformer_config import TEXT_POSITIONS, create_transformer, portable, transformer_fields

# Fields of config.model that are the language model's own.
MODEL_FIELDS = (
    "tie_embeddings",
    "adaptive_cutoffs",
    "reparam_embedding",
    "output_logit_cap",
    "dropout",
    "logit_chunk",
)
ROTARY_BASE = 10_000.0


FIELDS: dict[str, Any] = {
    "model": {
        **transformer_fields(depth=4, width=128, num_heads=4, mlp_dim=512),
        "positions": field("rotary", "Position embeddings.", choices=TEXT_POSITIONS),
        "tie_embeddings": field(True, "Input and output share one table."),
        "adaptive_cutoffs": field(
            (), "Cutoffs of adaptive input and softmax; () for a plain table.", element=int, at_least=1, order="rising"
        ),
        "reparam_embedding": field(False, "The tables are reparametrized too."),
        "output_logit_cap": field(0.0, "Soft cap of the output logits; 0 for none.", at_least=0),
        "logit_chunk": field(0, "Positions whose logits are in memory at a time; 0 for all.", at_least=0),
    },
    "data": documents.FIELDS,
    "label_smoothing": field(0.0, "Share of each target that is spread evenly over all tokens.", at_least=0, below=1),
    "z_loss": field(0.0, "Weight of the squared log-normalizer of the logits (Chowdhery et al., 2022).", at_least=0),
    "baselines": field(False, "Evaluations also give the scores of a unigram model and of gzip."),
}


def default_config() -> ml_collections.ConfigDict:
    """The fields `model`, `data`, `label_smoothing`, `z_loss` and `baselines`."""
    return configuration.make(FIELDS)


def create_model(config: ml_collections.ConfigDict, files: Files) -> "LanguageModeling":
    """The model side; `files` holds `vocabulary.model`.

    Raises:
      BadInput: a field of `config.model` has an unknown word or an impossible value.
    """
    return LanguageModeling(config, vocabulary.from_bytes(files[vocabulary.FILE]))


def planned_files(config: ml_collections.ConfigDict) -> dict[str, bytes]:
    """A vocabulary of made-up words, as large as `config.data.vocabulary` asks for."""
    return {vocabulary.FILE: vocabulary.planned(config.data.vocabulary).to_bytes()}


def create_module(config: ml_collections.ConfigDict, vocabulary_size: int) -> LanguageModel:
    """The model of `config.model`, without touching any data.

    Raises:
      BadInput: a field has an unknown word or an impossible value.
    """
    positions = config.model.positions
    rotary = positions == "rotary"
    transformer = create_transformer(config, rotary_base=ROTARY_BASE if rotary else 0.0)
    length = config.data.sequence_length
    try:
        model = LanguageModel(
            transformer,
            vocabulary_size=vocabulary_size,
            max_length=length,
            positions="none" if rotary else positions,
            **{name: config.model[name] for name in MODEL_FIELDS},
        )
    except ValueError as error:
        raise BadInput(f"config.model.{error}") from error
    return model


class LanguageModeling(TaskModel):
    """Predicts the next token; see `sigmarep.tasks.protocol.TaskModel`.

    Attributes:
      model: the Linen module. vocabulary: of its tokens.
    """

    primary_metric = "perplexity"

    def __init__(self, config: ml_collections.ConfigDict, vocab: vocabulary.Vocabulary):
        self.config, self.vocabulary = config, vocab
        self.model = create_module(config, vocab.size)

    @property
    def plain_module(self) -> LanguageModel:
        """The module that takes folded parameters (`sigmarep.nn.fold`)."""
        transformer = dataclasses.replace(self.model.transformer, reparam="none")
        return self.model.clone(transformer=transformer, reparam_embedding=False)

    def serving(self) -> tuple[Any, jax.ShapeDtypeStruct]:
        """ln p (B, T, V) of the token after each of (B, T); see `sigmarep.inference.Run.serving`."""
        plain = self.plain_module
        window = jax.ShapeDtypeStruct((self.config.data.sequence_length,), jnp.int32)
        return plain.clone(transformer=portable(plain.transformer)).apply, window

    def init(self, rng):
        tokens = jnp.zeros((1, self.config.data.sequence_length), jnp.int32)
        return self.model.init(rng, tokens, tokens, method="losses")

    def abstract_batches(self):
        shape = (self.config.batch_size, self.config.data.sequence_length)
        types = {"tokens": jnp.int32, "targets": jnp.int32, "weights": jnp.float32}
        types |= {"segments": jnp.int32, "positions": jnp.int32}
        return [{name: jax.ShapeDtypeStruct(shape, dtype) for name, dtype in types.items()}]

    def _positions(self, batch):
        """Positions of the tokens. Windows of one stream are one segment, and need no mask."""
        if self.config.data.packing == "stream":
            return {"positions": batch["positions"]}
        return {"positions": batch["positions"], "segments": batch["segments"]}

    def loss(self, params, model_state, batch, rng, *, attention):
        losses, updates = self.model.apply(
            {"params": params, **model_state},
            batch["tokens"],
            batch["targets"],
            **self._positions(batch),
            deterministic=False,
            rngs={"dropout": rng},
            mutable=[*model_state, "attention"] if attention else list(model_state),
            method="losses",
        )
        smoothing, weights = self.config.label_smoothing, batch["weights"]
        total = (1 - smoothing) * losses.nll + smoothing * losses.uniform
        total = total + self.config.z_loss * losses.log_normalizer**2
        count = jnp.sum(weights)
        changed = dict(updates)
        recorded = changed.pop("attention", {})
        return LossOutput(
            loss=(jnp.sum(weights * total), count),
            metrics={"nll": (jnp.sum(weights * losses.nll), count)},
            model_state={**model_state, **changed},
            attention=recorded,
        )

    def evaluate(self, variables: Any, batch: Any) -> dict[str, jax.Array]:
        """Sum of nats and number of tokens of a batch."""
        losses: Any = self.model.apply(
            variables, batch["tokens"], batch["targets"], **self._positions(batch), method="losses"
        )
        weights = batch["weights"] * batch["mask"][:, None]
        return {"nll": jnp.sum(weights * losses.nll), "tokens": jnp.sum(weights)}

    def generate(
        self, variables: Any, prompts: list[str], rng: jax.Array, *, max_length: int, **sampling: Any
    ) -> list[str]:
        """Continues texts; nothing of the prompts is changed.

        Args:
          variables: of the model, reparametrised or not.
          prompts: begin documents.
          max_length: tokens of a text, its begin and end among them.
          sampling: see `sigmarep.models.decoding.sample`.

        Raises:
          BadInput: a prompt has too many tokens, or the model no positions for so many.
        """
        if self.config.model.positions == "learned" and max_length > self.config.data.sequence_length:
            raise BadInput(
                f"max_length = {max_length}: the learned positions end at {self.config.data.sequence_length} "
                "(config.data.sequence_length)"
            )
        # The form of the text that the vocabulary was trained on (`token_cache.feature`).
        texts = [unicodedata.normalize("NFC", prompt) for prompt in prompts]
        ids = [np.append(BOS, self.vocabulary.encode(text)) for text in texts]
        lengths = np.array([len(each) for each in ids])
        if lengths.max() >= max_length:
            raise BadInput(
                f"prompt {int(np.argmax(lengths)) + 1}: has {lengths.max()} tokens; expected fewer than "
                f"max_length = {max_length}"
            )
        prompt = np.full((len(ids), lengths.max()), PAD, np.int32)
        for row, each in zip(prompt, ids, strict=True):
            row[: len(each)] = each
        model = self.plain_module

        def step(plain, tokens, position, cache):
            logits, cache = model.apply(
                {**plain, **cache},
                tokens[:, None],
                positions=jnp.full((1, 1), position),
                cache_length=max_length,
                mutable=["cache"],
            )
            return logits[:, 0], cache

        @jax.jit
        def run(variables):
            bound = functools.partial(step, {"params": fold(variables)})
            cache = decoding.empty_cache(bound, len(ids))
            return decoding.sample(
                bound, cache, jnp.asarray(prompt), jnp.asarray(lengths), rng, max_length=max_length, eos=EOS, **sampling
            )

        return [self.vocabulary.decode(row) for row in np.asarray(run(variables))]
