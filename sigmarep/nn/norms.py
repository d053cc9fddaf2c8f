"""LayerNorm alternatives, residual-branch scales, and utterance normalization."""

from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

BranchScaling = Literal["none", "layer_scale", "rezero"]
BRANCH_SCALES: tuple[BranchScaling, ...] = get_args(BranchScaling)


class _Pointwise(nn.Module):
    """scale · f(α x) + bias, which uses no statistic of x.

    Attributes:
      alpha_init: initial α, one number per layer.
    """

    alpha_init: float = 0.5
    use_bias: bool = True
    dtype: Any = None

    def function(self, x: jax.Array) -> jax.Array:
        """f, of each number."""
        raise NotImplementedError

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(…, D) to (…, D)."""
        alpha = self.param("alpha", nn.initializers.constant(self.alpha_init), ())
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],)) if self.use_bias else jnp.zeros(())
        alpha, scale, bias = (each.astype(self.dtype or x.dtype) for each in (alpha, scale, bias))
        return scale * self.function(alpha * x) + bias


class DynamicTanh(_Pointwise):
    """scale · tanh(α x) + bias (Zhu et al., 2025, "Transformers without normalization").

    Attributes:
      alpha_init: initial α, one number per layer.
    """

    def function(self, x: jax.Array) -> jax.Array:
        """tanh x."""
        return jnp.tanh(x)


class DynamicErf(_Pointwise):
    """scale · erf(α x + shift) + bias (Chen et al., 2025, arXiv 2512.10938, "Derf").

    α and the shift are one number each; as in the authors' code, scale, bias and the shift start as a plain erf(α x).

    Attributes:
      alpha_init: initial α.
    """

    def function(self, x: jax.Array) -> jax.Array:
        """erf(x + shift)."""
        return jax.lax.erf(x + self.param("shift", nn.initializers.zeros, ()).astype(x.dtype))


# Functions of each number in the place of a norm, by their names in `norm_type`.
POINTWISE: dict[str, type[_Pointwise]] = {"dyt": DynamicTanh, "derf": DynamicErf}
NORM_TYPES = ("layer", "rms", *POINTWISE)


class BranchScale(nn.Module):
    """Multiplies a residual branch by a learned scale that starts small.

    Attributes:
      kind: "layer_scale", one number per feature (Touvron et al., 2021, "Going deeper with image transformers");
        "rezero", one number for the branch, initially 0 (Bachlechner et al., 2021).
      start: initial value of layer_scale.
    """

    kind: BranchScaling
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
    """Normalizes each sequence over all its real steps and features together, then applies a scalar scale and bias.

    Padding is set to 0 and does not count in the mean and the standard deviation.

    Attributes:
      epsilon: added to the standard deviation.
    """

    epsilon: float = 1e-7
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """(B, T, F) to (B, T, F); `mask` (B, T) is True for real steps."""
        scale = self.param("scale", nn.initializers.ones, ())
        bias = self.param("bias", nn.initializers.zeros, ())
        real = mask[:, :, None]
        x = jnp.where(real, x.astype(jnp.float32), 0.0)
        count = jnp.maximum(jnp.sum(mask, axis=1), 1)[:, None, None] * x.shape[-1]
        centered = jnp.where(real, x - jnp.sum(x, axis=(1, 2), keepdims=True) / count, 0.0)
        # The square root has no derivative at 0.
        variance = jnp.sum(centered**2, axis=(1, 2), keepdims=True) / count
        std = jnp.sqrt(jnp.maximum(variance, jnp.finfo(jnp.float32).tiny))
        normalized = scale * centered / (std + self.epsilon) + bias
        return jnp.where(real, normalized, 0.0).astype(self.dtype or x.dtype)
