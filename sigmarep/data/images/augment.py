"""Random augmentation of images on the host, in NumPy and Pillow.

Images are uint8 arrays (height, width, channels) until they are normalized to float32. Random numbers come only from the
generator passed in.
"""

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
# Gray value of areas that a geometric operation uncovers.
FILL = 128


def to_pil(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def from_pil(image: Image.Image) -> np.ndarray:
    array = np.asarray(image)
    return array[..., None] if array.ndim == 2 else array


def resized(image: np.ndarray, size: tuple[int, int], interpolation: str, box=None) -> np.ndarray:
    """Resizes `image`, or its part `box` (left, top, right, bottom), to `size` (height, width)."""
    if box is None and image.shape[:2] == size:
        return image
    return from_pil(to_pil(image).resize(size[::-1], RESAMPLING[interpolation], box=box))


def center_crop(image: np.ndarray, size: int, fraction: float, interpolation: str) -> np.ndarray:
    """Resizes the shorter side to size / fraction and crops the central `size` x `size`."""
    height, width = image.shape[:2]
    scale = round(size / fraction) / min(height, width)
    height, width = max(round(height * scale), size), max(round(width * scale), size)
    image = resized(image, (height, width), interpolation)
    top, left = (height - size) // 2, (width - size) // 2
    return image[top : top + size, left : left + size]


def crop_box(
    height: int, width: int, scale: tuple[float, float], rng: np.random.Generator, ratio=(3 / 4, 4 / 3)
) -> tuple[int, int, int, int]:
    """Draws a box (left, top, right, bottom) as in Szegedy et al. (2015).

    If ten boxes in a row do not fit into the image, returns the largest centered box with an allowed aspect ratio.

    Args:
      height, width: size of the image.
      scale: range of the box's share of the area.
      rng: source of the random numbers.
      ratio: range of width / height.
    """
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
            return left, top, left + w, top + h
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def random_resized_crop(image, size: int, scale, interpolation: str, rng) -> np.ndarray:
    box = crop_box(image.shape[0], image.shape[1], scale, rng)
    return resized(image, (size, size), interpolation, box=box)


def pad_and_crop(image: np.ndarray, padding: int, rng: np.random.Generator) -> np.ndarray:
    """Pads an image with zeros on all sides and crops it at random to its original size."""
    height, width = image.shape[:2]
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    top, left = rng.integers(0, 2 * padding + 1, size=2)
    return padded[top : top + height, left : left + width]


def color_jitter(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Scales brightness, contrast and saturation by factors from 1 − strength to 1 + strength, in random order."""
    picture = to_pil(image)
    enhancers = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]
    for i in rng.permutation(len(enhancers)):
        picture = enhancers[i](picture).enhance(rng.uniform(max(0.0, 1 - strength), 1 + strength))
    return from_pil(picture)


def _affine(matrix) -> Callable[[Image.Image], Image.Image]:
    def apply(picture):
        fill = FILL if picture.mode == "L" else (FILL,) * 3
        return picture.transform(picture.size, Image.Transform.AFFINE, matrix, RESAMPLING["bilinear"], fillcolor=fill)

    return apply


def _rotated(picture: Image.Image, degrees: float) -> Image.Image:
    fill = FILL if picture.mode == "L" else (FILL,) * 3
    return picture.rotate(degrees, RESAMPLING["bilinear"], fillcolor=fill)


# RandAugment's operations (Cubuk et al., 2020) in the "increasing" variant: the change grows with the level, from 0 to 1;
# where possible level 0 changes nothing. `sign` is −1 or 1.
OPERATIONS: dict[str, Callable[[Image.Image, float, int], Image.Image]] = {
    "auto_contrast": lambda picture, level, sign: ImageOps.autocontrast(picture),
    "equalize": lambda picture, level, sign: ImageOps.equalize(picture),
    "invert": lambda picture, level, sign: ImageOps.invert(picture),
    "rotate": lambda picture, level, sign: _rotated(picture, sign * 30 * level),
    "posterize": lambda picture, level, sign: ImageOps.posterize(picture, max(4 - int(4 * level), 1)),
    "solarize": lambda picture, level, sign: ImageOps.solarize(picture, 256 - min(256, int(256 * level))),
    "solarize_add": lambda picture, level, sign: picture.point(
        lambda value: min(255, value + int(110 * level)) if value < 128 else value
    ),
    "color": lambda picture, level, sign: ImageEnhance.Color(picture).enhance(1 + sign * 0.9 * level),
    "contrast": lambda picture, level, sign: ImageEnhance.Contrast(picture).enhance(1 + sign * 0.9 * level),
    "brightness": lambda picture, level, sign: ImageEnhance.Brightness(picture).enhance(1 + sign * 0.9 * level),
    "sharpness": lambda picture, level, sign: ImageEnhance.Sharpness(picture).enhance(1 + sign * 0.9 * level),
    "shear_x": lambda picture, level, sign: _affine((1, sign * 0.3 * level, 0, 0, 1, 0))(picture),
    "shear_y": lambda picture, level, sign: _affine((1, 0, 0, sign * 0.3 * level, 1, 0))(picture),
    "translate_x": lambda picture, level, sign: _affine((1, 0, sign * 0.45 * level * picture.size[0], 0, 1, 0))(
        picture
    ),
    "translate_y": lambda picture, level, sign: _affine((1, 0, 0, 0, 1, sign * 0.45 * level * picture.size[1]))(
        picture
    ),
}


def rand_augment(
    image: np.ndarray, *, layers: int, magnitude: float, std: float, probability: float, rng: np.random.Generator
) -> np.ndarray:
    """Applies `layers` random operations, each with `probability`, at levels N(magnitude, std)/10 clipped to [0, 1]."""
    picture = to_pil(image)
    names = list(OPERATIONS)
    for index in rng.integers(0, len(names), size=layers):
        applied, level, sign = rng.random(), rng.normal(magnitude, std), rng.choice((-1, 1))
        if applied < probability:
            picture = OPERATIONS[names[index]](picture, float(np.clip(level / 10, 0, 1)), int(sign))
    return from_pil(picture)


def random_erasing(image: np.ndarray, probability: float, rng: np.random.Generator) -> np.ndarray:
    """Fills a random box of 2 to 33 % of the area with normal noise (Zhong et al., 2020); for normalized images."""
    if rng.random() >= probability:
        return image
    height, width, channels = image.shape
    left, top, right, bottom = crop_box(height, width, (0.02, 1 / 3), rng, ratio=(0.3, 1 / 0.3))
    image = image.copy()
    image[top:bottom, left:right] = rng.normal(size=(bottom - top, right - left, channels))
    return image


def mix_pair(
    images: np.ndarray, *, mixup: float, cutmix: float, probability: float, rng: np.random.Generator
) -> tuple[np.ndarray, float]:
    """Mixes two images with each other by mixup (Zhang et al., 2018) or CutMix (Yun et al., 2019).

    If both alphas are positive, each method is chosen with equal probability.

    Args:
      images: (2, height, width, channels), normalized.
      mixup, cutmix: α of the methods' Beta distributions, 0 for off.
      probability: probability of mixing at all.
      rng: source of the random numbers.

    Returns:
      The mixed images, and λ: image i of the result is λ · image i + (1 − λ) · the other image. Under CutMix λ is the exact
      share of pixels.
    """
    if rng.random() >= probability or not (mixup > 0 or cutmix > 0):
        return images, 1.0
    cutting = cutmix > 0 and (mixup <= 0 or rng.random() < 0.5)
    share = float(rng.beta(cutmix, cutmix) if cutting else rng.beta(mixup, mixup))
    if not cutting:
        share_32 = np.float32(share)
        return share_32 * images + (1 - share_32) * images[::-1], share
    height, width = images.shape[1:3]
    side = math.sqrt(1 - share)
    center_y, center_x = int(rng.integers(height)), int(rng.integers(width))
    half_h, half_w = int(height * side) // 2, int(width * side) // 2
    top, bottom = max(center_y - half_h, 0), min(center_y + half_h, height)
    left, right = max(center_x - half_w, 0), min(center_x + half_w, width)
    mixed = images.copy()
    mixed[:, top:bottom, left:right] = images[::-1, top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)
