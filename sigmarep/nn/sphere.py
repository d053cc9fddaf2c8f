"""The parts of the normalized Transformer, nGPT (Loshchilov et al., 2024, arXiv 2410.01131), whose tokens are unit vectors.

Formulas and initial values are those of the authors' code. A learned scale s that is stored as p = s/√D moves √D times as
far under Adam; so are α and s_qk stored, and s_u is not. Left out are s_z and unit rows of the head, whose kernel keeps a
norm of its own instead, and unit rows of the input table, whose tokens are made unit vectors before the first block.
`optimizer.unit_kernels` keeps the hidden matrices at unit vectors; weight decay and warmup the paper does without.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

# Initial α, of every feature.
ALPHA = 0.05


def unit(x: jax.Array) -> jax.Array:
    """x / ‖x‖ over the last axis, in the type of x; a zero vector stays zero."""
    wide = x.astype(jnp.float32)
    square = jnp.sum(wide * wide, axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(jnp.where(square > 0, square, 1.0))).astype(x.dtype)


class SphereStep(nn.Module):
    """unit(x + α (unit(branch) − x)) with one learned |α| a feature, in place of a residual connection."""

    @nn.compact
    def __call__(self, x: jax.Array, branch: jax.Array) -> jax.Array:
        """Unit vectors (…, D) and any of that shape to unit vectors (…, D)."""
        root = math.sqrt(x.shape[-1])
        scale = self.param("scale", nn.initializers.constant(1 / root), (x.shape[-1],))
        alpha = jnp.abs(scale * (ALPHA * root)).astype(x.dtype)
        return unit(x + alpha * (unit(branch) - x))


class UnitHeads(nn.Module):
    """Queries and keys as unit vectors times s_qk, one number a feature of each head, and √H on the logits.

    s_qk multiplies both; here its square multiplies the queries, which is the same and leaves shared keys alone. The
    logits' own 1/√H is compensated.
    """

    @nn.compact
    def __call__(self, query: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(B, T, N, H) and (B, S, K, H) to the same."""
        *_, heads, features = query.shape
        root = math.sqrt(heads * features)
        scale = self.param("scale", nn.initializers.constant(1 / root), (heads, features))
        squared = (features * (scale * root) ** 2).astype(query.dtype)
        return unit(query) * squared, unit(key)


class HiddenScale(nn.Module):
    """x · s_u · √width, of the MLP's hidden units before the activation; with a gate each of the two has its own.

    Attributes:
      width: D, of the tokens.
    """

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(…, M) to (…, M)."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        return x * (scale * math.sqrt(self.width)).astype(x.dtype)
