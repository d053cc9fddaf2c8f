"""A Vision Transformer that predicts the pixels of hidden patches (SimMIM, Xie et al., 2022)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from sigmarep.nn import SigmaDense, TransformerConfig, TransformerStack
from sigmarep.nn.positions import LearnedPositions


def patches(images: jax.Array, size: int) -> jax.Array:
    """Cuts images (B, H, W, C) into patches (B, H·W/size², size²·C), row by row."""
    batch, height, width, channels = images.shape
    x = images.reshape(batch, height // size, size, width // size, size, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, size * size * channels)


class MaskedViT(nn.Module):
    """Predicts patches (B, N, pixels) from images (B, H, W, C) of which the patches `hidden` (B, N) are not seen.

    The encoder is given a learned vector in place of a hidden patch; one layer makes pixels of its outputs.

    Attributes:
      transformer: configuration of the blocks.
      patch_size: side of a patch, in pixels.
    """

    transformer: TransformerConfig
    patch_size: int

    @nn.compact
    def __call__(self, images: jax.Array, hidden: jax.Array, *, deterministic: bool = True) -> jax.Array:
        features = self.encode(images, hidden, deterministic=deterministic)
        pixels = self.patch_size**2 * images.shape[-1]
        c = self.transformer
        return SigmaDense(pixels, kernel_init=c.initializer(), name="head", **c.reparametrization())(features)

    @nn.compact
    def encode(self, images: jax.Array, hidden: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Features (B, N, D) of all patches."""
        c = self.transformer
        embed = SigmaDense(c.width, kernel_init=c.initializer(), name="patch_embedding", **c.reparametrization())
        x = embed(patches(images, self.patch_size))
        token = self.param("mask_token", nn.initializers.normal(0.02), (c.width,), jnp.float32)
        x = jnp.where(hidden[..., None], token.astype(x.dtype), x)
        x = LearnedPositions(name="positions")(x)
        return TransformerStack(c, name="encoder")(x, deterministic=deterministic)
