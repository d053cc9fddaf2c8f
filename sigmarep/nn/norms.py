"""What stands where a Transformer has LayerNorm, what scales its branches, and the norm of a whole utterance."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

NORM_TYPES = ("layer", "rms", "dyt")
BRANCH_SCALES = ("none", "layer_scale", "rezero")


class DynamicTanh(nn.Module):
    """scale · tanh(α x) + bias, without any statistic of x (Zhu et al., 2025, "Transformers without normalization").

    Attributes:
      alpha_init: α at the start, one number a layer.
    """

    alpha_init: float = 0.5
    use_bias: bool = True
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(…, D) to (…, D)."""
        alpha = self.param("alpha", nn.initializers.constant(self.alpha_init), ())
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],)) if self.use_bias else jnp.zeros(())
        alpha, scale, bias = (each.astype(self.dtype or x.dtype) for each in (alpha, scale, bias))
        return scale * jnp.tanh(alpha * x) + bias


class BranchScale(nn.Module):
    """Multiplies a residual branch by learned numbers that start small.

    Attributes:
      kind: "layer_scale", one number a feature (Touvron et al., 2021, "Going deeper with image transformers"); "rezero",
        one for the branch that starts at 0 (Bachlechner et al., 2021).
      start: of layer_scale.
    """

    kind: str
    start: float = 1e-4

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(…, D) to (…, D)."""
        rezero = self.kind == "rezero"
        scale = self.param(
            "scale", nn.initializers.constant(0.0 if rezero else self.start), () if rezero else (x.shape[-1],)
        )
        return x * scale.astype(x.dtype)


class MaskedNorm(nn.Module):
    """Normalises each sequence over all its real steps and features at once, then scale · x + bias with two scalars.

    Padding becomes 0, and has no part in the mean and the standard deviation.

    Attributes:
      epsilon: added to the standard deviation.
    """

    epsilon: float = 1e-7
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, padding: jax.Array) -> jax.Array:
        """(B, T, F) to (B, T, F); `padding` (B, T) is True for real steps, as in `MultiHeadAttention`."""
        scale = self.param("scale", nn.initializers.ones, ())
        bias = self.param("bias", nn.initializers.zeros, ())
        real = padding[:, :, None]
        x = jnp.where(real, x.astype(jnp.float32), 0.0)
        count = jnp.maximum(jnp.sum(padding, axis=1), 1)[:, None, None] * x.shape[-1]
        centred = jnp.where(real, x - jnp.sum(x, axis=(1, 2), keepdims=True) / count, 0.0)
        # The root of 0 has no derivative.
        variance = jnp.sum(centred**2, axis=(1, 2), keepdims=True) / count
        std = jnp.sqrt(jnp.maximum(variance, jnp.finfo(jnp.float32).tiny))
        normalised = scale * centred / (std + self.epsilon) + bias
        return jnp.where(real, normalised, 0.0).astype(self.dtype or x.dtype)
