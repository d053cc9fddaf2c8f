"""Augmentation, each against a simple independent computation."""

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from sigmarep import configuration
from sigmarep.data.images import augment, transforms
from sigmarep.errors import BadInput


def picture(height=20, width=30, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def config(**augmentation):
    made = transforms.default_config()
    made.image_size, made.mean, made.std = 16, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    made.augment.update(augmentation)
    return made


def checked(made):
    configuration.check(made, transforms.FIELDS, prefix="config.data.")
    transforms.check(made)


def test_crop_boxes_lie_inside_and_have_the_asked_area_and_ratio():
    rng = np.random.default_rng(0)
    for _ in range(500):
        left, top, right, bottom = augment.crop_box(200, 300, (0.08, 1.0), rng)
        assert 0 <= left < right <= 300
        assert 0 <= top < bottom <= 200
        assert 0.07 < (right - left) * (bottom - top) / 60_000 <= 1
        assert 0.70 < (right - left) / (bottom - top) < 1.42


def test_a_crop_that_cannot_fit_falls_back_to_the_middle():
    # The whole area of a strip has no allowed ratio.
    left, top, right, bottom = augment.crop_box(10, 1000, (1.0, 1.0), np.random.default_rng(0))
    assert (top, bottom) == (0, 10)
    assert abs(left + right - 1000) <= 1


def test_pad_and_crop_shifts_by_at_most_the_padding():
    image = picture(8, 8, 1)
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
    windows = {padded[i : i + 8, j : j + 8].tobytes() for i in range(5) for j in range(5)}
    rng = np.random.default_rng(0)
    seen = {augment.pad_and_crop(image, 2, rng).tobytes() for _ in range(300)}
    assert seen == windows


def test_the_centre_crop_is_the_centre():
    image = np.zeros((32, 48, 1), np.uint8)
    image[8:24, 16:32] = 200
    assert np.all(augment.center_crop(image, 16, 0.5, "bilinear") == 200)
    assert augment.center_crop(picture(9, 50), 16, 0.875, "bicubic").shape == (16, 16, 3)


@pytest.mark.parametrize("name", [n for n in augment.OPERATIONS if n not in ("auto_contrast", "equalize", "invert")])
@pytest.mark.parametrize("channels", [1, 3])
def test_operations_grow_from_nothing(name, channels):
    image = picture(channels=channels)
    operation = augment.OPERATIONS[name]
    if name != "posterize":
        np.testing.assert_array_equal(operation(image, 0.0, 1), image)
    changes = [np.abs(operation(image, level, 1).astype(int) - image).mean() for level in (0.25, 1.0)]
    if (name, channels) == ("color", 1):
        assert changes == [0, 0]
    elif "translate" in name:
        # Noise moved a little differs from itself as much as noise moved far.
        assert min(changes) > 0
    else:
        assert changes[1] > changes[0] >= 0


def test_operations_have_the_strengths_of_magnitude_nine():
    image = picture()
    x = image.astype(int)
    expected = {
        "invert": 255 - x,
        # A threshold of 256 − 0.9·256, one bit kept of 8, 0.9·110 added below 128.
        "solarize": np.where(x >= 26, 255 - x, x),
        "posterize": np.where(x >= 128, 128, 0),
        "solarize_add": np.where(x < 128, x + 99, x),
    }
    for name, array in expected.items():
        np.testing.assert_array_equal(augment.OPERATIONS[name](image, 0.9, 1), array)
    for sign in (-1, 1):
        brighter = augment.OPERATIONS["brightness"](image, 0.9, sign)
        np.testing.assert_allclose(brighter, np.clip(x * (1 + sign * 0.81), 0, 255), atol=1)
        # Half the 20 columns at level 1/0.9, whole pixels, so that nothing is interpolated.
        square = picture(20, 20)
        moved = augment.OPERATIONS["translate_x"](square, 0.5 / 0.45, sign)
        kept, gone = (moved[:, :10], moved[:, 10:])[::sign]
        np.testing.assert_array_equal(kept, square[:, 10:] if sign == 1 else square[:, :10])
        assert np.all(gone == augment.FILL)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("sign", [-1, 1])
def test_tables_and_shifts_are_pillows(channels, sign):
    image = picture(37, 53, channels)
    pillow, fill = augment.to_pil(image), 128 if channels == 1 else (128, 128, 128)

    def affine(*matrix):
        return pillow.transform(pillow.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=fill)

    for level in (0.0, 0.37, 0.9, 1.0):
        factor, shear = 1 + sign * 0.9 * level, sign * 0.3 * level
        shifts = sign * 0.45 * level * 53, sign * 0.45 * level * 37
        for name, expected, tolerance in (
            ("posterize", ImageOps.posterize(pillow, max(4 - int(4 * level), 1)), 0),
            ("contrast", ImageEnhance.Contrast(pillow).enhance(factor), 0),
            ("brightness", ImageEnhance.Brightness(pillow).enhance(factor), 0),
            ("shear_x", affine(1, shear, 0, 0, 1, 0), 1),
            ("shear_y", affine(1, 0, 0, shear, 1, 0), 1),
            ("translate_x", affine(1, 0, shifts[0], 0, 1, 0), 1),
            ("translate_y", affine(1, 0, 0, 0, 1, shifts[1]), 1),
        ):
            difference = np.abs(augment.OPERATIONS[name](image, level, sign) - augment.from_pil(expected).astype(int))
            assert difference.max() <= tolerance, (name, level)
            # At level 1 some values are whole numbers, which Pillow's rounding may leave a little below.
            assert np.mean(difference > 0) < (0.03 if level == 1 else 0.003)


def test_colour_jitter_of_an_even_grey_is_its_brightness_factor():
    # Contrast and saturation leave an even grey as it is.
    image = np.full((4, 4, 3), 100, np.uint8)
    rng = np.random.default_rng(0)
    jittered = [augment.color_jitter(image, 0.4, rng) for _ in range(200)]
    assert all(np.ptp(each) == 0 for each in jittered)
    values = [int(each[0, 0, 0]) for each in jittered]
    assert 59 <= min(values) < 70
    assert 130 < max(values) <= 141


def test_rand_augment_applies_each_layer_with_its_probability():
    image = picture()
    rng = np.random.default_rng(0)
    options = {"layers": 1, "magnitude": 9.0, "std": 0.5, "rng": rng}
    changed = [not np.array_equal(augment.rand_augment(image, probability=0.5, **options), image) for _ in range(400)]
    assert 0.4 < np.mean(changed) < 0.6
    np.testing.assert_array_equal(augment.rand_augment(image, probability=0.0, **options), image)


def test_erasing_fills_one_box_of_two_to_thirty_three_percent():
    image = np.full((64, 64, 3), 7.0, np.float32)
    rng = np.random.default_rng(0)
    for _ in range(50):
        erased = augment.random_erasing(image, 1.0, rng)
        rows, columns = np.where((erased != image).any(-1))
        area = (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
        assert area == len(rows)
        assert 0.015 < area / 64**2 < 0.35
    assert augment.random_erasing(image, 0.0, rng) is image


def test_mixup_is_the_convex_combination():
    pair = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    mixed, share = augment.mix_pair(pair, mixup=0.8, cutmix=0.0, probability=1.0, rng=np.random.default_rng(1))
    assert 0 < share < 1
    np.testing.assert_allclose(mixed[0], share * pair[0] + (1 - share) * pair[1], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(mixed[1], share * pair[1] + (1 - share) * pair[0], rtol=1e-5, atol=1e-6)


def test_cutmix_reports_the_exact_share_of_pixels():
    pair = np.stack([np.zeros((16, 16, 3)), np.ones((16, 16, 3))]).astype(np.float32)
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(100):
        mixed, share = augment.mix_pair(pair, mixup=0.0, cutmix=1.0, probability=1.0, rng=rng)
        np.testing.assert_allclose(share, 1 - mixed[0].mean(), atol=1e-6)
        np.testing.assert_allclose(share, mixed[1].mean(), atol=1e-6)
        shares.append(share)
    assert np.std(shares) > 0.1


def test_mixing_happens_with_its_probability_and_either_kind():
    pair = np.random.default_rng(0).normal(size=(2, 8, 8, 1)).astype(np.float32)
    rng = np.random.default_rng(0)
    shares = [augment.mix_pair(pair, mixup=0.8, cutmix=1.0, probability=0.5, rng=rng)[1] for _ in range(400)]
    assert 0.4 < np.mean(np.asarray(shares) == 1.0) < 0.6


def test_examples_are_normalised_and_have_fixed_types():
    transform, mix = transforms.train_transforms(config())
    assert mix is None
    image = picture(16, 16)
    example = transform({"image": image, "label": 3}, np.random.default_rng(0))
    expected = (image / 255.0 - np.asarray([0.5, 0.4, 0.3])) / np.asarray([0.2, 0.3, 0.4])
    np.testing.assert_allclose(example["image"], expected, rtol=1e-5, atol=1e-5)
    assert {name: np.asarray(value).dtype for name, value in example.items()} == {
        "image": np.float32,
        "label": np.int32,
        "mix": np.float32,
        "mix_label": np.int32,
    }


def test_a_seed_gives_the_same_augmentation():
    made = config(crop="resized", flip=True, color_jitter=0.3, randaugment_layers=2, erasing=0.5)
    transform, _ = transforms.train_transforms(made)
    example = {"image": picture(40, 50), "label": 1}
    first, again, other = (transform(example, np.random.default_rng(seed))["image"] for seed in (5, 5, 6))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_flips_happen_half_the_time():
    transform, _ = transforms.train_transforms(config(flip=True))
    example = {"image": picture(16, 16), "label": 1}
    rng = np.random.default_rng(0)
    plain = transforms.eval_transform(config())(example)["image"]
    flipped = [np.allclose(transform(example, rng)["image"], plain[:, ::-1]) for _ in range(300)]
    assert 0.4 < np.mean(flipped) < 0.6


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 1), (5, 6, 2), (5, 6, 3), (5, 6, 4)])
def test_any_picture_gets_the_asked_channels(shape, channels):
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    assert transforms.with_channels(image, channels).shape == (5, 6, channels)


