"""QK-clip (Kimi Team, 2025): heads whose logits grow too large have their query and key kernels shrunk after the step."""

from typing import Any

import jax
import jax.numpy as jnp

# Parameters of the projections that make queries or keys, with how many slots of theirs do.
SLOTS = {"query": 1, "key": 1, "qk": 2, "qkv": 2}


def qk_clipped(params: Any, attention: Any, threshold: float) -> Any:
    """Parameters whose heads' largest logits of the last step would have been at most `threshold`.

    With S the largest logit of a head and f = min(1, threshold / S), what makes its queries and what makes its keys are
    both multiplied by √f, biases among them.

    Args:
      params: of a model with `MultiHeadAttention`s, not reparametrised.
      attention: the collection that they recorded, `max_logit` (N,) or (layers, N) where they are stacked.
    """
    if "max_logit" not in attention:
        return {
            name: qk_clipped(value, attention[name], threshold) if name in attention else value
            for name, value in params.items()
        }
    largest = attention["max_logit"]
    root = jnp.sqrt(jnp.minimum(1.0, threshold / jnp.maximum(largest, threshold)))
    changed = dict(params)
    for name, slots in SLOTS.items():
        if name in params:
            changed[name] = {leaf: _scaled(x, root, slots, leaf) for leaf, x in params[name].items()}
    return changed


def _scaled(x: jax.Array, root: jax.Array, slots: int, leaf: str) -> jax.Array:
    """Kernel (D, N, H) or (D, slots, N, H), bias without D, each behind an axis of layers where `root` (…, N) has one."""
    stacked = root.ndim - 1
    fused = x.ndim - stacked - (leaf == "kernel") == 3
    factor = root[..., None]
    if fused:
        count = x.shape[stacked + (leaf == "kernel")]
        keep = jnp.arange(count) >= slots
        factor = jnp.where(keep[:, None, None], 1.0, jnp.expand_dims(factor, stacked))
    return x * (jnp.expand_dims(factor, stacked) if leaf == "kernel" else factor).astype(x.dtype)
