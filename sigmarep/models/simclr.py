"""Contrastive learning of a ViT: SimCLR (Chen et al., 2020) and MoCo v3 (Chen, Xie and He, 2021).

Shapes: B images, V = 2 views of each, D features of a projection. The views of image i are the adjacent rows 2i and
2i + 1, so that a batch spread over devices needs no reshuffling.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from sigmarep.models.vit import ViT
from sigmarep.nn import SigmaDense
from sigmarep.nn.linear import Reparam

HEAD_NORMS = ("batch", "none")


class Sums(NamedTuple):
    """Sums over this device's anchors: the losses, the number whose positive ranks first, and the number of anchors."""

    loss: jax.Array
    correct: jax.Array
    weight: jax.Array


class Head(nn.Module):
    """An MLP of `layers` dense layers: a projector or predictor.

    With norm="batch" every dense layer loses its bias and is followed by batch normalization; the last normalization has
    no learned scale and bias. A ReLU follows every layer but the last.

    Attributes:
      layers: number of dense layers.
      hidden: features of every layer but the last.
      width: features of the last layer.
      norm: "batch", over all rows of the batch, both views together; or "none".
      reparam: see `sigmarep.nn.linear.ReparametrizedLayer`. Batch normalization cancels the scale of the layer before it,
        γ/σ included.
      axis_name: axis over which pmap spreads the batch; None where arrays are global already.
    """

    layers: int
    hidden: int
    width: int
    norm: str = "batch"
    reparam: Reparam = "none"
    axis_name: str | None = None
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """(rows, features) to (rows, width).

        Raises:
          ValueError: `norm` is unknown, or a size is below 1.
        """
        if self.norm not in HEAD_NORMS:
            raise ValueError(f"norm = {self.norm!r}: expected one of {', '.join(HEAD_NORMS)}")
        for name in ("layers", "hidden", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: expected at least 1")
        normed = self.norm == "batch"
        for i in range(self.layers):
            last = i == self.layers - 1
            features = self.width if last else self.hidden
            options: dict[str, Any] = {"reparam": self.reparam, "role": "projector", "dtype": self.dtype}
            x = SigmaDense(features, use_bias=not normed, name=f"dense_{i}", **options)(x)
            if normed:
                x = nn.BatchNorm(
                    use_running_average=not train,
                    momentum=0.9,
                    use_bias=not last,
                    use_scale=not last,
                    axis_name=self.axis_name,
                    dtype=self.dtype,
                    name=f"norm_{i}",
                )(x)
            x = x if last else nn.relu(x)
        return x


class ContrastiveOutputs(NamedTuple):
    """Features of the encoder, their projection, and the prediction: the projection itself without a predictor."""

    features: jax.Array
    projection: jax.Array
    prediction: jax.Array


class ContrastiveModel(nn.Module):
    """A ViT without classifier, a projector and, for MoCo v3, a predictor."""

    vit: ViT
    projector: Head
    predictor: Head | None = None

    def __call__(self, images: jax.Array, *, train: bool = False) -> ContrastiveOutputs:
        """Applies encoder, projector and predictor to images (rows, height, width, channels)."""
        features = self.vit(images, deterministic=not train)
        projection = self.projector(features, train=train)
        prediction = projection if self.predictor is None else self.predictor(projection, train=train)
        return ContrastiveOutputs(features, projection, prediction)

    def encode(self, images: jax.Array) -> jax.Array:
        """Features of the encoder in evaluation mode, (rows, features)."""
        return self.vit(images, deterministic=True)


def nt_xent(projections: jax.Array, temperature: float, *, axis_name: str | None = None) -> Sums:
    """NT-Xent, the normalized temperature-scaled cross-entropy (Chen et al., 2020, eq. 1), over the global batch.

    With z the rows divided by their norms and p(i) the other view of the image of row i, the loss of anchor i is
    −log( exp(z_i·z_p(i)/τ) / Σ_{k≠i} exp(z_i·z_k/τ) ), where k runs over both views of all images on all devices.

    Args:
      projections: (2B, D), the views of image i in rows 2i and 2i + 1.
      temperature: τ.
      axis_name: axis over which pmap spreads the batch; None where the array is global already.

    Returns:
      Sums over the 2B anchors, in float32.
    """
    anchors = _normalized(projections)
    everything, first = _gathered(anchors, axis_name)
    row = first + jnp.arange(len(anchors))
    logits = anchors @ everything.T / temperature
    logits = jnp.where(row[:, None] == jnp.arange(len(everything)), -jnp.inf, logits)
    return _cross_entropy(logits, row ^ 1)


def momentum_contrast(
    predictions: jax.Array, keys: jax.Array, temperature: float, *, axis_name: str | None = None
) -> Sums:
    """MoCo v3's symmetric loss (Chen, Xie and He, 2021, algorithm 1) over the global batch.

    A query is the prediction from one view of an image. Its positive is the momentum encoder's projection of the other
    view of that image; its negatives are the projections of the other view of all other images. The loss is 2τ·CE.

    Args:
      predictions, keys: (2B, D), the views of image i in rows 2i and 2i + 1. No gradient flows into the keys.
      temperature: τ.
      axis_name: as in `nt_xent`.

    Returns:
      Sums over the queries of both views; the weight counts each image once.
    """
    queries = _normalized(predictions).reshape(-1, 2, predictions.shape[-1])
    targets = jax.lax.stop_gradient(_normalized(keys)).reshape(queries.shape)
    everything, first = _gathered(targets, axis_name)
    row = first + jnp.arange(len(queries))
    parts = [_cross_entropy(queries[:, v] @ everything[:, 1 - v].T / temperature, row) for v in range(2)]
    loss, correct = parts[0].loss + parts[1].loss, (parts[0].correct + parts[1].correct) / 2
    return Sums(2 * temperature * loss, correct, parts[0].weight)


def _normalized(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-12))


def _gathered(x: jax.Array, axis_name: str | None) -> tuple[jax.Array, jax.Array | int]:
    """Rows of all devices, and the index of this device's first row among them."""
    if axis_name is None:
        return x, 0
    return jax.lax.all_gather(x, axis_name, tiled=True), jax.lax.axis_index(axis_name) * len(x)


def _cross_entropy(logits: jax.Array, positive: jax.Array) -> Sums:
    picked = jnp.take_along_axis(logits, positive[:, None], axis=1)[:, 0]
    losses = jax.nn.logsumexp(logits, axis=1) - picked
    correct = jnp.argmax(logits, axis=1) == positive
    return Sums(jnp.sum(losses), jnp.sum(correct.astype(jnp.float32)), jnp.float32(len(losses)))
