"""The speech Transformer of the paper's code: frames of filterbanks to labels, one for every third frame."""

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from sigmarep.nn import SigmaConv, SigmaDense, TransformerConfig, TransformerStack
from sigmarep.nn.norms import MaskedNorm
from sigmarep.nn.positions import ContinuousPositions


class SpeechOutput(NamedTuple):
    """`logits` (B, ⌈T/stride⌉, V) float32, of which the first `frames` (B,) int32 of each utterance count."""

    logits: jax.Array
    frames: jax.Array


class SpeechTransformer(nn.Module):
    """Convolution with a gated linear unit, CAPE positions, Transformer blocks and one linear layer to the labels.

    An utterance's outputs do not depend on how it is padded: the convolution's window of output t begins
    (conv_kernel − conv_stride)//2 frames before frame stride·t, zeros stand outside the utterance, and ⌊frames/stride⌋
    outputs count. (Where T is a multiple of the stride that is the padding "SAME" of the paper's code.)

    Attributes:
      transformer: the blocks. A number as its `gamma_init` is theirs alone: the last layer starts at 1, so that its logits
        can differ from the first step on.
      num_labels: V, the blank (label 0) among them.
      conv_kernel, conv_stride: frames.
      conv_reparam: reparametrises the convolution as the blocks are.
      normalise: normalises each utterance over its real frames and filters first.
      dropout: rate after the front end.
      freq_scale, max_global_shift, max_local_shift, max_scale: see `sigmarep.nn.positions.ContinuousPositions`.
      frame_seconds: between two input frames.
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
        """Logits of every label.

        Args:
          features: (B, T, F) filterbanks, T a multiple of conv_stride.
          frames: (B,) int, how many of T are real.

        Raises:
          ValueError: a field has an impossible value, or T is no multiple of the stride.
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
        plain = not self.conv_reparam or c.reparam == "none"
        x = SigmaConv(
            2 * c.width,
            (self.conv_kernel,),
            (stride,),
            padding=[(left, self.conv_kernel - stride - left)],
            kernel_init=nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform") if plain else c.initializer(),
            bias_init=_uniform(fan_in) if plain else nn.initializers.zeros,
            **c.reparametrisation() | {"reparam": "none" if plain else c.reparam},
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
        x = TransformerStack(c, name="encoder")(x, key_padding=real, deterministic=deterministic)
        plain = c.reparam == "none"
        options = c.reparametrisation()
        if c.gamma_init != "sigma":
            options["gamma_init"] = "one"
        head = SigmaDense(
            self.num_labels,
            kernel_init=nn.initializers.lecun_uniform() if plain else c.initializer(),
            bias_init=_uniform(c.width) if plain else nn.initializers.zeros,
            **options,
            name="head",
        )
        return SpeechOutput(head(x).astype(jnp.float32), frames)


def _uniform(fan_in: int):
    """U(±1/√fan_in), of the biases of plain layers."""
    limit = 1 / math.sqrt(fan_in)
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -limit, limit)
