"""The arguments of cuDNN's kernel, given to XLA, which needs no GPU and takes any length; our own kernel in a layer."""

import contextlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from sigmarep.nn import MultiHeadAttention
from sigmarep.nn.fused_attention import cudnn_supports, with_even_lengths
from sigmarep.nn.visibility import Visibility

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


def visibilities(tokens):
    segments = jnp.asarray(np.sort(np.random.default_rng(0).integers(0, 3, (4, tokens)), axis=1)[:, ::-1])
    return {
        "all": Visibility(),
        "causal segments": Visibility(is_causal=True, segments=segments),
        "padding": Visibility(key_mask=jnp.arange(tokens) < jnp.asarray([[tokens], [5], [9], [1]])),
    }


@pytest.mark.parametrize(("name", "devices"), [("all", 1), ("causal segments", 1), ("padding", 4)])
def test_flash_gives_the_outputs_gradients_and_statistics_of_the_matrix(name, devices):
    x = jax.random.normal(jax.random.key(0), (4, 21, 16))
    visibility = visibilities(21)[name]
    real = visibility.real_tokens(self_attention=True).queries
    counted = 1.0 if real is None else real[..., None]
    mesh = jax.make_mesh((devices // 2 or 1, min(devices, 2)), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    results = []
    for implementation in ("xla", "flash"):
        layer = MultiHeadAttention(2, implementation=implementation, logit_cap=20.0)
        variables = layer.init(jax.random.key(1), x)

        def loss(params, layer=layer, variables=variables):
            options = {"visibility": visibility, "mutable": ["attention"]}
            y, state = layer.apply({**variables, "params": params}, x, **options)
            return jnp.sum(jnp.sin(y) * counted), state

        with contextlib.ExitStack() as stack:
            if devices > 1:
                stack.enter_context(jax.set_mesh(mesh))
                stack.enter_context(nn.logical_axis_rules([("batch", "data"), ("heads", "tensor")]))
            results.append(jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *results)


def test_flash_refuses_what_it_cannot_do():
    x = jnp.ones((1, 4, 8))
    layer = MultiHeadAttention(2, implementation="flash")
    variables = layer.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"flash.*Visibility\.mask"):
        layer.apply(variables, x, visibility=Visibility(mask=jnp.ones((4, 4), bool)))
    with pytest.raises(ValueError, match=r"weights = 'sigmoid'.*flash"):
        MultiHeadAttention(2, implementation="flash", weights="sigmoid").init(jax.random.key(0), x)


def test_flash_drops_attention_weights_in_training_alone():
    x = jax.random.normal(jax.random.key(0), (2, 8, 8))
    layer = MultiHeadAttention(2, implementation="flash", dropout=0.5)
    variables = layer.init(jax.random.key(0), x)
    plain = layer.apply(variables, x)
    first, again, other = (
        layer.apply(variables, x, deterministic=False, rngs={"dropout": jax.random.key(seed)}) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, plain)
    assert not np.allclose(first, other)
