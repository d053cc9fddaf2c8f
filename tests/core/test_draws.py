"""Keys whose numbers are drawn by Threefry's rounds written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sigmarep.core.draws import with_default_keys, written_out
from sigmarep.tasks import describe_layers


def test_threefry_agrees_with_the_published_vector():
    # Salmon et al.'s known answer for Threefry-2x32-20 of the counter (0, 0) and the key (0, 0): 6b200159 and 99ba4efe.
    key = written_out(jax.random.wrap_key_data(jnp.zeros(2, jnp.uint32)))
    assert int(jax.random.bits(key, ())) == 0x6B200159 ^ 0x99BA4EFE


@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 5, 7), (130, 257)])
@pytest.mark.parametrize("compiled", [False, True])
def test_numbers_are_those_of_the_default_generator(shape, compiled):
    def drawn(key):
        return (
            jax.random.bits(key, shape),
            jax.random.normal(key, shape),
            jax.random.truncated_normal(key, -2.0, 2.0, shape),
            jax.random.uniform(jax.random.split(key, 3)[1], shape),
            jax.random.bernoulli(jax.random.fold_in(key, 5), 0.3, shape),
            jax.random.bits(key, shape, "uint8"),
        )

    draw = jax.jit(drawn) if compiled else drawn
    for seed in (0, 2**31 + 3):
        key = jax.random.key(seed)
        for expected, actual in zip(draw(key), draw(written_out(key)), strict=True):
            np.testing.assert_array_equal(actual, expected)


def test_stacked_keys_draw_what_each_draws():
    keys = jax.random.split(jax.random.key(1), 4)
    expected = jax.vmap(lambda key: jax.random.normal(key, (9,)))(keys)
    np.testing.assert_array_equal(jax.vmap(lambda key: jax.random.normal(key, (9,)))(written_out(keys)), expected)


def test_another_generator_stays():
    key = jax.random.key(0, impl="rbg")
    assert written_out(key) is key


def test_keys_among_variables_are_those_of_the_default_generator():
    class Model:
        def init(self, key):
            return {"params": {"x": jax.random.normal(key, (3,))}, "dropout": {"key": jax.random.fold_in(key, 1)}}

    key = jax.random.key(2)
    for variables in (describe_layers(Model()).initialize(key), with_default_keys(Model().init(written_out(key)))):
        assert variables["dropout"]["key"].dtype == key.dtype
        assert variables["dropout"]["key"] == jax.random.fold_in(key, 1)
        np.testing.assert_array_equal(variables["params"]["x"], jax.random.normal(key, (3,)))
