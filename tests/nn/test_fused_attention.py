"""The arguments of cuDNN's kernel, given to XLA, which needs no GPU and takes any length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sigmarep.nn.fused_attention import cudnn_supports, with_even_lengths

MASK = jax.random.bernoulli(jax.random.key(9), 0.6, (2, 1, 5, 7)) | (jnp.arange(7) == 0)
KEYS = (jnp.arange(7) < jnp.array([[4], [7]]))[:, None, None]


def inputs(t, s):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(2, t, 3, 8), (2, s, 3, 8), (2, s, 3, 8)]
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def with_gradient(attend, arguments):
    def loss(*x):
        out = attend(*x)
        return jnp.sum(jnp.sin(out)), out

    gradient, out = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(*arguments)
    return out, *gradient


@pytest.mark.parametrize(
    ("t", "s", "causal", "mask"),
    [
        (7, 7, False, None),
        (7, 7, True, None),
        (6, 6, True, None),
        (6, 7, False, None),
        (7, 6, False, None),
        (5, 7, False, MASK),
        (5, 7, False, MASK[0, 0]),
        (6, 7, False, KEYS),
        (7, 7, True, KEYS),
    ],
)
def test_even_lengths_change_nothing(t, s, causal, mask):
    def padded(query, key, value):
        *arrays, seen, lengths = with_even_lengths(query, key, value, mask)
        assert all(x.shape[1] % 2 == 0 for x in arrays)
        assert seen is None or seen.shape[-2:] == (arrays[0].shape[1], arrays[1].shape[1])
        return jax.nn.dot_product_attention(*arrays, mask=seen, is_causal=causal, **lengths)[:, : query.shape[1]]

    def plain(query, key, value):
        return jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=causal)

    arguments = inputs(t, s)
    for a, b in zip(with_gradient(padded, arguments), with_gradient(plain, arguments), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_even_lengths_are_left_alone():
    query, key, value = inputs(6, 4)
    found = with_even_lengths(query, key, value, None)
    assert found[0] is query
    assert found[3:] == (None, {})


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there it depends on the GPU")
def test_cudnn_supports_no_other_device():
    assert not cudnn_supports(inputs(7, 7)[0].astype(jnp.bfloat16))
