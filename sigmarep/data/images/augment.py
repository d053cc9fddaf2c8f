"""Random augmentation of images on the host, in NumPy and Pillow.

Images are uint8 arrays (height, width, channels) until they are normalized to float32. Random numbers come only from the
generator passed in.
"""

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps, ImageStat

from sigmarep.data.images import native

RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
# Gray value of areas that a geometric operation uncovers.
FILL = 128
# Rows that `shifted_rows` holds in float32.
ROWS_AT_A_TIME = 32


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
    """A random box of an image, resized to (size, size) by native code, if installed, or Pillow."""
    box = crop_box(image.shape[0], image.shape[1], scale, rng)
    native_result = native.resized_box(image, (size, size), interpolation, box)
    return resized(image, (size, size), interpolation, box=box) if native_result is None else native_result


def mirrored(image: np.ndarray) -> np.ndarray:
    """Exchanges left and right; a copy, because every later pass over a reversed view costs more."""
    result = np.empty_like(image)
    # One channel at a time: NumPy copies runs of three bytes slowly.
    for channel in range(image.shape[-1]):
        result[..., channel] = image[:, ::-1, channel]
    return result


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


def _by_pillow(operation: Callable[[Image.Image, float, int], Image.Image]) -> "Operation":
    return lambda image, level, sign: from_pil(operation(to_pil(image), level, sign))


def _by_table(operation: Callable[[Image.Image, float, int], Image.Image]) -> "Operation":
    """Applies an operation that maps every value alike: to the 256 values once, then by table to the image."""

    def apply(image, level, sign):
        return _looked_up(image, operation(_VALUES, level, sign))

    return apply


def _looked_up(image: np.ndarray, table: Image.Image) -> np.ndarray:
    return np.frombuffer(image.tobytes().translate(table.tobytes()), np.uint8).reshape(image.shape)


def _contrast(image: np.ndarray, level: float, sign: int) -> np.ndarray:
    mean = int(ImageStat.Stat(to_pil(image).convert("L")).mean[0] + 0.5)
    gray = Image.new("L", _VALUES.size, mean)
    return _looked_up(image, Image.blend(gray, _VALUES, 1 + sign * 0.9 * level))


