"""Decoder-only language models."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from sigmarep.nn import TransformerConfig, TransformerStack
from sigmarep.nn.positions import TokenPosition, TokenPositions
from sigmarep.nn.tokens import TokenEmbedding, TokenLosses
from sigmarep.nn.visibility import Visibility


class LanguageModel(nn.Module):
    """Predicts the next token at every position of tokens (B, T).

    Attributes:
      transformer: configuration of the blocks.
      vocabulary_size: V.
      max_length: number of learned positions.
      positions: "learned", "sinusoidal" or "none". Rotary positions are set by the transformer's `rotary_base`.
      tie_embeddings, adaptive_cutoffs, reparam_embedding, output_logit_cap: see `sigmarep.nn.tokens.TokenEmbedding`.
      dropout: rate on the embeddings.
      logit_chunk: number of positions whose logits `losses` computes at a time; 0 for all.
    """

    transformer: TransformerConfig
    vocabulary_size: int
    max_length: int
    positions: TokenPosition = "none"
    tie_embeddings: bool = True
    adaptive_cutoffs: Sequence[int] = ()
    reparam_embedding: bool = False
    output_logit_cap: float = 0.0
    dropout: float = 0.0
    logit_chunk: int = 0

    def setup(self):
        c = self.transformer
        self.tokens = TokenEmbedding(
            self.vocabulary_size,
            c.width,
            tied=self.tie_embeddings,
            cutoffs=self.adaptive_cutoffs,
            reparam_embedding=self.reparam_embedding,
            reparametrization=c.reparametrization(),
            kernel_init=c.initializer(),
            logit_cap=self.output_logit_cap,
        )
        self.position_embedding = TokenPositions(self.positions, self.max_length, name="positions")
        self.embedding_dropout = nn.Dropout(self.dropout)
        self.decoder = TransformerStack(c)

    def hidden(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        cache_length: int = 0,
        deterministic: bool = True,
    ) -> jax.Array:
        """The decoder's states, (B, T, D).

        Args:
          tokens: (B, T).
          positions: (B or 1, T); 0, 1, … if None.
          segments: int (B, T), documents that do not see each other, and 0 for padding; one document if None.
          cache_length, deterministic: as in `sigmarep.nn.MultiHeadAttention`.
        """
        if positions is None:
            positions = jnp.arange(tokens.shape[1])[None]
        x = self.position_embedding(self.tokens.encode(tokens), positions)
        x = self.embedding_dropout(x, deterministic=deterministic)
        return self.decoder(
            x,
            visibility=Visibility(segments=segments, is_causal=True),
            positions=positions,
            cache_length=cache_length,
            deterministic=deterministic,
        )

    def __call__(self, tokens: jax.Array, **options) -> jax.Array:
        """ln p of every next token, (B, T, V), float32; takes the options of `hidden`."""
        return self.tokens.log_probabilities(self.hidden(tokens, **options))

    def losses(self, tokens: jax.Array, targets: jax.Array, **options) -> TokenLosses:
        """Losses of `targets` (B, T); takes the options of `hidden`."""
        return self.tokens.losses(self.hidden(tokens, **options), targets, chunk=self.logit_chunk)
