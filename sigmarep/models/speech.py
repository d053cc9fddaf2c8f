"""The speech Transformer of the paper's code: filterbank frames to label logits, one for every third frame."""

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from sigmarep.nn import SigmaConv, SigmaDense, TransformerConfig, TransformerStack
from sigmarep.nn.norms import MaskedNorm
from sigmarep.nn.positions import ContinuousPositions
from sigmarep.nn.visibility import Visibility


class SpeechOutput(NamedTuple):
    """Label logits (B, ⌈T/stride⌉, V) float32, and the number of valid frames of each utterance, (B,) int32."""

    logits: jax.Array
    frames: jax.Array


class SpeechTransformer(nn.Module):
    """Convolution with a gated linear unit, CAPE positions, Transformer blocks, and a linear layer to the labels.

    Outputs do not depend on padding: the convolution window of output t begins (conv_kernel − conv_stride)//2 frames
    before frame stride·t, frames outside the utterance are zeros, and ⌊frames/stride⌋ outputs are valid. (This is the
    "SAME" padding of the paper's code, for T a multiple of the stride.)

    Attributes:
      transformer: configuration of the blocks. A numeric `gamma_init` applies to the blocks only: γ of the last layer
        starts at 1, so that its logits can differ from the first step.
      num_labels: V, including the blank (label 0).
      conv_kernel, conv_stride: in frames.
      conv_reparam: reparametrizes the convolution like the blocks.
      normalise: normalizes each utterance over its real frames and filters first.
      dropout: rate after the front end.
      freq_scale, max_global_shift, max_local_shift, max_scale: see `sigmarep.nn.positions.ContinuousPositions`.
      frame_seconds: time between two input frames.
    """

    transformer: TransformerConfig
    num_labels: int
    conv_kernel: int = 7
    conv_stride: int = 3
    conv_reparam: bool = False
    normalise: bool = True
    dropout: float = 0.0
    freq_scale: float = 30.0
    max_global_shift: float = 0.0
    max_local_shift: float = 0.0
    max_scale: float = 1.0
    frame_seconds: float = 0.01

    @nn.compact
    def __call__(self, features: jax.Array, frames: jax.Array, *, deterministic: bool = True) -> SpeechOutput:
        """Computes the logits of every label.

        Args:
          features: (B, T, F) filterbanks, T a multiple of conv_stride.
          frames: (B,) int, number of real frames among the T.

        Raises:
          ValueError: conv_stride is below 1 or above conv_kernel, or T is not a multiple of it.
        """
        c, stride, length = self.transformer, self.conv_stride, features.shape[1]
        if stride < 1 or self.conv_kernel < stride:
            raise ValueError(
                f"conv_stride = {stride}, conv_kernel = {self.conv_kernel}: expected a stride of at least 1 and a kernel "
                "of at least the stride"
            )
        if length % stride:
            raise ValueError(f"conv_stride = {stride}: does not divide the {length} frames of the batch")
        real = jnp.arange(length)[None] < frames[:, None]
        if self.normalise:
            x = MaskedNorm(dtype=c.dtype, name="input_norm")(features, real)
        else:
            x = jnp.where(real[:, :, None], features, 0.0).astype(c.dtype)
        fan_in = self.conv_kernel * features.shape[-1]
        left = (self.conv_kernel - stride) // 2
        options = c.reparametrization()
        plain = not self.conv_reparam or options["reparam"] == "none"
        x = SigmaConv(
            2 * c.width,
            (self.conv_kernel,),
            (stride,),
            padding=[(left, self.conv_kernel - stride - left)],
            kernel_init=nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform") if plain else c.initializer(),
            bias_init=_uniform(fan_in) if plain else nn.initializers.zeros,
            **options | {"reparam": "none" if plain else c.reparam},
            role="input",
            name="front_end",
        )(x)
        x = nn.Dropout(self.dropout)(nn.glu(x), deterministic=deterministic)
        frames = frames // stride
        real = jnp.arange(x.shape[1])[None] < frames[:, None]
        x = ContinuousPositions(
            delta=self.frame_seconds * stride,
            freq_scale=self.freq_scale,
            max_global_shift=self.max_global_shift,
            max_local_shift=self.max_local_shift,
            max_scale=self.max_scale,
            name="positions",
        )(x, real, deterministic=deterministic)
        x = TransformerStack(c, name="encoder")(x, visibility=Visibility(key_mask=real), deterministic=deterministic)
        plain = options["reparam"] == "none"
        if c.gamma_init != "sigma":
            options["gamma_init"] = "one"
        head = SigmaDense(
            self.num_labels,
            kernel_init=nn.initializers.lecun_uniform() if plain else c.initializer(),
            bias_init=_uniform(c.width) if plain else nn.initializers.zeros,
            **options,
            role="output",
            name="head",
        )
        return SpeechOutput(head(x).astype(jnp.float32), frames)


def _uniform(fan_in: int):
    """Initializer of the biases of plain layers: uniform in ±1/√fan_in."""
    limit = 1 / math.sqrt(fan_in)
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -limit, limit)
