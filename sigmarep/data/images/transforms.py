"""Transforms of decoded images into a model's input, as configured by `config.data`."""

from collections.abc import Callable, Mapping
from typing import Any

import ml_collections
import numpy as np
from PIL import Image

from sigmarep import configuration
from sigmarep.data import sources
from sigmarep.data.images import augment, files
from sigmarep.data.splitting import HELD_OUT
from sigmarep.errors import BadInput
from sigmarep.fields import field, with_defaults

CROPS = ("none", "pad", "resized")
# Pillow's modes by number of channels.
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


_SHARE: dict[str, Any] = {"at_least": 0, "at_most": 1}
FIELDS: dict[str, Any] = {
    **with_defaults(sources.FIELDS, name="digits", num_threads=8),
    "folder": field("", "Pictures of the data set image_folder, in a folder for each class."),
    "held_out": field(
        HELD_OUT,
        "Share of image_folder's pictures that becomes the split test, if the folder has neither test nor validation.",
        at_least=0,
        below=1,
    ),
    "image_size": field(8, "Height and width of the model's pictures in pixels.", at_least=1, at_most=2**14),
    "mean": field(
        (0.5,), "Mean of each channel on a scale of 0 to 1; 1 or 3 values, as many as channels.", lengths=(1, 3)
    ),
    "std": field((0.5,), "Standard deviation of each channel on the same scale.", lengths=(1, 3), above=0),
    "interpolation": field("bicubic", "Interpolation of every change of size.", choices=augment.RESAMPLING),
    "eval_crop": field(1.0, "Fraction of the resized picture's side that evaluation keeps.", above=0, at_most=1),
    "in_memory": field(False, "Reads and decodes the training split once, before the first step."),
    "num_workers": field(0, "Processes that read and transform examples; 0 for none.", at_least=0, at_most=1024),
    "augment": {
        "crop": field("none", "pad: pad and crop; resized: a box of crop_scale of the area.", choices=CROPS),
        "pad": field(4, "Pixels of padding on each side.", at_least=0, at_most=2**14),
        "crop_scale": field(
            (0.08, 1.0),
            "Smallest and largest share of the area.",
            lengths=(2,),
            above=0,
            at_most=1,
            order="not falling",
        ),
        "flip": field(False, "Mirrors half of the pictures."),
        "repeats": field(
            1,
            "Times that a picture comes in a batch, each time augmented anew (repeated augmentation, Hoffer et al., 2020); "
            "at most half of the batch.",
            at_least=1,
            at_most=2**10,
        ),
        "color_jitter": field(0.0, "Strength of brightness, contrast and saturation jitter.", **_SHARE),
        "randaugment_layers": field(0, "RandAugment's operations per picture; 0 for none.", at_least=0, at_most=100),
        "randaugment_magnitude": field(9.0, "Mean strength of an operation, of 10.", at_least=0, at_most=10),
        "randaugment_std": field(0.5, "Standard deviation of the strength.", at_least=0),
        "randaugment_probability": field(0.5, "Probability of each operation.", **_SHARE),
        "erasing": field(0.0, "Probability of erasing a box.", **_SHARE),
        "mixup": field(0.0, "Parameter of mixup's Beta distribution; 0 for none.", at_least=0),
        "cutmix": field(0.0, "Parameter of CutMix's Beta distribution; 0 for none.", at_least=0),
        "mix_probability": field(1.0, "Probability that a pair is mixed.", **_SHARE),
    },
}


def default_config() -> ml_collections.ConfigDict:
    """The section `config.data` of image classification; the digits without augmentation."""
    return configuration.make(FIELDS)


def imagenet_2012(data: ml_collections.ConfigDict) -> None:
    """Sets `config.data` to ImageNet-1k at 224 pixels with the usual crop, flip, RandAugment 9/0.5, mixup and CutMix."""
    data.name = "imagenet2012"
    data.eval_splits = ("validation",)
    data.image_size = 224
    data.mean = (0.485, 0.456, 0.406)
    data.std = (0.229, 0.224, 0.225)
    data.eval_crop = 0.875
    data.num_workers = 16
    data.augment.crop, data.augment.flip = "resized", True
    data.augment.randaugment_layers = 2
    data.augment.mixup, data.augment.cutmix = 0.8, 1.0


