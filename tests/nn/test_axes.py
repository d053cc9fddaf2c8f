"""Placing activations by the names of their dimensions."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from sigmarep.nn.axes import shared_among_devices, with_axes

RULES = (("batch", ("data", "fsdp")), ("heads", "tensor"))
NAMES = ("batch", "length", "heads")


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def on_device(shape, mesh):
    """Shape of the part on one device of an array that is placed by its axes."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        placed = jax.jit(lambda x: with_axes(x, *NAMES))(jnp.ones(shape))
    return placed.addressable_shards[0].data.shape


@pytest.mark.parametrize(
    ("shape", "part"),
    [
        ((8, 5, 4), (2, 5, 2)),
        # What its axes do not divide stays whole.
        ((8, 5, 3), (2, 5, 3)),
        ((6, 5, 4), (6, 5, 2)),
    ],
)
def test_dimensions_lie_on_the_axes_of_their_names(shape, part, mesh):
    assert on_device(shape, mesh) == part


def test_without_rules_or_a_mesh_nothing_happens(mesh):
    x = jnp.ones((8, 5, 4))
    assert with_axes(x, *NAMES) is x
    with nn.logical_axis_rules(RULES):
        assert with_axes(x, *NAMES) is x
    with jax.set_mesh(mesh):
        assert with_axes(x, *NAMES) is x


@pytest.mark.parametrize("count", [3, 4, 9])
def test_values_shared_among_devices_are_those_of_one(count, mesh):
    x = jnp.arange(2.0 * count).reshape(count, 2)

    def sums(x, scale):
        return jnp.sum(x, axis=1) * scale

    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        shared = jax.jit(lambda x: shared_among_devices(sums, x, x[:, 0]))(x)
    np.testing.assert_array_equal(shared, sums(x, x[:, 0]))
