"""The two random views: every change against an independent computation, reproducible, on one channel as on three."""

import colorsys

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from scipy.ndimage import gaussian_filter1d

from sigmarep.data.images import transforms, views


def config(channels=3, **fields):
    made = transforms.default_config()
    made.views = views.default_config()
    made.image_size = 16
    made.mean, made.std = (0.5, 0.4, 0.3)[:channels], (0.2, 0.3, 0.4)[:channels]
    made.views.update(fields)
    return made


def colors(count=4, channels=3, seed=0):
    return np.random.default_rng(seed).random((count, 12, 14, channels)).astype(np.float32)


def factor(value):
    return np.full((1, 1, 1, 1), value, np.float32)


@pytest.mark.parametrize(
    ("operation", "enhancer"),
    [
        (views.brightened, ImageEnhance.Brightness),
        (views.contrasted, ImageEnhance.Contrast),
        (views.saturated, ImageEnhance.Color),
    ],
)
@pytest.mark.parametrize("change", [-0.4, 0.0, 0.4])
def test_jitter_is_pillows_to_a_rounding(operation, enhancer, change):
    image = np.random.default_rng(1).integers(0, 256, (12, 14, 3), dtype=np.uint8)
    expected = np.asarray(enhancer(Image.fromarray(image)).enhance(1 + change))
    found = operation(image[None].astype(np.float32) / 255, factor(change))[0]
    np.testing.assert_allclose(255 * found, expected, atol=1.6)


@pytest.mark.parametrize("shift", [-0.3, 0.0, 0.1, 0.5])
def test_the_hue_shifts_as_in_the_standard_library(shift):
    stack = colors(1)
    # Ties between channels and pixels without color as well.
    stack[0, 0, 0], stack[0, 0, 1], stack[0, 0, 2], stack[0, 0, 3] = 0.5, (0.7, 0.7, 0.2), (0.2, 0.7, 0.7), 0
    found = views.hue_shifted(stack, factor(shift))[0]
    for index in np.ndindex(stack.shape[1:3]):
        hue, saturation, value = colorsys.rgb_to_hsv(*map(float, stack[0][index]))
        np.testing.assert_allclose(found[index], colorsys.hsv_to_rgb((hue + shift) % 1, saturation, value), atol=1e-5)


def test_grey_and_solarised_are_pillows_to_a_rounding():
    image = np.random.default_rng(1).integers(0, 256, (12, 14, 3), dtype=np.uint8)
    stack = image[None].astype(np.float32) / 255
    gray = np.asarray(Image.fromarray(image).convert("L"))
    np.testing.assert_allclose(255 * views.grayscaled(stack)[0], np.stack([gray] * 3, -1), atol=1)
    solarized = np.asarray(ImageOps.solarize(Image.fromarray(image), 128))
    np.testing.assert_allclose(255 * views.solarize(stack)[0], solarized, atol=1e-3)


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur_is_scipys_gaussian_with_mirrored_edges(sigma):
    stack = colors(1).astype(np.float64)
    expected = stack[0]
    for axis in (0, 1):
        expected = gaussian_filter1d(expected, sigma, axis=axis, mode="reflect", radius=max(int(np.ceil(4 * sigma)), 1))
    np.testing.assert_allclose(views.blurred(stack.astype(np.float32), [sigma])[0], expected, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_stack_is_changed_as_each_of_its_pictures_alone(channels):
    stack, rng = colors(4, channels), np.random.default_rng(3)
    changes = rng.uniform(-0.4, 0.4, (4, 4)).astype(np.float32)
    orders = np.stack([rng.permutation(4) for _ in range(4)])
    sigmas = np.asarray([0.2, 0.5, 1.0, 2.0])
    together = views.blurred(views.jittered(stack, changes, orders), sigmas)
    for i in range(4):
        one = slice(i, i + 1)
        alone = views.blurred(views.jittered(stack[one], changes[one], orders[one]), sigmas[one])
        np.testing.assert_allclose(together[one], alone, atol=1e-6)


def test_jitter_follows_each_pictures_own_order():
    stack = colors(1)
    changes = np.asarray([[0.4, -0.3, 0.2, 0.1]], np.float32)
    steps = [views.brightened, views.contrasted, views.saturated, views.hue_shifted]
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        expected = stack
        for index in order:
            expected = steps[index](expected, factor(changes[0, index]))
        np.testing.assert_allclose(views.jittered(stack, changes, np.asarray([order])), expected, atol=1e-6)


def test_changes_of_color_leave_one_channel_as_it_is():
    stack = colors(2, channels=1)
    np.testing.assert_array_equal(views.saturated(stack, factor(0.4)), stack)
    np.testing.assert_array_equal(views.hue_shifted(stack, factor(0.2)), stack)
    np.testing.assert_array_equal(views.grayscaled(stack), stack)
    assert not np.array_equal(views.brightened(stack, factor(0.4)), stack)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_seed_gives_the_same_two_views(channels):
    transform = views.train_transform(config(channels, solarise=(0.5, 0.5)))
    example = {"image": np.random.default_rng(0).integers(0, 256, (20, 24, channels), dtype=np.uint8), "label": 1}
    first, again, other = (transform(example, np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert list(first) == ["views"]
    assert first["views"].shape == (2, 16, 16, channels)
    assert first["views"].dtype == np.float32
    np.testing.assert_array_equal(first["views"], again["views"])
    assert not np.array_equal(first["views"], other["views"])
    assert not np.array_equal(*first["views"])


def test_each_view_has_its_own_probabilities():
    fields = {"crop_scale": (1.0, 1.0), "flip": 0.0, "jitter": 0.0, "greyscale": 0.0, "blur": (0.0, 0.0)}
    transform = views.train_transform(config(**fields, solarise=(0.0, 1.0)))
    image = np.full((16, 16, 3), 255, np.uint8)
    image[::2] = 0
    first, second = transform({"image": image}, np.random.default_rng(0))["views"] * (0.2, 0.3, 0.4) + (0.5, 0.4, 0.3)
    np.testing.assert_allclose(first, image / 255, atol=1e-6)
    np.testing.assert_allclose(second, 0, atol=1e-6)


def test_flips_happen_with_their_probability():
    fields = {"crop_scale": (1.0, 1.0), "jitter": 0.0, "greyscale": 0.0, "blur": (0.0, 0.0)}
    transform = views.train_transform(config(**fields, flip=0.3))
    image = np.zeros((16, 16, 3), np.uint8)
    image[:, :8] = 255
    rng = np.random.default_rng(0)
    flipped = [view[0, 0, 0] < 0 for _ in range(200) for view in transform({"image": image}, rng)["views"]]
    assert 0.23 < np.mean(flipped) < 0.37


def test_evaluation_views_depend_on_the_seed_and_the_index_alone():
    made = config()
    example = {"image": np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8), "label": 1}
    transform = views.evaluation_transform(made, seed=7)
    first, again = transform({**example, "index": 3}), transform({**example, "index": 3})
    np.testing.assert_array_equal(first["views"], again["views"])
    assert not np.array_equal(first["views"], transform({**example, "index": 4})["views"])
    assert "views" not in views.evaluation_transform(made)(example)
