"""Position embeddings."""

import dataclasses
from typing import ClassVar, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sigmarep.nn.layers import Axes

POSITIONS = ("learned", "sincos", "none")
TokenPosition = Literal["learned", "sinusoidal", "none"]
TOKEN_POSITIONS: tuple[TokenPosition, ...] = get_args(TokenPosition)


def sincos_2d(height: int, width: int, features: int) -> np.ndarray:
    """Fixed two-dimensional sine-cosine embedding, (height · width, features), as in MoCo v3 and MAE.

    The four quarters of the features are the sine and cosine of the column, then the sine and cosine of the row, at
    frequencies 10000^(−i/(features/4)).

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
    """Sinusoidal embedding of positions (...), (..., features), sines first (Vaswani et al., 2017).

    Raises:
      ValueError: `features` is odd.
    """
    if features % 2:
        raise ValueError(f"width = {features}: sinusoidal positions need an even number")
    angles = positions[..., None] * _frequencies(features, base)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Rotary positions of queries and keys, as a function that `MultiHeadAttention.process_heads` could be."""

    base: float = 10_000.0

    def __call__(
        self, query: jax.Array, key: jax.Array, value: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries and keys (B, T, N, H) rotated by their positions (B or 1, T), and the values."""
        return rotated(query, positions, self.base), rotated(key, positions, self.base), value


def rotated(x: jax.Array, positions: jax.Array, base: float = 10_000.0) -> jax.Array:
    """Applies rotary positions (Su et al., 2021): feature i is paired with feature i + H/2.

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

    linear_axes: ClassVar = {"embedding": Axes(inputs=(0, 1), outputs=(2,), role="position")}

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.normal(self.std)
        embedding = self.param("embedding", init, (1, *x.shape[1:]), jnp.float32)
        return x + embedding.astype(x.dtype)


class TokenPositions(nn.Module):
    """Adds the embedding of positions (B or 1, T) to tokens (B, T, D).

    Attributes:
      kind: one of `TOKEN_POSITIONS`.
      length: number of learned vectors.
      std: initial standard deviation of learned vectors.
    """

    kind: TokenPosition
    length: int
    std: float = 0.02

    linear_axes: ClassVar = {"embedding": Axes(inputs=(0,), outputs=(1,), role="position")}

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


class ContinuousPositions(nn.Module):
    """Adds sinusoids of continuous positions, randomly shifted and scaled in training (CAPE, Likhomanenko et al., 2021).

    The position of a step is its time in seconds minus the mean time of the sequence's real steps. In training it becomes
    λ·(position + global shift + local shift). Feature i of D is sin(position · w + (i mod 2)·π/2) with
    w = freq_scale · 10000^(−2⌊i/2⌋/D).

    Attributes:
      delta: seconds between two steps.
      freq_scale: frequency of the fastest sinusoid, in radians per second.
      max_global_shift: bound of the uniform shift of each sequence, in seconds.
      max_local_shift: bound of the uniform shift of each step, in steps.
      max_scale: ln λ of each sequence is uniform in ± ln max_scale.
    """

    delta: float = 0.03
    freq_scale: float = 30.0
    max_global_shift: float = 0.0
    max_local_shift: float = 0.0
    max_scale: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """(B, T, D) to (B, T, D); `mask` (B, T) is True for real steps.

        Raises:
          ValueError: `max_scale` is below 1 or a shift below 0.
        """
        if self.max_scale < 1 or min(self.max_global_shift, self.max_local_shift) < 0:
            raise ValueError(
                f"max_scale = {self.max_scale}, max_global_shift = {self.max_global_shift}, max_local_shift = "
                f"{self.max_local_shift}: expected at least 1, 0 and 0"
            )
        batch, length, features = x.shape
        index = jnp.arange(length, dtype=jnp.float32)[None]
        count = jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)
        positions = self.delta * (index - jnp.sum(jnp.where(mask, index, 0.0), axis=1, keepdims=True) / count)
        if not deterministic:
            # Each draw uses its own key.
            if self.max_global_shift:
                positions += self._uniform((batch, 1), self.max_global_shift)
            if self.max_local_shift:
                positions += self._uniform((batch, length), self.max_local_shift * self.delta)
            if self.max_scale > 1:
                positions *= jnp.exp(self._uniform((batch, 1), float(np.log(self.max_scale))))
        feature = np.arange(features)
        frequencies = self.freq_scale * 10_000.0 ** (-2.0 * (feature // 2) / features)
        phases = (feature % 2) * np.pi / 2
        angles = positions[..., None] * frequencies.astype(np.float32) + phases.astype(np.float32)
        return x + jnp.sin(angles).astype(x.dtype)

    def _uniform(self, shape: tuple[int, ...], limit: float) -> jax.Array:
        return jax.random.uniform(self.make_rng("dropout"), shape, jnp.float32, -limit, limit)
