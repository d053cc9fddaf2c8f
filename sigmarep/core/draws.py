"""Random keys whose numbers CPUs draw several times as fast; the numbers are those of JAX's default generator.

On CPUs JAX compiles Threefry's rounds as a loop that goes through memory, for the sake of small programs. Written out, and
drawn by parts that stay in the cache, the bits take a tenth of the time. Other devices draw as JAX lets them.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.random import define_prng_impl, threefry_prng_impl

# Bits by which the rounds rotate, in turns of four, and the constant that the third key word is made with (Salmon et al.,
# 2011, section 3.3 and table 3).
ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = 0x1BD11BDA
# Numbers in a part that is drawn at once: 64 KiB.
CHUNK = 2**14


def _threefry(key: jax.Array, counts: jax.Array) -> jax.Array:
    """Both words of Threefry-2x32-20 of the counters (0, count), combined by exclusive or; uint32 of the counts' shape."""
    words = (key[0], key[1], key[0] ^ key[1] ^ jnp.uint32(PARITY))
    first, second = jnp.broadcast_to(words[0], counts.shape), counts + words[1]
    for turn in range(5):
        for bits in ROTATIONS[turn % 2]:
            first = first + second
            second = first ^ ((second << bits) | (second >> (32 - bits)))
        first = first + words[(turn + 1) % 3]
        second = second + words[(turn + 2) % 3] + jnp.uint32(turn + 1)
    return first ^ second


def _in_chunks(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The bits of JAX's generator, by parts that stay in a processor's own cache.

    Without the loop, whose result goes to memory once, each reader of the numbers would be compiled to draw them again.
    """
    size = math.prod(shape)
    within = lax.iota(jnp.uint32, min(size, CHUNK))

    def chunk(start: jax.Array) -> jax.Array:
        return _threefry(key, within + start)

    starts = jnp.arange(0, size, CHUNK, dtype=jnp.uint32)
    bits: jax.Array = lax.map(chunk, starts).ravel()[:size].reshape(shape)
    return bits


def _random_bits(key: jax.Array, bit_width: int, shape: tuple[int, ...]) -> jax.Array:
    default = functools.partial(threefry_prng_impl.random_bits, bit_width=bit_width, shape=shape)
    size = math.prod(shape)
    if bit_width != 32 or not 0 < size < 2**32 or not jax.config.values["jax_threefry_partitionable"]:
        bits: jax.Array = default(key)
    else:
        bits = lax.platform_dependent(key, cpu=functools.partial(_in_chunks, shape=shape), default=default)
    return bits


_WRITTEN_OUT = define_prng_impl(
    key_shape=threefry_prng_impl.key_shape,
    seed=threefry_prng_impl.seed,
    split=threefry_prng_impl.split,
    random_bits=_random_bits,
    fold_in=threefry_prng_impl.fold_in,
    name="threefry2x32_written_out",
    tag="fryw",
)


def written_out(key: jax.Array) -> jax.Array:
    """A key of the same numbers, drawn by Threefry's rounds written out; a key of another generator as it is.

    Args:
      key: a typed key, see `jax.random.key`, of any shape.
    """
    if str(jax.random.key_impl(key)) != "threefry2x32":
        return key
    same: jax.Array = jax.random.wrap_key_data(jax.random.key_data(key), impl=_WRITTEN_OUT)
    return same


def with_default_keys(tree: Any) -> Any:
    """The tree with keys of JAX's default generator in place of `written_out` ones, which no other process can read."""

    def default(x: Any) -> Any:
        key = isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        if not key or jax.random.key_impl(x) != _WRITTEN_OUT:
            return x
        return jax.random.wrap_key_data(jax.random.key_data(x), impl="threefry2x32")

    return jax.tree.map(default, tree)
