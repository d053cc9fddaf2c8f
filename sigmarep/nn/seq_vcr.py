"""Seq-VCR (Arefin et al., 2025): a penalty that keeps the hidden states of different sequences apart.

With C the covariance over the sequences of a batch of the states at one position, D features, and the mean over positions,

    (1/D) Σ_k [ max(0, 1 − √(C_kk + η)) + λ Σ_{l≠k} C_kl² ].

λ = 0.004 and η = 0.001. Two choices are this project's: padding is left out, and the penalty is on the output of the last
block.
"""

import jax
import jax.numpy as jnp

COVARIANCE_WEIGHT = 0.004
EPSILON = 1e-3


def seq_vcr(states: jax.Array, real: jax.Array | None = None) -> jax.Array:
    """The penalty, shape ().

    Args:
      states: (B, T, D).
      real: bool (B, T), False for padding; all tokens are real if None. Positions with fewer than two real tokens are left
        out.
    """
    states = states.astype(jnp.float32)
    features = states.shape[-1]
    weight = jnp.ones(states.shape[:2]) if real is None else real.astype(jnp.float32)
    count = jnp.sum(weight, axis=0)
    mean = jnp.einsum("bt,btd->td", weight, states) / jnp.maximum(count, 1.0)[:, None]
    centered = (states - mean) * weight[..., None]
    scale = 1.0 / jnp.maximum(count - 1.0, 1.0)
    variance = scale[:, None] * jnp.sum(centered**2, axis=0)
    # ‖C‖_F² from products of sequences where these are fewer than the features.
    ends = "btd,ctd->tbc" if states.shape[0] < features else "btd,bte->tde"
    products = jnp.einsum(ends, centered, centered)
    off_diagonal = scale**2 * jnp.sum(products**2, axis=(1, 2)) - jnp.sum(variance**2, axis=1)
    spread = jnp.sum(jnp.maximum(0.0, 1.0 - jnp.sqrt(variance + EPSILON)), axis=1)
    counted = (count >= 2).astype(jnp.float32)
    total = jnp.sum(counted * (spread + COVARIANCE_WEIGHT * off_diagonal)) / features
    return total / jnp.maximum(jnp.sum(counted), 1.0)
