"""Two random views of a picture (SimCLR: Chen et al., 2020; MoCo v3: Chen et al., 2021), on the host.

The changes of colour and sharpness work on a stack of pictures (N, height, width, channels), float32 from 0 to 1, in
NumPy, each picture with factors of its own. Saturation, hue and greyscale mean nothing on one channel and are left out
there; the other changes, and the random numbers they draw, are the same.
"""

from collections.abc import Callable, Mapping
from typing import Any

import ml_collections
import numpy as np

from sigmarep.data.images import augment, transforms
from sigmarep.errors import BadInput

VIEWS = 2
# ITU-R 601, as Pillow and torchvision turn colours into grey.
LUMA = np.asarray((0.299, 0.587, 0.114), np.float32)
JITTERS = ("brightness", "contrast", "saturation", "hue")
SOLARISE_FROM = 0.5


def default_config() -> ml_collections.ConfigDict:
    """The block `config.data.views`: SimCLR's at half its colour strength, with a flip."""
    config = ml_collections.ConfigDict()
    config.crop_scale = (0.08, 1.0)
    config.flip = 0.5
    # The probability of jitter as a whole, and how far each factor goes from 1 (hue: from 0, in turns of the circle).
    config.jitter = 0.8
    config.brightness, config.contrast, config.saturation, config.hue = 0.4, 0.4, 0.4, 0.1
    config.greyscale = 0.2
    # Probabilities for the first and the second view.
    config.blur = (0.5, 0.5)
    config.solarise = (0.0, 0.0)
    # Range of the Gaussian's standard deviation in pixels.
    config.blur_sigma = (0.1, 2.0)
    return config


def imagenet_2012(data: ml_collections.ConfigDict) -> None:
    """Sets `config.data` to ImageNet-1k at 224 pixels with SimCLR's augmentations at full colour strength."""
    data.name = "imagenet2012"
    data.eval_splits = ("validation",)
    data.image_size = 224
    data.mean = (0.485, 0.456, 0.406)
    data.std = (0.229, 0.224, 0.225)
    data.eval_crop = 0.875
    data.num_workers = 16
    views = data.views
    views.brightness, views.contrast, views.saturation, views.hue = 0.8, 0.8, 0.8, 0.2


def check(config: Any) -> None:
    """Raises BadInput where a field of `config.data` or `config.data.views` has a value that means nothing."""
    transforms.check_pictures(config)
    v = config.views
    transforms.check_crop_scale("views.crop_scale", v.crop_scale)
    for name in ("flip", "jitter", "greyscale", "brightness", "contrast", "saturation"):
        if not 0 <= v[name] <= 1:
            raise BadInput(f"config.data.views.{name} = {v[name]}: expected a number from 0 to 1")
    if not 0 <= v.hue <= 0.5:
        raise BadInput(f"config.data.views.hue = {v.hue}: expected a number from 0 to 0.5")
    for name in ("blur", "solarise"):
        if len(v[name]) != VIEWS or not all(0 <= each <= 1 for each in v[name]):
            raise BadInput(f"config.data.views.{name} = {v[name]}: expected two probabilities, one a view")
    if len(v.blur_sigma) != 2 or not 0 < v.blur_sigma[0] <= v.blur_sigma[1]:
        raise BadInput(f"config.data.views.blur_sigma = {v.blur_sigma}: expected two numbers, 0 < a <= b")


