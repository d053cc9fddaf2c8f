"""The normalized Transformer against the formulas of arXiv 2410.01131 in NumPy float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from sigmarep.nn import TransformerConfig, TransformerStack
from sigmarep.nn.attention import MultiHeadAttention
from sigmarep.nn.sphere import unit

CONFIG = TransformerConfig(
    depth=2,
    width=8,
    num_heads=2,
    mlp_dim=12,
    norm="sphere",
    qk_norm="unit",
    activation="silu",
    mlp_gate=True,
    use_bias=False,
    scan=False,
    rotary_base=100.0,
    init_std=0.5,
)
X = jax.random.normal(jax.random.key(0), (2, 5, 8))


def normalized(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def rotated(x, base=100.0):
    """Rotary positions of (B, T, N, H), features i and i + H/2 as a complex number."""
    half = x.shape[-1] // 2
    angles = np.arange(x.shape[1])[:, None] * base ** -(np.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)[:, None]
    return np.concatenate([turned.real, turned.imag], axis=-1)


def attention(h, p):
    """Queries and keys s_qk · Norm(·) after rotation, the softmax's scale √H."""
    query, key, value = (np.einsum("btd,dnh->btnh", h, p[name]["kernel"]) for name in ("query", "key", "value"))
    s_qk = p["query_key"]["scale"] * np.sqrt(8)
    query, key = (s_qk * normalized(rotated(x)) for x in (query, key))
    weights = np.exp(np.einsum("btnh,bsnh->bnts", query, key) * np.sqrt(4))
    weights = weights / weights.sum(-1, keepdims=True)
    return np.einsum("bnts,bsnh,nhd->btd", weights, value, p["out"]["kernel"])


def mlp(h, p):
    up, gate = (h @ p[name]["kernel"] * p[f"{name}_scale"]["scale"] * np.sqrt(8) for name in ("up", "gate"))
    return (gate / (1 + np.exp(-gate)) * up) @ p["down"]["kernel"]


def test_a_stack_is_the_papers_and_its_tokens_are_unit_vectors():
    stack = TransformerStack(CONFIG)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), stack.init(jax.random.key(1), X)
    )
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params["params"])
    h = normalized(np.asarray(X, np.float64))
    for block in (p["block_0"], p["block_1"]):
        for name, branch in (("attention", attention), ("mlp", mlp)):
            alpha = np.abs(block[f"{name}_step"]["scale"] * 0.05 * np.sqrt(8))
            h = normalized(h + alpha * (normalized(branch(h, block[name])) - h))
    found = stack.apply(params, X)
    np.testing.assert_allclose(found, h, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(found, axis=-1), 1.0, rtol=1e-5)


def test_learned_scales_start_where_the_authors_start_them():
    params = TransformerStack(CONFIG).init(jax.random.key(1), X)["params"]["block_0"]
    np.testing.assert_allclose(params["attention_step"]["scale"], np.full(8, 1 / math.sqrt(8)), rtol=1e-6)
    np.testing.assert_allclose(params["mlp_step"]["scale"], np.full(8, 1 / math.sqrt(8)), rtol=1e-6)
    np.testing.assert_allclose(params["attention"]["query_key"]["scale"], np.full((2, 4), 1 / math.sqrt(8)), rtol=1e-6)
    np.testing.assert_array_equal(params["mlp"]["up_scale"]["scale"], np.ones(12))


def test_the_largest_logit_is_at_most_the_root_of_the_heads_features():
    layer = MultiHeadAttention(2, qk_norm="unit", num_kv_heads=1, reparam="none")
    variables = layer.init(jax.random.key(2), 100.0 * X)
    recorded = layer.apply(variables, 100.0 * X, mutable=["attention"])[1]["attention"]
    assert np.all(recorded["max_logit"] <= math.sqrt(4) * (1 + 1e-5))
    assert np.all(recorded["bound"] <= recorded["entropy"])


def test_a_zero_vector_stays_zero_and_has_a_gradient():
    np.testing.assert_array_equal(unit(jnp.zeros((2, 3))), 0.0)
    assert np.all(np.isfinite(jax.grad(lambda x: jnp.sum(unit(x)))(jnp.zeros((2, 3)))))