@pytest.mark.parametrize("image", [np.zeros((5, 6, 5), np.uint8), np.zeros((5, 6, 1), np.uint16)])
def test_images_of_another_kind_are_refused(image):
    with pytest.raises(BadInput, match=r"expected uint8 \(height, width\) with 1 to 4 channels"):
        transforms.with_channels(image, 3)


def test_the_last_of_two_and_four_channels_is_opacity():
    image = np.array([[(200, 40, 40, 255), (200, 40, 40, 0), (200, 40, 40, 51)]], np.uint8)
    # A fifth of the color and four fifths of white.
    expected = [[(200, 40, 40), (255, 255, 255), (244, 212, 212)]]
    np.testing.assert_array_equal(transforms.with_channels(image, 3), expected)
    np.testing.assert_array_equal(transforms.with_channels(image[..., 2:], 1)[..., 0], [[40, 255, 212]])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("augment.crop", "centre", "expected one of none, pad, resized"),
        ("interpolation", "cubic", "expected one of nearest, bilinear, bicubic"),
        ("augment.mixup", -1.0, "of at least 0"),
        ("augment.erasing", 1.5, "of at least 0 and at most 1"),
        ("augment.crop_scale", (0.5, 0.1), "2 numbers above 0 and at most 1, not falling"),
        ("mean", (0.5, 0.5), "1 or 3 numbers"),
        ("std", (0.0, 1.0, 1.0), "numbers above 0"),
        ("eval_crop", 0.0, "above 0"),
        ("num_threads", 0, "at least 1"),
    ],
)
def test_impossible_values_are_refused_by_name(field, value, message):
    made = config()
    block = made.augment if field.startswith("augment.") else made
    block[field.rsplit(".", 1)[-1]] = value
    with pytest.raises(BadInput, match=rf"config\.data\.{field}.*{message}"):
        checked(made)
