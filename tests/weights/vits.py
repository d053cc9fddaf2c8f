"""A tiny ViT of this project with the weights of a file in place, and one in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np

from sigmarep.models.vit import ViT
from sigmarep.nn import TransformerConfig
from sigmarep.nn.layers import describe
from sigmarep.weights import load

SIZES = {"depth": 2, "width": 8, "num_heads": 2, "mlp_dim": 16}


def vit(num_classes=3, patch_size=4, pool="token", **fields):
    return ViT(TransformerConfig(**SIZES | fields), patch_size=patch_size, num_classes=num_classes, pool=pool)


def described(model, size=8, channels=3):
    return describe(model.init, jax.random.key(1), jnp.zeros((1, size, size, channels)))


def begun(model, arrays, *, size=8, word="timm", **options):
    """Variables of a model that begins from arrays, and the account of them."""
    layers = described(model, size)
    weights = load.fit(arrays, layers, word=word, path="weights.npz", **options)
    return started(layers, weights, size), weights


def started(layers, weights, size=8):
    """The variables with these weights in place, made by one program as the trainer does it."""

    def start(params):
        return load.begin(layers.initialize(jax.random.key(1), jnp.zeros((1, size, size, 3))), params, layers)

    return jax.jit(start)(weights.params)


def numpy_vit(w, images):
    """Logits of a ViT of big_vision, in float64 from its parameters by name."""
    w = {name: np.asarray(x, np.float64) for name, x in w.items()}
    batch, size, _, channels = images.shape
    patch = w["embedding/kernel"].shape[0]
    side = size // patch
    x = images.astype(np.float64).reshape(batch, side, patch, side, patch, channels).transpose(0, 1, 3, 2, 4, 5)
    x = x.reshape(batch, side * side, -1) @ w["embedding/kernel"].reshape(-1, w["cls"].shape[-1]) + w["embedding/bias"]
    x = np.concatenate([np.repeat(w["cls"], batch, 0), x + w["pos_embedding"]], axis=1)

    def norm(x, name):
        centered = x - x.mean(-1, keepdims=True)
        return centered / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * w[f"{name}/scale"] + w[f"{name}/bias"]

    def gelu(x):
        return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    for i in range(2):
        block = f"Transformer/encoderblock_{i}"
        attention, mlp = f"{block}/MultiHeadDotProductAttention_0", f"{block}/MlpBlock_0"
        y = norm(x, f"{block}/LayerNorm_0")
        q, k, v = (
            np.einsum("btd,dnh->bnth", y, w[f"{attention}/{each}/kernel"]) + w[f"{attention}/{each}/bias"][:, None]
            for each in ("query", "key", "value")
        )
        logits = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        y = weights / weights.sum(-1, keepdims=True) @ v
        x = x + np.einsum("bnth,nhd->btd", y, w[f"{attention}/out/kernel"]) + w[f"{attention}/out/bias"]
        y = gelu(norm(x, f"{block}/LayerNorm_1") @ w[f"{mlp}/Dense_0/kernel"] + w[f"{mlp}/Dense_0/bias"])
        x = x + y @ w[f"{mlp}/Dense_1/kernel"] + w[f"{mlp}/Dense_1/bias"]
    return norm(x, "Transformer/encoder_norm")[:, 0] @ w["head/kernel"] + w["head/bias"]
