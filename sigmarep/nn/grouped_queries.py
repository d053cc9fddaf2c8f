"""Grouped queries (Ainslie et al., 2023): several heads of queries share one head of keys and values."""

import jax
import jax.numpy as jnp


def check(num_heads: int, num_kv_heads: int, qkv: str) -> None:
    """Refuses numbers of heads that do not fit.

    Raises:
      ValueError: `num_kv_heads` is neither 0 nor a divisor of `num_heads`, or the projections are fused.
    """
    if not num_kv_heads:
        return
    if num_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads = {num_kv_heads}: expected a divisor of num_heads = {num_heads}, or 0")
    if qkv != "separate":
        raise ValueError(f"num_kv_heads = {num_kv_heads}: expected qkv = 'separate', not {qkv!r}")


def repeated(x: jax.Array, num_heads: int, *, axis: int = 2) -> jax.Array:
    """Keys or values, one for each of `num_heads` heads of queries: the first group has the first head, and so on."""
    groups = num_heads // x.shape[axis]
    return x if groups == 1 else jnp.repeat(x, groups, axis=axis)
