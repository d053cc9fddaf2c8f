"""Functions of singular values against the singular value decomposition in float64."""

import numpy as np
import pytest

from sigmarep.core.matrix_functions import polar_factor, softly_clipped

SHAPES = [(5, 5), (7, 3), (2, 3, 9)]


def matrices(shape, smallest):
    """Random matrices with singular values from `smallest` to 1, and their factors."""
    rng = np.random.default_rng(0)
    left, _, right = np.linalg.svd(rng.normal(size=shape), full_matrices=False)
    values = np.geomspace(1.0, smallest, min(shape[-2:]))
    return (left * values) @ right, left, values, right


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_polar_factor_has_singular_values_of_one(shape, scale):
    x, left, _, right = matrices(shape, 1e-3)
    np.testing.assert_allclose(polar_factor(np.float32(scale * x)), left @ right, atol=2e-4)


def test_the_polar_factor_of_a_zero_matrix_is_zero():
    np.testing.assert_array_equal(polar_factor(np.zeros((2, 3), np.float32)), np.zeros((2, 3)))


@pytest.mark.parametrize("largest", [0.1, 10.0, 300.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_soft_clipping_bends_singular_values_below_the_bound(shape, largest):
    x, left, values, right = matrices(shape, 1e-2)
    bound = 0.7
    scaled = bound * largest * values
    expected = (left * (scaled / np.sqrt(1 + (scaled / bound) ** 2))) @ right
    found = softly_clipped(np.float32(bound * largest * x), bound)
    np.testing.assert_allclose(found, expected, atol=2e-3 * np.abs(expected).max())


def test_soft_clipping_leaves_a_zero_matrix_zero():
    np.testing.assert_array_equal(softly_clipped(np.zeros((2, 3), np.float32), 1.0), np.zeros((2, 3)))
