"""JPEG files and crops by native code against Pillow; `pip install "sigmarep[pictures]"`."""

import io

import numpy as np
import pytest
from PIL import Image

from sigmarep.data.images import augment, files, native

installed = pytest.mark.skipif(
    native.simplejpeg is None or native.cykooz_resizer is None, reason="needs the extra pictures"
)


def scene(height, width, channels=3):
    """Smooth waves with an edge and a little noise."""
    y, x = np.mgrid[:height, :width]
    waves = np.stack([127 + 90 * np.sin(x / (9 + 4 * c)) * np.cos(y / (7 + 3 * c)) for c in range(channels)], -1)
    waves[:, width // 2 :] *= 0.5
    noise = np.random.default_rng(0).normal(0, 4, waves.shape)
    return np.clip(waves + noise, 0, 255).astype(np.uint8)


def jpeg(image, **options):
    file = io.BytesIO()
    augment.to_pil(image).save(file, "JPEG", **options)
    return file.getvalue()


@installed
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("options", [{"quality": 92}, {"quality": 75, "progressive": True}, {"subsampling": 0}])
def test_jpeg_pixels_are_pillows(channels, options):
    if channels == 1:
        options = {name: value for name, value in options.items() if name != "subsampling"}
    stored = jpeg(scene(61, 83, channels), **options)
    expected = augment.from_pil(Image.open(io.BytesIO(stored)))
    np.testing.assert_array_equal(native.decoded_jpeg(stored, channels, most_pixels=61 * 83), expected)
    np.testing.assert_array_equal(files.decode(stored), expected)


@installed
def test_turned_large_and_cut_jpegs_are_left_to_pillow():
    image = scene(40, 60)
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = jpeg(image, exif=exif)
    assert files.decode(stored).shape == (60, 40, 3)
    assert native.decoded_jpeg(jpeg(image), 3, most_pixels=40 * 60 - 1) is None
    assert native.decoded_jpeg(jpeg(image), 1, most_pixels=2**27) is None
    cut = jpeg(image)[:-200]
    assert native.decoded_jpeg(cut, 3, most_pixels=2**27) is None
    with pytest.raises(files.PictureError, match="truncated"):
        files.decode(cut)


@installed
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("channels", [1, 3])
def test_crops_are_pillows_to_rounding(interpolation, channels):
    image = scene(150, 200, channels)
    for box in ((0, 0, 200, 150), (20, 30, 170, 140), (90, 5, 130, 40), (160, 100, 200, 150)):
        resized = native.resized_box(image, (64, 64), interpolation, box)
        expected = augment.resized(image, (64, 64), interpolation, box=box)
        difference = resized.astype(int) - expected
        assert np.mean(difference**2) < 0.4, box
        assert np.abs(difference).max() <= 3


def test_without_the_packages_pillow_does_all(monkeypatch):
    monkeypatch.setattr(native, "simplejpeg", None)
    monkeypatch.setattr(native, "cykooz_resizer", None)
    image = scene(50, 70)
    stored = jpeg(image)
    np.testing.assert_array_equal(files.decode(stored), augment.from_pil(Image.open(io.BytesIO(stored))))
    crop = augment.random_resized_crop(image, 32, (0.5, 1.0), "bicubic", np.random.default_rng(3))
    box = augment.crop_box(50, 70, (0.5, 1.0), np.random.default_rng(3))
    np.testing.assert_array_equal(crop, augment.resized(image, (32, 32), "bicubic", box=box))
