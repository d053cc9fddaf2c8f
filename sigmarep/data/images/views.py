"""Two random views of an image (SimCLR: Chen et al., 2020; MoCo v3: Chen et al., 2021), on the host.

Color and sharpness operations work in NumPy on stacks of images (N, height, width, channels), float32 from 0 to 1, with
separate factors for each image. Images with one channel skip saturation, hue and grayscale; the other operations, and the
random numbers drawn, are the same.
"""

from collections.abc import Callable, Mapping
from typing import Any

import ml_collections
import numpy as np

from sigmarep import configuration
from sigmarep.data.images import augment, transforms
from sigmarep.fields import field

VIEWS = 2
# ITU-R 601, the weights of Pillow and torchvision.
LUMA = np.asarray((0.299, 0.587, 0.114), np.float32)
JITTERS = ("brightness", "contrast", "saturation", "hue")
SOLARIZE_THRESHOLD = 0.5


_SHARE: dict[str, Any] = {"at_least": 0, "at_most": 1}
FIELDS: dict[str, Any] = {
    "crop_scale": field(
        (0.08, 1.0), "Smallest and largest share of the area.", lengths=(2,), above=0, at_most=1, order="not falling"
    ),
    "flip": field(0.5, "Probability of a mirrored view.", **_SHARE),
    "jitter": field(0.8, "Probability of color jitter.", **_SHARE),
    "brightness": field(0.4, "Largest distance of the brightness factor from 1.", **_SHARE),
    "contrast": field(0.4, "Largest distance of the contrast factor from 1.", **_SHARE),
    "saturation": field(0.4, "Largest distance of the saturation factor from 1.", **_SHARE),
    "hue": field(0.1, "Largest change of hue, in turns of the color circle.", at_least=0, at_most=0.5),
    "greyscale": field(0.2, "Probability of a grey view.", **_SHARE),
    "blur": field(
        (0.5, 0.5), "Probabilities that the first and the second view are blurred.", lengths=(VIEWS,), **_SHARE
    ),
    "solarise": field((0.0, 0.0), "Probabilities that the two views are solarized.", lengths=(VIEWS,), **_SHARE),
    "blur_sigma": field(
        (0.1, 2.0), "Range of the blur's standard deviation in pixels.", lengths=(2,), above=0, order="not falling"
    ),
}


def default_config() -> ml_collections.ConfigDict:
    """The section `config.data.views`: SimCLR's at half its color strength, with a flip."""
    return configuration.make(FIELDS)


def imagenet_2012(data: ml_collections.ConfigDict) -> None:
    """Sets `config.data` to ImageNet-1k at 224 pixels with SimCLR's augmentations at full color strength."""
    data.name = "imagenet2012"
    data.eval_splits = ("validation",)
    data.image_size = 224
    data.mean = (0.485, 0.456, 0.406)
    data.std = (0.229, 0.224, 0.225)
    data.eval_crop = 0.875
    data.num_workers = 16
    views = data.views
    views.brightness, views.contrast, views.saturation, views.hue = 0.8, 0.8, 0.8, 0.2


