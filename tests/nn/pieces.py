"""Pieces of a model from outside, which configurations name by their Python names."""

import flax.linen as nn
import jax
import jax.numpy as jnp


def squared_relu(x):
    return jnp.maximum(x, 0.0) ** 2


def ones(key, shape, dtype=jnp.float32):
    return jnp.ones(shape, dtype)


class Centered(nn.Module):
    """Subtracts the mean over features; no parameters."""

    dtype: object = None

    def __call__(self, x):
        return x - x.mean(-1, keepdims=True)


def softplus_weights(logits, mask):
    """ln(1 + exp(a)) divided by the number of keys; the weights of a query do not sum to 1."""
    return jnp.where(mask, jax.nn.softplus(logits), 0.0) / logits.shape[-1]


def by_jax(query, key, value, *, mask, is_causal):
    return jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=is_causal, implementation="xla")


def reversed_positions(query, key, value, positions):
    """Subtracts their positions from queries and keys; in attention to a context doubles the values instead."""
    if positions is None:
        return query, key, 2 * value
    return query - positions[..., None, None], key - positions[..., None, None], value
