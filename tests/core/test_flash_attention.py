"""The fused attention kernels, interpreted, against float64; lowered for a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sigmarep.core import flash_kernels
from sigmarep.core.entropy import attention_statistics
from sigmarep.core.flash_attention import NO_KEY, flash_attention

BLOCK = 16


def inputs(queries, keys, features, *, std=1.0, dtype=jnp.float32, heads=2):
    rng = np.random.default_rng(queries * keys + features)
    shapes = [(2, length, heads, features) for length in (queries, keys, keys)]
    arrays = [rng.normal(size=shape) * scale for shape, scale in zip(shapes, (std, 1.0, 1.0), strict=True)]
    return [jnp.asarray(array, dtype) for array in arrays]


def identities(queries, keys):
    """Three segments of queries and keys, of which some queries have no key, and padding."""
    rng = np.random.default_rng(0)
    of_queries, of_keys = (np.sort(rng.integers(0, 3, (2, length)), axis=1) for length in (queries, keys))
    of_keys[:, -3:] = NO_KEY
    of_keys[0][of_keys[0] == 1] = NO_KEY
    return jnp.asarray(of_queries), jnp.asarray(of_keys)


def reference(query, key, value, *, visible, cap, factors=1.0):
    """Outputs and entropies in the type of the inputs, with the matrix."""
    logits = jnp.einsum("btnh,bsnh->bnts", query, key) / np.sqrt(query.shape[-1])
    logits = cap * jnp.tanh(logits / cap) if cap else logits
    weights = jax.nn.softmax(jnp.where(visible, logits, -1e9), axis=-1) * visible
    entropy = -jnp.sum(weights * jnp.log(jnp.where(weights == 0, 1.0, weights)), axis=-1)
    return jnp.einsum("bnts,bsnh->btnh", weights * factors, value), entropy


CASES = {
    "all": {"queries": 33, "keys": 33, "features": 8, "std": 1.0},
    "causal": {"queries": 33, "keys": 33, "features": 32, "is_causal": True},
    "queries are the last": {"queries": 20, "keys": 50, "features": 8, "is_causal": True, "std": 1.0},
    "earlier queries see nothing": {"queries": 40, "keys": 24, "features": 8, "is_causal": True},
    "segments and padding": {"queries": 33, "keys": 40, "features": 8, "segments": True},
    "causal segments, capped": {
        "queries": 33,
        "keys": 33,
        "features": 8,
        "segments": True,
        "is_causal": True,
        "cap": 5.0,
    },
    "capped": {"queries": 16, "keys": 16, "features": 256, "cap": 3.0},
    "one token": {"queries": 1, "keys": 1, "features": 8},
}


@pytest.mark.parametrize("name", CASES)
def test_outputs_gradients_and_statistics_are_those_of_the_matrix(name):
    case = CASES[name]
    queries, keys = case["queries"], case["keys"]
    arrays = inputs(queries, keys, case["features"], std=case.get("std", 9.0))
    of_queries, of_keys = identities(queries, keys) if case.get("segments") else (None, None)
    cap, is_causal = case.get("cap"), case.get("is_causal", False)
    visible = np.ones((2, 1, queries, keys), bool)
    if is_causal:
        visible &= np.tri(queries, keys, keys - queries, dtype=bool)
    if of_queries is not None:
        visible &= np.asarray(of_queries)[:, None, :, None] == np.asarray(of_keys)[:, None, None, :]
    direction = np.random.default_rng(1).normal(size=arrays[0].shape)

    def ours(*arrays):
        attended, statistics = flash_attention(
            *arrays,
            query_identities=of_queries,
            key_identities=of_keys,
            is_causal=is_causal,
            logit_cap=cap,
            statistics=True,
            block_size=BLOCK,
        )
        return jnp.sum(attended * direction), (attended, statistics)

    (_, (attended, statistics)), gradients = jax.value_and_grad(ours, (0, 1, 2), has_aux=True)(*arrays)
    with jax.enable_x64(True):
        exact = [jnp.asarray(np.asarray(array), jnp.float64) for array in arrays]

        def theirs(*arrays):
            attended, entropy = reference(*arrays, visible=visible, cap=cap)
            return jnp.sum(attended * direction), (attended, entropy)

        (_, (expected, entropy)), slopes = jax.value_and_grad(theirs, (0, 1, 2), has_aux=True)(*exact)
    np.testing.assert_allclose(attended, expected, rtol=2e-5, atol=5e-6)
    np.testing.assert_allclose(statistics.entropy, entropy, rtol=2e-5, atol=5e-6)
    for gradient, slope in zip(gradients, slopes, strict=True):
        np.testing.assert_allclose(gradient, slope, rtol=1e-4, atol=4e-5)
    others = attention_statistics(*arrays[:2], mask=jnp.asarray(visible), logit_cap=cap)
    for name, ours_of, theirs_of in zip(statistics._fields, statistics, others, strict=True):
        np.testing.assert_allclose(
            ours_of, jnp.broadcast_to(theirs_of, ours_of.shape), rtol=1e-4, atol=1e-4, err_msg=name
        )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_has_the_errors_of_its_rounding(dtype):
    arrays = inputs(40, 40, 16, std=3.0, dtype=dtype)
    attended, statistics = flash_attention(*arrays, is_causal=True, statistics=True, block_size=BLOCK)
    assert attended.dtype == dtype
    exact = [array.astype(jnp.float32) for array in arrays]
    expected, entropy = reference(*exact, visible=np.tri(40, dtype=bool), cap=None)
    np.testing.assert_allclose(attended.astype(jnp.float32), expected, atol=4 * jnp.finfo(dtype).eps)
    # Products of half precision are exact.
    np.testing.assert_allclose(statistics.entropy, entropy, atol=1e-5)


def test_dropout_takes_the_weights_that_its_seeds_say_forwards_and_backwards():
    rate, tokens = 0.3, 40
    arrays = inputs(tokens, tokens, 8)
    seeds = jax.random.bits(jax.random.key(0), (2, 2), jnp.uint32).astype(jnp.int32)
    plan = flash_kernels.Plan(tokens, tokens, BLOCK, BLOCK, 1.0, None, True, False, rate, False, "cpu")
    # Of the whole matrix at once, (keys, queries).
    factors = jax.vmap(jax.vmap(lambda seed: flash_kernels.dropout_factors(plan, seed, (tokens, tokens), 0, 0).T))(
        seeds
    )
    assert abs(float(jnp.mean(factors == 0)) - rate) < 0.02
    assert len({np.asarray(each).tobytes() for each in factors.reshape(4, tokens, tokens)}) == 4

    def ours(*arrays):
        attended, _ = flash_attention(*arrays, is_causal=True, dropout=rate, dropout_seeds=seeds, block_size=BLOCK)
        return jnp.sum(jnp.sin(attended))

    def theirs(*arrays):
        return jnp.sum(jnp.sin(reference(*arrays, visible=np.tri(tokens, dtype=bool), cap=None, factors=factors)[0]))

    for ours_of, theirs_of in zip(
        jax.grad(ours, (0, 1, 2))(*arrays), jax.grad(theirs, (0, 1, 2))(*arrays), strict=True
    ):
        np.testing.assert_allclose(ours_of, theirs_of, atol=2e-5)


def test_a_nan_stays_a_nan_and_touches_no_other_query():
    query, key, value = inputs(24, 24, 8)
    _, statistics = flash_attention(query.at[0, 3].set(jnp.nan), key, value, statistics=True, block_size=BLOCK)
    for each in (statistics.entropy, statistics.max_logit, statistics.logit_variance):
        broken = np.isnan(np.asarray(each))
        assert broken[0, :, 3].all()
        assert broken.sum() == 2


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_kernels_are_lowered_for_a_gpu(dtype):
    # Where there is none the program is not compiled.
    arrays = [jax.ShapeDtypeStruct((2, 100, 2, 48), dtype)] * 3
    of_tokens = jax.ShapeDtypeStruct((2, 100), jnp.int32)

    def loss(query, key, value, identities):
        attended, statistics = flash_attention(
            query,
            key,
            value,
            query_identities=identities,
            key_identities=identities,
            is_causal=True,
            logit_cap=30.0,
            dropout=0.1,
            dropout_seeds=jnp.zeros((2, 2), jnp.int32),
            statistics=True,
            platform="gpu",
        )
        return jnp.sum(attended.astype(jnp.float32)), statistics

    traced = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True)).trace(*arrays, of_tokens)
    try:
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    except RuntimeError as error:
        if "No supported GPU" not in str(error):
            raise
        pytest.skip("this JAX lowers for Triton only where there is a GPU")
    assert text.count("triton") >= 3
