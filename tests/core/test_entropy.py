"""Attention entropy against float64 sums over the full attention matrix, and the bound against its table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sigmarep.core import entropy


def reference(query, key, visible, scale, cap=None):
    """Entropy and largest logit from the full float64 attention matrix; (B, N, T)."""
    logits = scale * np.einsum("btnh,bsnh->bnts", query.astype(np.float64), key.astype(np.float64))
    if cap:
        logits = cap * np.tanh(logits / cap)
    logits = np.where(visible, logits, -np.inf)
    with np.errstate(invalid="ignore", divide="ignore"):
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p = p / p.sum(-1, keepdims=True)
        h = -np.nansum(np.where(p > 0, p * np.log(p), 0.0), axis=-1)
    return np.where(visible.any(-1), h, 0.0), logits.max(-1)


def inputs(t, s, scale=1.0, seed=0):
    rng = np.random.default_rng(seed)
    query = scale * rng.normal(size=(2, t, 3, 8)).astype(np.float32)
    return query, rng.normal(size=(2, s, 3, 8)).astype(np.float32)


@pytest.mark.parametrize(("t", "s", "block"), [(10, 10, 128), (10, 10, 4), (7, 19, 5), (19, 7, 3)])
@pytest.mark.parametrize("kind", ["full", "causal", "padded", "masked", "causal_padded"])
@pytest.mark.parametrize("size", [1.0, 30.0])
def test_blocks_of_keys_equal_the_full_matrix(t, s, block, kind, size):
    query, key = inputs(t, s, size)
    visible = np.ones((2, 3, t, s), bool)
    arguments = {}
    if "causal" in kind:
        arguments["is_causal"] = True
        visible &= np.tril(np.ones((t, s), bool), s - t)
    if "padded" in kind:
        lengths = np.asarray([s, s // 2])
        arguments["key_mask"] = jnp.arange(s)[None] < lengths[:, None]
        visible &= np.asarray(arguments["key_mask"])[:, None, None]
    if kind == "masked":
        mask = np.random.default_rng(1).random((2, 1, t, s)) < 0.6
        mask[0, 0, 0] = False
        arguments["mask"] = jnp.asarray(mask)
        visible &= mask
    expected, largest = reference(query, key, visible, 8**-0.5)
    logits = jnp.einsum("btnh,bsnh->bnts", query, key) * 8**-0.5
    for result in (
        entropy.attention_statistics(query, key, block_size=block, **arguments),
        entropy.statistics_of_logits(logits, None if kind == "full" else jnp.asarray(visible)),
    ):
        np.testing.assert_allclose(result.entropy, expected, rtol=2e-5, atol=2e-5)
        np.testing.assert_allclose(result.max_logit, largest, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(np.broadcast_to(result.visible, expected.shape), visible.sum(-1))


@pytest.mark.parametrize("sigmoid", [False, True])
def test_a_mask_may_be_one_for_all_keys(sigmoid):
    query, key = inputs(4, 7)
    rows = jnp.asarray([True, True, False, True])[:, None]
    logits = jnp.einsum("btnh,bsnh->bnts", query, key) * 8**-0.5
    found = [
        entropy.attention_statistics(query, key, mask=rows, sigmoid=sigmoid, block_size=3),
        entropy.statistics_of_logits(logits, rows[None, None], sigmoid=sigmoid),
    ]
    whole = jnp.broadcast_to(rows, (1, 1, 4, 7))
    expected = entropy.statistics_of_logits(logits, whole, sigmoid=sigmoid)
    for each in found:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), each, expected)
    np.testing.assert_array_equal(
        entropy.sigmoid_weights(logits, rows[None, None]), entropy.sigmoid_weights(logits, whole)
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("size", [1.0, 30.0])
def test_half_precision_is_exact_in_what_it_holds(dtype, size):
    query, key = (jnp.asarray(x, dtype) for x in inputs(7, 19, size))
    expected, largest = reference(np.asarray(query), np.asarray(key), np.ones((2, 3, 7, 19), bool), 8**-0.5)
    for block in (5, 128):
        result = entropy.attention_statistics(query, key, block_size=block)
        assert result.entropy.dtype == jnp.float32
        np.testing.assert_allclose(result.entropy, expected, rtol=2e-5, atol=2e-5)
        np.testing.assert_allclose(result.max_logit, largest, rtol=1e-5, atol=1e-5)


def test_soft_cap_and_scale():
    query, key = inputs(6, 6, 10.0)
    result = entropy.attention_statistics(query, key, scale=0.5, logit_cap=3.0)
    expected, largest = reference(query, key, np.ones((2, 3, 6, 6), bool), 0.5, 3.0)
    np.testing.assert_allclose(result.entropy, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(result.max_logit, largest, rtol=1e-5)


def test_no_array_of_queries_times_keys_is_formed():
    t = 1024
    query = jax.ShapeDtypeStruct((1, t, 1, 8), jnp.float32)
    compiled = jax.jit(lambda q, k: entropy.attention_statistics(q, k).entropy).lower(query, query).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < t * t * 4


@pytest.mark.parametrize("is_causal", [False, True])
def test_fused_attention_gives_the_same_entropy(is_causal):
    query, key = inputs(12, 12, 3.0)
    average, lse = jax.nn.dot_product_attention(query, key, key, is_causal=is_causal, return_residual=True)
    ours = entropy.entropy_from_lse(query, average, lse)
    visible = np.tril(np.ones((12, 12), bool)) if is_causal else np.ones((12, 12), bool)
    expected, _ = reference(query, key, np.broadcast_to(visible, (2, 3, 12, 12)), 8**-0.5)
    np.testing.assert_allclose(np.moveaxis(ours, -1, 1), expected, rtol=1e-4, atol=2e-5)


def test_entropy_of_weights_handles_zeros():
    weights = jnp.asarray([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]])
    np.testing.assert_allclose(entropy.entropy_of_weights(weights), [np.log(2), 0.0, np.log(3)], atol=1e-6)


def test_normalised_entropy_is_one_for_uniform_attention():
    np.testing.assert_allclose(entropy.normalised_entropy(jnp.log(jnp.asarray([2.0, 8.0])), jnp.asarray([2, 8])), 1.0)
    assert entropy.normalised_entropy(jnp.float32(0.0), jnp.asarray(1)) == 1.0


# T, then the bound at σ = 0, 1, 5, 10: computed elsewhere, to six digits.
BOUND_TABLE = [
    (2, [0.693147, 0.494200, 0.006850, 0.000011]),
    (8, [2.079442, 1.979691, 0.205592, 0.001862]),
    (64, [4.158883, 4.143699, 1.802616, 0.029206]),
    (197, [5.283204, 5.278175, 3.671609, 0.094856]),
]


@pytest.mark.parametrize(("tokens", "expected"), BOUND_TABLE)
def test_bound_equals_its_table(tokens, expected):
    bound = entropy.entropy_lower_bound(jnp.asarray([0.0, 1.0, 5.0, 10.0]), tokens)
    np.testing.assert_allclose(bound, expected, atol=1.1e-6)


@pytest.mark.parametrize("tokens", [2, 8, 64])
@pytest.mark.parametrize("sigma", [0.5, 5.0])
def test_bound_is_attained_by_the_extremal_logits(tokens, sigma):
    w = np.full(tokens, -1 / np.sqrt(tokens * (tokens - 1)))
    w[0] = np.sqrt((tokens - 1) / tokens)
    p = np.exp(sigma * w) / np.exp(sigma * w).sum()
    np.testing.assert_allclose(entropy.entropy_lower_bound(sigma, tokens), -(p * np.log(p)).sum(), rtol=1e-5)


def test_bound_holds_for_random_inputs_and_weights():
    rng = np.random.default_rng(0)
    for _ in range(300):
        t, d = rng.integers(2, 12), rng.integers(1, 8)
        x = rng.normal(size=(t, d)) * rng.uniform(0.1, 2)
        product = rng.normal(size=(d, d)) * rng.uniform(0.01, 2)
        logits = x @ product @ x.T
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        rows = np.asarray(entropy.entropy_of_weights(jnp.asarray(p)))
        sigma = np.linalg.norm(product, 2) * np.linalg.norm(x, 2) ** 2
        assert rows.min() >= entropy.entropy_lower_bound(sigma, t) - 1e-5


def test_bound_of_one_key_is_zero():
    assert entropy.entropy_lower_bound(3.0, 1) == 0.0


@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_the_variance_of_the_logits_is_exact_over_blocks_and_masks(offset):
    rng = np.random.default_rng(0)
    query = rng.normal(size=(2, 5, 3, 4)).astype(np.float32)
    key = rng.normal(size=(2, 11, 3, 4)).astype(np.float32)
    # The same large number for every key of a query: the variance must not see it.
    query[..., 0], key[..., 0] = offset, 10.0
    mask = rng.random((2, 1, 5, 11)) < 0.6
    mask[0, :, 0] = False
    by_blocks = entropy.attention_statistics(query, key, mask=jnp.asarray(mask), block_size=4)
    at_once = entropy.statistics_of_logits(jnp.einsum("btnh,bsnh->bnts", query, key) / 2, jnp.asarray(mask))
    logits = np.einsum("btnh,bsnh->bnts", query.astype(np.float64), key.astype(np.float64)) / 2
    for index in np.ndindex(2, 3, 5):
        seen = logits[index][mask[index[0], 0, index[2]]]
        for found in (by_blocks, at_once):
            expected = seen.var() if seen.size else 0.0
            np.testing.assert_allclose(found.logit_variance[index], expected, rtol=1e-2, atol=1e-6)


def in_float64(logits, visible, sigmoid):
    """Entropy, largest logit and variance of every query from its own logits alone, by float64 NumPy."""
    found = np.zeros((3, *logits.shape[:-1]))
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        for index in np.ndindex(logits.shape[:-1]):
            seen = logits[index][visible[index]].astype(np.float64)
            if not seen.size:
                found[:, *index] = 0.0, -np.inf, 0.0
                continue
            p = 1 / (1 + np.exp(np.log(seen.size) - seen)) if sigmoid else np.exp(seen - seen.max())
            p = p / p.sum()
            found[:, *index] = -np.sum(np.where(p == 0, 0.0, p * np.log(p))), seen.max(), seen.var()
    return found


@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_those_of_numpy(value, sigmoid):
    rng = np.random.default_rng(0)
    query, key = (rng.normal(size=(2, n, 3, 1)).astype(np.float32) for n in (6, 11))
    # Of one sequence a key; its logits are ±inf by the signs of the queries, which NaN and 0 have not.
    key[0, 4] = value
    query[0, 1, 0], query[1, 2, 1] = 0.0, np.nan
    visible = np.broadcast_to(rng.random((2, 1, 6, 11)) < 0.7, (2, 3, 6, 11)).copy()
    visible[0, :, 0, 4], visible[0, :, 1, 4] = False, True
    # Two queries that see no key, one of them itself NaN; one that sees −inf alone.
    visible[0, :, 3], visible[1, :, 3] = False, False
    query[1, 3, 0] = np.nan
    visible[0, :, 5], visible[0, :, 5, 4] = False, True
    logits = np.einsum("btnh,bsnh->bnts", query, key)
    expected = in_float64(logits, visible, sigmoid)
    mask = jnp.asarray(visible)
    for statistics in (
        entropy.statistics_of_logits(jnp.asarray(logits), mask, sigmoid=sigmoid),
        entropy.attention_statistics(query, key, mask=mask, scale=1.0, sigmoid=sigmoid),
        entropy.attention_statistics(query, key, mask=mask, scale=1.0, sigmoid=sigmoid, block_size=2),
    ):
        for ours, theirs in zip(statistics, expected, strict=False):
            np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("sigmoid", [False, True])
def test_infinite_logits_without_a_mask_are_those_of_numpy(sigmoid):
    logits = np.random.default_rng(0).normal(size=(1, 1, 4, 7)).astype(np.float32)
    logits[0, 0, 1, 3], logits[0, 0, 2, 3], logits[0, 0, 3, 2:4] = np.inf, -np.inf, (-np.inf, np.inf)
    expected = in_float64(logits, np.ones(logits.shape, bool), sigmoid)
    for ours, theirs in zip(entropy.statistics_of_logits(jnp.asarray(logits), sigmoid=sigmoid), expected, strict=False):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("sigmoid", [False, True])
def test_a_nan_stays_in_compiled_programs_of_any_size(sigmoid):
    for shape in ((1, 1, 2, 3), (64, 4, 17, 17)):
        logits = np.zeros(shape, np.float32)
        logits[0, 0, 0, 1] = np.nan
        statistics = jax.jit(lambda x: entropy.statistics_of_logits(x, sigmoid=sigmoid))(logits)
        everywhere = jax.jit(lambda x: entropy.statistics_of_logits(x, sigmoid=sigmoid))(logits * np.nan)
        normalised = entropy.normalised_entropy(statistics.entropy, statistics.visible)
        for values in (*statistics[:3], normalised):
            assert np.isnan(values[0, 0, 0])
            assert np.isnan(values).sum() == 1
        np.testing.assert_allclose(np.asarray(normalised).ravel()[1:], 1.0, rtol=1e-6)
        for values in everywhere[:3]:
            assert np.isnan(values).all()
        lost = jax.jit(lambda x: entropy.largest(x, (0, 2)))(statistics.max_logit)
        assert np.isnan(lost[0])
        assert np.isnan(lost).sum() == 1


@pytest.mark.parametrize("size", [1e30, 3e38])
def test_the_largest_logits_of_float32_have_the_entropy_of_one_key(size):
    query, key = np.full((1, 1, 1, 1), size, np.float32), np.asarray([1.0, -1.0, 0.5], np.float32).reshape(1, 3, 1, 1)
    for block in (1, 3):
        statistics = entropy.attention_statistics(query, key, scale=1.0, block_size=block)
        assert statistics.entropy == 0.0
        assert statistics.max_logit == np.float32(size)


def test_fused_attention_with_a_nan_has_no_entropy():
    query, key = inputs(12, 12, 3.0)
    query[0, 3, 1, 0] = np.nan
    average, lse = jax.nn.dot_product_attention(query, key, key, return_residual=True)
    missing = np.isnan(entropy.entropy_from_lse(query, average, lse))
    assert missing[0, 3, 1]
    assert missing.sum() == 1


def test_normalised_entropy_of_one_key_is_nan_only_where_its_entropy_is():
    values = entropy.normalised_entropy(jnp.asarray([0.0, 0.0, jnp.nan, jnp.nan]), jnp.asarray([0, 1, 1, 5]))
    np.testing.assert_array_equal(values, [1.0, 1.0, np.nan, np.nan])


def test_bound_of_an_infinite_norm_is_zero_and_of_none_nan():
    for tokens in (2, 10, 10**6):
        np.testing.assert_array_equal(
            entropy.entropy_lower_bound(jnp.asarray([jnp.inf, 3e38, 1e20, jnp.nan]), tokens), [0.0, 0.0, 0.0, np.nan]
        )
    np.testing.assert_array_equal(entropy.entropy_lower_bound(jnp.asarray([jnp.inf, jnp.nan]), 1), [0.0, np.nan])