def train_transform(config: Any) -> Callable[[Mapping[str, Any], np.random.Generator], dict[str, Any]]:
    """Returns the transform for `sigmarep.data.pipeline.training_stream`.

    Its result has only `views` float32 (2, size, size, channels), normalized, and no label: training never sees one.

    Args:
      config: `config.data`, with the block `views`.

    Raises:
      BadInput: a field has an invalid value.
    """
    transforms.check(config)
    v, size, channels = config.views, config.image_size, len(config.mean)
    mean, std = np.asarray(config.mean, np.float32), np.asarray(config.std, np.float32)

    def transform(example: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        image = transforms.with_channels(example["image"], channels)
        crops = [
            augment.random_resized_crop(image, size, v.crop_scale, config.interpolation, rng) for _ in range(VIEWS)
        ]
        stack = np.stack(crops).astype(np.float32) / 255
        chosen = rng.random((5, VIEWS)) < [[v.flip] * 2, [v.jitter] * 2, [v.greyscale] * 2, v.blur, v.solarise]
        flips, jitters, grays, blurs, solarized = chosen
        orders = np.stack([rng.permutation(len(JITTERS)) for _ in range(VIEWS)])
        spread = np.asarray([v[name] for name in JITTERS], np.float32)
        factors = rng.uniform(-1, 1, (VIEWS, len(JITTERS))).astype(np.float32) * spread
        sigmas = rng.uniform(v.blur_sigma[0], v.blur_sigma[1], VIEWS)

        stack[flips] = stack[flips, :, ::-1]
        stack[jitters] = jittered(stack[jitters], factors[jitters], orders[jitters])
        stack[grays] = grayscaled(stack[grays])
        stack[blurs] = blurred(stack[blurs], sigmas[blurs])
        stack[solarized] = solarize(stack[solarized])
        return {"views": (stack - mean) / std}

    return transform


def evaluation_transform(config: Any, *, seed: int | None = None) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """Returns the deterministic transform of evaluation: `image` and `label` as in `transforms.eval_transform`.

    Args:
      config: `config.data`, with the block `views`.
      seed: adds `views`, drawn from the seed and the example's `index`, so that they are the same in every evaluation;
        None for no views.
    """
    plain, random = transforms.eval_transform(config), train_transform(config)

    def transform(example: Mapping[str, Any]) -> dict[str, Any]:
        transformed = plain(example)
        if seed is not None:
            transformed |= random(example, np.random.default_rng((seed, int(example["index"]))))
        return transformed

    return transform


def jittered(stack: np.ndarray, changes: np.ndarray, orders: np.ndarray) -> np.ndarray:
    """Changes brightness, contrast, saturation and hue, in an order of its own for each image.

    Args:
      stack: (N, height, width, channels).
      changes: (N, 4), in the order of `JITTERS`: factor − 1, or for the hue the shift as a fraction of the color circle.
      orders: (N, 4), indices into `JITTERS` in the order of application.
    """
    operations = (brightened, contrasted, saturated, hue_shifted)
    stack = stack.copy()
    for place in range(len(JITTERS)):
        for index, operation in enumerate(operations):
            rows = orders[:, place] == index
            if rows.any():
                stack[rows] = operation(stack[rows], changes[rows, index][:, None, None, None])
    return stack


def brightened(stack: np.ndarray, change: np.ndarray) -> np.ndarray:
    """Multiplies the image by 1 + change."""
    return np.clip(stack * (1 + change), 0, 1)


def contrasted(stack: np.ndarray, change: np.ndarray) -> np.ndarray:
    """Multiplies the distance from the image's mean gray by 1 + change."""
    mean = _gray(stack).mean((1, 2, 3), keepdims=True)
    return np.clip(mean + (stack - mean) * (1 + change), 0, 1)


def saturated(stack: np.ndarray, change: np.ndarray) -> np.ndarray:
    """Multiplies the distance from each pixel's gray by 1 + change."""
    if stack.shape[-1] == 1:
        return stack
    gray = _gray(stack)
    return np.clip(gray + (stack - gray) * (1 + change), 0, 1)


def hue_shifted(stack: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Shifts the HSV hue by a fraction of the color circle; saturation and value stay."""
    if stack.shape[-1] == 1:
        return stack
    value, least = stack.max(-1), stack.min(-1)
    chroma = value - least
    safe = np.where(chroma > 0, chroma, 1)
    red, green, blue = (stack[..., i] for i in range(3))
    sixth = np.where(
        value == red,
        (green - blue) / safe,
        np.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    sixth = sixth + 6 * shift[..., 0]
    # Red, green and blue as functions of the hue (Smith, 1978, in one formula).
    at = (np.asarray((5, 3, 1), np.float32) + sixth[..., None]) % 6
    return value[..., None] - chroma[..., None] * np.clip(np.minimum(at, 4 - at), 0, 1)


def grayscaled(stack: np.ndarray) -> np.ndarray:
    """Sets every channel to the pixel's gray."""
    return np.broadcast_to(_gray(stack), stack.shape)


def solarize(stack: np.ndarray) -> np.ndarray:
    """Inverts values of at least `SOLARIZE_THRESHOLD`."""
    return np.where(stack >= SOLARIZE_THRESHOLD, 1 - stack, stack)


def blurred(stack: np.ndarray, sigmas: np.ndarray) -> np.ndarray:
    """Blurs images with Gaussians whose standard deviations are `sigmas` (N,) in pixels; edges are mirrored."""
    if not len(stack):
        return stack
    count, height, width, channels = stack.shape
    rows, columns = (
        np.stack([gaussian_matrix(size, float(sigma)) for sigma in sigmas]).astype(np.float32)
        for size in (height, width)
    )
    down = (rows @ stack.reshape(count, height, -1)).reshape(stack.shape)
    across = columns @ down.transpose(0, 2, 1, 3).reshape(count, width, -1)
    return across.reshape(count, width, height, channels).transpose(0, 2, 1, 3)


def gaussian_matrix(size: int, sigma: float) -> np.ndarray:
    """Matrix (size, size) of a Gaussian truncated at four standard deviations, mirrored at both ends; rows sum to 1."""
    radius = max(int(np.ceil(4 * sigma)), 1)
    offsets = np.arange(-radius, radius + 1)
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    sources = np.arange(size)[:, None] + offsets
    # … 2 1 0 | 0 1 2 … n−1 | n−1 n−2 …
    folded = sources % (2 * size)
    folded = np.where(folded >= size, 2 * size - 1 - folded, folded)
    matrix = np.zeros((size, size))
    np.add.at(
        matrix, (np.repeat(np.arange(size), len(offsets)), folded.ravel()), np.tile(weights / weights.sum(), size)
    )
    return matrix


def _gray(stack: np.ndarray) -> np.ndarray:
    return stack if stack.shape[-1] == 1 else (stack @ LUMA)[..., None]
