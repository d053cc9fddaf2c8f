"""Position embeddings."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

POSITIONS = ("learned", "sincos", "none")
TOKEN_POSITIONS = ("learned", "sinusoidal", "none")


def sincos_2d(height: int, width: int, features: int) -> np.ndarray:
    """Fixed two-dimensional sine-cosine embedding, (height · width, features), as in MoCo v3 and MAE.

    A quarter of the features each holds sin and cos of the column, then sin and cos of the row, at frequencies
    10000^(−i/(features/4)).

    Raises:
      ValueError: 4 does not divide `features`.
    """
    if features % 4:
        raise ValueError(f"width = {features}: sincos positions need a multiple of 4")
    frequencies = 10_000.0 ** -(np.arange(features // 4) / (features // 4))
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    angles = [grid.reshape(-1, 1) * frequencies for grid in (columns, rows)]
    parts = [function(angle) for angle in angles for function in (np.sin, np.cos)]
    return np.concatenate(parts, axis=1).astype(np.float32)


def sincos_1d(positions: jax.Array, features: int, base: float = 10_000.0) -> jax.Array:
    """Sinusoidal embedding of any positions (Vaswani et al., 2017): (..., features), all sines before all cosines.

    Raises:
      ValueError: `features` is odd.
    """
    if features % 2:
        raise ValueError(f"width = {features}: sinusoidal positions need an even number")
    angles = positions[..., None] * _frequencies(features, base)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def rotated(x: jax.Array, positions: jax.Array, base: float = 10_000.0) -> jax.Array:
    """Rotary positions (Su et al., 2021): feature i is paired with feature i + H/2.

    Args:
      x: queries or keys, (B, T, N, H).
      positions: (B or 1, T).

    Raises:
      ValueError: H is odd.
    """
    features = x.shape[-1]
    if features % 2:
        raise ValueError(f"head_dim = {features}: rotary positions need an even number")
    angles = (positions[..., None] * _frequencies(features, base))[:, :, None, :]
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _frequencies(features: int, base: float) -> np.ndarray:
    return (base ** -(np.arange(features // 2) / (features // 2))).astype(np.float32)


class LearnedPositions(nn.Module):
    """Adds a learned vector to every position of (B, T, D)."""

    std: float = 0.02

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.normal(self.std)
        embedding = self.param("embedding", init, (1, *x.shape[1:]), jnp.float32)
        return x + embedding.astype(x.dtype)


class TokenPositions(nn.Module):
    """Adds to tokens (B, T, D) the embedding of their positions (B or 1, T).

    Attributes:
      kind: one of `TOKEN_POSITIONS`.
      length: positions that there are vectors for, if they are learned.
    """

    kind: str
    length: int
    std: float = 0.02

    @nn.compact
    def __call__(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        if self.kind not in TOKEN_POSITIONS:
            raise ValueError(f"positions = {self.kind!r}: expected one of {', '.join(TOKEN_POSITIONS)} or rotary")
        if self.kind == "none":
            return x
        if self.kind == "sinusoidal":
            return x + sincos_1d(positions, x.shape[-1]).astype(x.dtype)
        init = nn.initializers.normal(self.std)
        embedding = self.param("embedding", init, (self.length, x.shape[-1]), jnp.float32)
        return x + embedding[positions].astype(x.dtype)
