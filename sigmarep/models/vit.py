"""Vision Transformers (Dosovitskiy et al., 2021; sizes Ti and S from Touvron et al., 2021)."""

import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sigmarep.nn import SigmaConv, SigmaDense, TransformerConfig, TransformerStack
from sigmarep.nn.positions import POSITIONS, LearnedPositions, sincos_2d

POOLS = ("token", "mean")

SIZES: dict[str, dict[str, int]] = {
    "Ti": {"depth": 12, "width": 192, "num_heads": 3, "mlp_dim": 768},
    "S": {"depth": 12, "width": 384, "num_heads": 6, "mlp_dim": 1536},
    "B": {"depth": 12, "width": 768, "num_heads": 12, "mlp_dim": 3072},
    "L": {"depth": 24, "width": 1024, "num_heads": 16, "mlp_dim": 4096},
    "H": {"depth": 32, "width": 1280, "num_heads": 16, "mlp_dim": 5120},
}


def variant(name: str) -> dict[str, int]:
    """Sizes of a variant such as "B/16": depth, width, num_heads, mlp_dim and patch_size.

    Raises:
      ValueError: the name is not SIZE/PATCH with a known size.
    """
    match = re.fullmatch(r"(\w+)/(\d+)", name)
    if not match or match[1] not in SIZES or not int(match[2]):
        raise ValueError(f"variant = {name!r}: expected one of {', '.join(SIZES)}, a slash and the patch size, as B/16")
    return {**SIZES[match[1]], "patch_size": int(match[2])}


class ViT(nn.Module):
    """Maps images (B, height, width, channels) to logits (B, num_classes), or to features (B, D) if num_classes is 0.

    Attributes:
      transformer: configuration of the blocks.
      patch_size: side of a patch, in pixels.
      num_classes: outputs of the last layer; 0 omits the layer.
      positions: "learned", "sincos" (fixed, two-dimensional) or "none".
      pool: "token", a learned class token; "mean", the mean over patches.
      patch_gain: factor on the initial standard deviation of the patch convolution (0.125 for L and H in the paper's
        code).
      dropout: rate after the position embedding.
      frozen_patches: stops the gradient at the patch embedding (Chen, Xie and He, 2021, section 4.2).
    """

    transformer: TransformerConfig
    patch_size: int
    num_classes: int
    positions: str = "learned"
    pool: str = "token"
    patch_gain: float = 1.0
    dropout: float = 0.0
    frozen_patches: bool = False

    @nn.compact
    def __call__(self, images: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Computes logits or features.

        Raises:
          ValueError: the patch does not divide the image, or `positions` or `pool` is unknown.
        """
        c, patch = self.transformer, self.patch_size
        batch, height, width, _ = images.shape
        if height % patch or width % patch:
            raise ValueError(f"patch_size = {patch}: does not divide the image of {height} x {width} pixels")
        for name, words in (("positions", POSITIONS), ("pool", POOLS)):
            if getattr(self, name) not in words:
                raise ValueError(f"{name} = {getattr(self, name)!r}: expected one of {', '.join(words)}")
        shared: dict[str, Any] = c.reparametrization()
        x = SigmaConv(
            c.width,
            (patch, patch),
            strides=(patch, patch),
            padding="VALID",
            kernel_init=c.initializer(self.patch_gain),
            role="input",
            name="patch_embedding",
            **shared,
        )(images)
        x = jax.lax.stop_gradient(x) if self.frozen_patches else x
        rows, columns = x.shape[1:3]
        x = x.reshape(batch, rows * columns, c.width)
        if self.positions == "sincos":
            x = x + jnp.asarray(sincos_2d(rows, columns, c.width), x.dtype)
        if self.pool == "token":
            token = self.param("class_token", nn.initializers.normal(0.02), (1, 1, c.width), jnp.float32)
            x = jnp.concatenate([jnp.broadcast_to(token, (batch, 1, c.width)).astype(x.dtype), x], axis=1)
        if self.positions == "learned":
            x = LearnedPositions(name="positions")(x)
        x = nn.Dropout(self.dropout)(x, deterministic=deterministic)
        x = TransformerStack(c, name="encoder")(x, deterministic=deterministic)
        x = x[:, 0] if self.pool == "token" else jnp.mean(x, axis=1)
        if not self.num_classes:
            return x
        return SigmaDense(self.num_classes, kernel_init=c.initializer(), role="output", name="head", **shared)(x)
