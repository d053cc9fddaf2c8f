"""Position embeddings."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

POSITIONS = ("learned", "sincos", "none")


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


class LearnedPositions(nn.Module):
    """Adds a learned vector to every position of (B, T, D)."""

    std: float = 0.02

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.normal(self.std)
        embedding = self.param("embedding", init, (1, *x.shape[1:]), jnp.float32)
        return x + embedding.astype(x.dtype)
