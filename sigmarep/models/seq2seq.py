"""Encoder-decoder Transformers for translation."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from sigmarep.nn import TransformerConfig, TransformerStack
from sigmarep.nn.positions import TokenPosition, TokenPositions
from sigmarep.nn.tokens import TokenEmbedding, TokenLosses
from sigmarep.nn.visibility import Visibility

PAD = 0


def deepnorm_constants(encoder_depth: int, decoder_depth: int) -> dict[str, dict[str, float]]:
    """DeepNorm's α and β for an encoder of N and a decoder of M blocks (Wang et al., 2022, table 1).

    Returns:
      The fields of `TransformerConfig` to set, for "encoder" and "decoder".
    """
    n, m = encoder_depth, decoder_depth
    return {
        "encoder": {
            "residual_scale": 0.81 * (n**4 * m) ** (1 / 16),
            "branch_init_scale": 0.87 * (n**4 * m) ** (-1 / 16),
        },
        "decoder": {"residual_scale": (3 * m) ** 0.25, "branch_init_scale": (12 * m) ** -0.25},
    }


class Seq2Seq(nn.Module):
    """Predicts the next token of a translation (B, T), given its source sentence (B, S). Token 0 is padding.

    Attributes:
      encoder, decoder: configurations of the blocks; both have the same width.
      vocabulary_size: V, shared by both languages.
      max_length: number of learned positions.
      positions: "learned", "sinusoidal" or "none". Rotary positions are set by the stacks' `rotary_base`.
      share_embeddings: one embedding table for both languages; False gives each its own.
      tie_embeddings: takes the logits from the decoder's embedding table.
      reparam_embedding: see `sigmarep.nn.tokens.TokenEmbedding`.
      dropout: rate on the embeddings.
    """

    encoder: TransformerConfig
    decoder: TransformerConfig
    vocabulary_size: int
    max_length: int
    positions: TokenPosition = "sinusoidal"
    share_embeddings: bool = True
    tie_embeddings: bool = True
    reparam_embedding: bool = False
    dropout: float = 0.0

    def setup(self):
        def table(config, tied):
            return TokenEmbedding(
                self.vocabulary_size,
                config.width,
                tied=tied,
                reparam_embedding=self.reparam_embedding,
                reparametrization=config.reparametrization(),
                kernel_init=config.initializer(),
            )

        self.tokens = table(self.decoder, self.tie_embeddings)
        self.source_tokens = None if self.share_embeddings else table(self.encoder, True)
        self.position_embedding = TokenPositions(self.positions, self.max_length, name="positions")
        self.embedding_dropout = nn.Dropout(self.dropout)
        self.encoder_stack = TransformerStack(self.encoder, name="encoder")
        self.decoder_stack = TransformerStack(self.decoder, cross_attention=True, name="decoder")

    def encode(self, source: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """The encoder's states, (B, S, D)."""
        positions = jnp.arange(source.shape[1])[None]
        x = (self.source_tokens or self.tokens).encode(source)
        x = self.embedding_dropout(self.position_embedding(x, positions), deterministic=deterministic)
        return self.encoder_stack(x, visibility=Visibility(key_mask=source != PAD), deterministic=deterministic)

    def hidden(
        self,
        inputs: jax.Array,
        memory: jax.Array,
        source: jax.Array,
        *,
        positions: jax.Array | None = None,
        cache_length: int = 0,
        deterministic: bool = True,
    ) -> jax.Array:
        """The decoder's states (B, T, D) given the encoder's, `memory`; `positions` and `cache_length` as in
        `sigmarep.nn.MultiHeadAttention`."""
        if positions is None:
            positions = jnp.arange(inputs.shape[1])[None]
        x = self.position_embedding(self.tokens.encode(inputs), positions)
        x = self.embedding_dropout(x, deterministic=deterministic)
        # Padding follows the words, where no causal query sees it; the statistics leave out its own queries.
        query_mask = None if cache_length else inputs != PAD
        return self.decoder_stack(
            x,
            visibility=Visibility(query_mask=query_mask, is_causal=True),
            positions=positions,
            context=memory,
            context_visibility=Visibility(key_mask=source != PAD, query_mask=query_mask),
            cache_length=cache_length,
            deterministic=deterministic,
        )

    def __call__(self, source: jax.Array, inputs: jax.Array) -> jax.Array:
        """ln p of every next token, (B, T, V), float32."""
        return self.tokens.log_probabilities(self.hidden(inputs, self.encode(source), source))

    def next_token(self, inputs, memory, source, **options) -> jax.Array:
        """ln p of every next token of `inputs`, (B, T, V), given the encoder's states; takes the options of `hidden`."""
        return self.tokens.log_probabilities(self.hidden(inputs, memory, source, **options))

    def losses(self, source: jax.Array, inputs: jax.Array, targets: jax.Array, *, deterministic=True) -> TokenLosses:
        """Losses of `targets` (B, T)."""
        memory = self.encode(source, deterministic=deterministic)
        return self.tokens.losses(self.hidden(inputs, memory, source, deterministic=deterministic), targets)