def train_transform(config: Any) -> Callable[[Mapping[str, Any], np.random.Generator], dict[str, Any]]:
    """The transform of `sigmarep.data.pipeline.training_stream`: `views` float32 (2, size, size, channels), normalised.

    No label is passed on: training never sees one.

    Args:
      config: `config.data`, with the block `views`.

    Raises:
      BadInput: a field means nothing.
    """
    check(config)
    v, size, channels = config.views, config.image_size, len(config.mean)
    mean, std = np.asarray(config.mean, np.float32), np.asarray(config.std, np.float32)

    def transform(example: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        image = transforms.with_channels(example["image"], channels)
        crops = [
            augment.random_resized_crop(image, size, v.crop_scale, config.interpolation, rng) for _ in range(VIEWS)
        ]
        stack = np.stack(crops).astype(np.float32) / 255
        chosen = rng.random((5, VIEWS)) < [[v.flip] * 2, [v.jitter] * 2, [v.greyscale] * 2, v.blur, v.solarise]
        flips, jitters, greys, blurs, solarised = chosen
        orders = np.stack([rng.permutation(len(JITTERS)) for _ in range(VIEWS)])
        spread = np.asarray([v[name] for name in JITTERS], np.float32)
        factors = rng.uniform(-1, 1, (VIEWS, len(JITTERS))).astype(np.float32) * spread
        sigmas = rng.uniform(v.blur_sigma[0], v.blur_sigma[1], VIEWS)

        stack[flips] = stack[flips, :, ::-1]
        stack[jitters] = jittered(stack[jitters], factors[jitters], orders[jitters])
        stack[greys] = greyscaled(stack[greys])
        stack[blurs] = blurred(stack[blurs], sigmas[blurs])
        stack[solarised] = solarise(stack[solarised])
        return {"views": (stack - mean) / std}

    return transform


def evaluation_transform(config: Any, *, seed: int | None = None) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """The deterministic transform of evaluation: `image` and `label` as in `transforms.eval_transform`.

    Args:
      seed: adds `views`, drawn from it and the example's `index`: the same at every evaluation.
    """
    plain, random = transforms.eval_transform(config), train_transform(config)

    def transform(example: Mapping[str, Any]) -> dict[str, Any]:
        found = plain(example)
        if seed is not None:
            found |= random(example, np.random.default_rng((seed, int(example["index"]))))
        return found

    return transform


def jittered(stack: np.ndarray, changes: np.ndarray, orders: np.ndarray) -> np.ndarray:
    """Brightness, contrast, saturation and hue changed in each picture's own order.

    Args:
      changes: (N, 4) what is added to a factor of 1, or to the hue in turns; in the order of `JITTERS`.
      orders: (N, 4) which of them comes first, second, … on each picture.
    """
    operations = (brightened, contrasted, saturated, hue_turned)
    stack = stack.copy()
    for place in range(len(JITTERS)):
        for index, operation in enumerate(operations):
            rows = orders[:, place] == index
            if rows.any():
                stack[rows] = operation(stack[rows], changes[rows, index][:, None, None, None])
    return stack


def brightened(stack: np.ndarray, change: np.ndarray) -> np.ndarray:
    """The picture times 1 + change."""
    return np.clip(stack * (1 + change), 0, 1)


def contrasted(stack: np.ndarray, change: np.ndarray) -> np.ndarray:
    """The distance from the picture's mean grey times 1 + change."""
    mean = _grey(stack).mean((1, 2, 3), keepdims=True)
    return np.clip(mean + (stack - mean) * (1 + change), 0, 1)


def saturated(stack: np.ndarray, change: np.ndarray) -> np.ndarray:
    """The distance from the pixel's own grey times 1 + change."""
    if stack.shape[-1] == 1:
        return stack
    grey = _grey(stack)
    return np.clip(grey + (stack - grey) * (1 + change), 0, 1)


def hue_turned(stack: np.ndarray, turns: np.ndarray) -> np.ndarray:
    """The hue of the HSV colour circle turned by `turns` of it; saturation and value stay."""
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
    sixth = sixth + 6 * turns[..., 0]
    # Red, green and blue as functions of the hue (Smith, 1978, in one formula).
    at = (np.asarray((5, 3, 1), np.float32) + sixth[..., None]) % 6
    return value[..., None] - chroma[..., None] * np.clip(np.minimum(at, 4 - at), 0, 1)


def greyscaled(stack: np.ndarray) -> np.ndarray:
    """Every channel the pixel's grey."""
    return np.broadcast_to(_grey(stack), stack.shape)


def solarise(stack: np.ndarray) -> np.ndarray:
    """Values from a half on inverted."""
    return np.where(stack >= SOLARISE_FROM, 1 - stack, stack)


def blurred(stack: np.ndarray, sigmas: np.ndarray) -> np.ndarray:
    """A Gaussian of each picture's own standard deviation in pixels; beyond the edge the picture is mirrored."""
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
    """The (size, size) matrix of a Gaussian cut at four standard deviations, mirrored at both ends; rows sum to 1."""
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


def _grey(stack: np.ndarray) -> np.ndarray:
    return stack if stack.shape[-1] == 1 else (stack @ LUMA)[..., None]