def shifted_rows(image: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    """Moves every row to the left by a number of pixels, bilinearly, as Pillow's affine transform to 1 of 255.

    Args:
      image: uint8 (height, width, channels).
      shifts: (height,), float64. Output x is the input at x + shift, or `FILL` outside the image.
    """
    height, width, channels = image.shape
    # Further shifts leave nothing of a row either.
    shifts = np.clip(shifts, -width - 1, width + 1)
    whole = np.floor(shifts).astype(int)
    before, after = max(-int(whole.min()), 0) + 1, max(int(whole.max()), 0) + 1
    padded = np.full((height, (before + width + after) * channels), FILL, np.uint8)
    padded[:, before * channels : (before + width) * channels] = image.reshape(height, -1)
    windows = np.lib.stride_tricks.sliding_window_view(padded, width * channels, axis=1)
    rows, starts = np.arange(height), (before + whole) * channels
    weights = (shifts - whole).astype(np.float32)[:, None]
    moved = np.empty((height, width * channels), np.uint8)
    # A few rows at a time stay in the cache.
    for start in range(0, height, ROWS_AT_A_TIME):
        part = slice(start, start + ROWS_AT_A_TIME)
        first, second = windows[rows[part], starts[part]], windows[rows[part], starts[part] + channels]
        value = np.subtract(second, first, dtype=np.float32)
        value *= weights[part]
        value += first
        # Cut off as Pillow does, where float32 would leave whole numbers a little too small.
        value += 1e-4
        moved[part] = value
    moved = moved.reshape(image.shape)
    # Half a pixel beyond the first and the last pixels' centers still belongs to the image.
    nearer = (shifts - whole >= 0.5)[:, None]
    for column, edge in (
        (-1 - whole, np.where(nearer, image[:, 0], FILL)),
        (width - 1 - whole, np.where(nearer, FILL, image[:, -1])),
    ):
        inside = (column >= 0) & (column < width)
        moved[rows[inside], column[inside]] = edge[inside]
    return moved


def _transposed(image: np.ndarray) -> np.ndarray:
    result = np.empty((image.shape[1], image.shape[0], image.shape[2]), np.uint8)
    for channel in range(image.shape[-1]):
        result[..., channel] = image[..., channel].T
    return result


def _shear_x(image: np.ndarray, level: float, sign: int) -> np.ndarray:
    return shifted_rows(image, sign * 0.3 * level * (np.arange(image.shape[0]) + 0.5))


def _translate_x(image: np.ndarray, level: float, sign: int) -> np.ndarray:
    return shifted_rows(image, np.full(image.shape[0], sign * 0.45 * level * image.shape[1]))


def _rotated(picture: Image.Image, degrees: float) -> Image.Image:
    fill = FILL if picture.mode == "L" else (FILL,) * 3
    return picture.rotate(degrees, RESAMPLING["bilinear"], fillcolor=fill)


Operation = Callable[[np.ndarray, float, int], np.ndarray]
_VALUES = Image.frombytes("L", (256, 1), bytes(range(256)))
# RandAugment's operations (Cubuk et al., 2020) in the "increasing" variant: the change grows with the level, from 0 to 1;
# where possible level 0 changes nothing. `sign` is −1 or 1.
OPERATIONS: dict[str, Operation] = {
    "auto_contrast": _by_pillow(lambda picture, level, sign: ImageOps.autocontrast(picture)),
    "equalize": _by_pillow(lambda picture, level, sign: ImageOps.equalize(picture)),
    "invert": _by_table(lambda picture, level, sign: ImageOps.invert(picture)),
    "rotate": _by_pillow(lambda picture, level, sign: _rotated(picture, sign * 30 * level)),
    "posterize": _by_table(lambda picture, level, sign: ImageOps.posterize(picture, max(4 - int(4 * level), 1))),
    "solarize": _by_table(lambda picture, level, sign: ImageOps.solarize(picture, 256 - min(256, int(256 * level)))),
    "solarize_add": _by_table(
        lambda picture, level, sign: picture.point(
            lambda value: min(255, value + int(110 * level)) if value < 128 else value
        )
    ),
    "color": _by_pillow(lambda picture, level, sign: ImageEnhance.Color(picture).enhance(1 + sign * 0.9 * level)),
    "contrast": _contrast,
    "brightness": _by_table(
        lambda picture, level, sign: ImageEnhance.Brightness(picture).enhance(1 + sign * 0.9 * level)
    ),
    "sharpness": _by_pillow(
        lambda picture, level, sign: ImageEnhance.Sharpness(picture).enhance(1 + sign * 0.9 * level)
    ),
    "shear_x": _shear_x,
    "shear_y": lambda image, level, sign: _transposed(_shear_x(_transposed(image), level, sign)),
    "translate_x": _translate_x,
    "translate_y": lambda image, level, sign: _transposed(_translate_x(_transposed(image), level, sign)),
}


def rand_augment(
    image: np.ndarray, *, layers: int, magnitude: float, std: float, probability: float, rng: np.random.Generator
) -> np.ndarray:
    """Applies `layers` random operations, each with `probability`, at levels N(magnitude, std)/10 clipped to [0, 1]."""
    names = list(OPERATIONS)
    for index in rng.integers(0, len(names), size=layers):
        applied, level, sign = rng.random(), rng.normal(magnitude, std), rng.choice((-1, 1))
        if applied < probability:
            image = OPERATIONS[names[index]](image, float(np.clip(level / 10, 0, 1)), int(sign))
    return image


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
        mixed = share_32 * images
        mixed += (1 - share_32) * images[::-1]
        return mixed, share
    height, width = images.shape[1:3]
    side = math.sqrt(1 - share)
    center_y, center_x = int(rng.integers(height)), int(rng.integers(width))
    half_h, half_w = int(height * side) // 2, int(width * side) // 2
    top, bottom = max(center_y - half_h, 0), min(center_y + half_h, height)
    left, right = max(center_x - half_w, 0), min(center_x + half_w, width)
    mixed = images.copy()
    mixed[:, top:bottom, left:right] = images[::-1, top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)