def check(config: Any) -> None:
    """Checks the relation of `config.data.mean` and `std`.

    Raises:
      BadInput: they have different numbers of channels.
    """
    if len(config.mean) != len(config.std):
        raise BadInput(f"config.data.mean = {config.mean} and std = {config.std}: expected as many values in each")


def train_transforms(config: Any) -> tuple[Callable[..., dict[str, Any]], Callable[..., dict[str, Any]] | None]:
    """Returns the transforms of single examples and of pairs for `sigmarep.data.pipeline.training_stream`.

    The pair transform is None without mixing. The result of both has `image` float32 (size, size, channels), `label`
    int32, `mix` float32, the weight of `label`, and `mix_label` int32, the label with the remaining weight.

    Raises:
      BadInput: a field of `config` has an invalid value.
    """
    check(config)
    a, size, channels = config.augment, config.image_size, len(config.mean)
    mean, std = _statistics(config)

    def transform(example: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        image = with_channels(example["image"], channels)
        if a.crop == "resized":
            image = augment.random_resized_crop(image, size, a.crop_scale, config.interpolation, rng)
        else:
            image = augment.resized(image, (size, size), config.interpolation)
            if a.crop == "pad":
                image = augment.pad_and_crop(image, a.pad, rng)
        if a.flip and rng.random() < 0.5:
            image = augment.mirrored(image)
        if a.color_jitter:
            image = augment.color_jitter(image, a.color_jitter, rng)
        if a.randaugment_layers:
            image = augment.rand_augment(
                image,
                layers=a.randaugment_layers,
                magnitude=a.randaugment_magnitude,
                std=a.randaugment_std,
                probability=a.randaugment_probability,
                rng=rng,
            )
        image = _normalized(image, mean, std)
        if a.erasing:
            image = augment.random_erasing(image, a.erasing, rng)
        label = np.int32(example["label"])
        return {"image": image, "label": label, "mix": np.float32(1), "mix_label": label}

    def mix(pair: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        images, share = augment.mix_pair(
            pair["image"], mixup=a.mixup, cutmix=a.cutmix, probability=a.mix_probability, rng=rng
        )
        return {
            "image": images,
            "label": pair["label"],
            "mix": np.full(2, share, np.float32),
            "mix_label": pair["label"][::-1],
        }

    return transform, mix if (a.mixup or a.cutmix) and a.mix_probability else None


def eval_transform(config: Any) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """Returns the deterministic transform of evaluation: `image` float32 (size, size, channels) and `label` int32."""
    check(config)
    mean, std = _statistics(config)

    def transform(example: Mapping[str, Any]) -> dict[str, Any]:
        image = with_channels(example["image"], len(config.mean))
        image = augment.center_crop(image, config.image_size, config.eval_crop, config.interpolation)
        return {"image": _normalized(image, mean, std), "label": np.int32(example["label"])}

    return transform


def with_channels(image: np.ndarray, channels: int) -> np.ndarray:
    """Converts an image to uint8 (height, width, channels), from color to gray or gray to color.

    Two channels are gray and opacity, four are color and opacity; the image is laid over white.

    Raises:
      BadInput: the image is not uint8, or has no or more than four channels.
    """
    image = np.asarray(image)
    if image.ndim == 2:
        image = image[..., None]
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] not in MODES:
        raise BadInput(
            f"config.data.name: has an image of type {image.dtype} and shape {image.shape}; expected uint8 (height, width) "
            "with 1 to 4 channels; choose another data set"
        )
    if image.shape[-1] == channels:
        return image
    height, width, stored_channels = image.shape
    picture = Image.frombytes(MODES[stored_channels], (width, height), image.tobytes())
    if stored_channels in (2, 4):
        picture = files.on_white(picture.convert("RGBA"))
    return augment.from_pil(picture.convert("L" if channels == 1 else "RGB"))


def _statistics(config: Any) -> tuple[np.ndarray, np.ndarray]:
    return 255 * np.asarray(config.mean, np.float32), 255 * np.asarray(config.std, np.float32)


def _normalized(image: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    # Whole rows in one run: over an axis of three channels alone NumPy is twenty times slower.
    height, width, _ = image.shape
    result = np.subtract(image.reshape(height, -1), np.tile(mean, width), dtype=np.float32)
    result /= np.tile(std, width)
    return result.reshape(image.shape)
