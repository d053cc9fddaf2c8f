"""Transforms of decoded images into a model's input, as configured by `config.data`."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ml_collections
import numpy as np
from ml_collections import config_dict
from PIL import Image

from sigmarep.data.images import augment
from sigmarep.errors import BadInput

CROPS = ("none", "pad", "resized")
# Pillow's modes by number of channels.
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "CMYK"}


def default_config() -> ml_collections.ConfigDict:
    """The block `config.data`; the digits without augmentation."""
    config = ml_collections.ConfigDict()
    config.name = "digits"
    # Where prepared data sets lie; $TFDS_DATA_DIR, then ~/tensorflow_datasets, if None.
    config.data_dir = config_dict.placeholder(str)
    config.train_split = "train"
    config.eval_splits = ("test",)
    config.image_size = 8
    # One value a channel; their number is the number of channels.
    config.mean = (0.5,)
    config.std = (0.5,)
    config.interpolation = "bicubic"
    # The share of the resized image's side that evaluation keeps.
    config.eval_crop = 1.0
    # Reads and decodes the training split once, before the first step: for sets that fit in memory.
    config.in_memory = False
    config.num_threads = 8
    config.num_workers = 0
    config.augment = ml_collections.ConfigDict()
    # "none"; "pad" by `pad` pixels and crop; "resized", a box of `crop_scale` of the area.
    config.augment.crop = "none"
    config.augment.pad = 4
    config.augment.crop_scale = (0.08, 1.0)
    config.augment.flip = False
    config.augment.color_jitter = 0.0
    config.augment.randaugment_layers = 0
    config.augment.randaugment_magnitude = 9.0
    config.augment.randaugment_std = 0.5
    config.augment.randaugment_probability = 0.5
    config.augment.erasing = 0.0
    # Alphas of the Beta distributions, 0 for off.
    config.augment.mixup = 0.0
    config.augment.cutmix = 0.0
    config.augment.mix_probability = 1.0
    return config


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
    """Raises BadInput where a field of `config.data` has a value that means nothing."""
    check_pictures(config)
    a = config.augment
    _check_word("augment.crop", a.crop, CROPS)
    for name in ("color_jitter", "erasing", "mix_probability", "randaugment_probability"):
        if not 0 <= a[name] <= 1:
            raise BadInput(f"config.data.augment.{name} = {a[name]}: expected a number from 0 to 1")
    for name in ("mixup", "cutmix", "pad", "randaugment_layers", "randaugment_std"):
        if a[name] < 0:
            raise BadInput(f"config.data.augment.{name} = {a[name]}: expected at least 0")
    check_crop_scale("augment.crop_scale", a.crop_scale)


def check_pictures(config: Any) -> None:
    """Raises BadInput where a field of `config.data` other than its augmentation has a value that means nothing."""
    _check_word("interpolation", config.interpolation, augment.RESAMPLING)
    if len(config.mean) != len(config.std) or len(config.mean) not in (1, 3):
        raise BadInput(f"config.data.mean = {config.mean} and std = {config.std}: expected 1 or 3 values in each")
    if any(value <= 0 for value in config.std):
        raise BadInput(f"config.data.std = {config.std}: expected positive values")
    if not 0 < config.eval_crop <= 1:
        raise BadInput(f"config.data.eval_crop = {config.eval_crop}: expected a number above 0, at most 1")
    for name, least in (("image_size", 1), ("num_threads", 1), ("num_workers", 0)):
        if config[name] < least:
            raise BadInput(f"config.data.{name} = {config[name]}: expected at least {least}")


def check_crop_scale(name: str, scale: tuple[float, ...]) -> None:
    """Raises BadInput where `config.data.<name>` is no range of shares of the area."""
    if not (len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1):
        raise BadInput(f"config.data.{name} = {scale}: expected two shares of the area, 0 < a <= b <= 1")


def _check_word(name: str, value: str, accepted: Iterable[str]) -> None:
    if value not in accepted:
        raise BadInput(f"config.data.{name} = {value!r}: expected one of {', '.join(accepted)}")


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
            image = image[:, ::-1]
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
    check_pictures(config)
    mean, std = _statistics(config)

    def transform(example: Mapping[str, Any]) -> dict[str, Any]:
        image = with_channels(example["image"], len(config.mean))
        image = augment.center_crop(image, config.image_size, config.eval_crop, config.interpolation)
        return {"image": _normalized(image, mean, std), "label": np.int32(example["label"])}

    return transform


def with_channels(image: np.ndarray, channels: int) -> np.ndarray:
    """Converts an image to uint8 (height, width, channels), from color to gray or gray to color.

    Four channels are read as CMYK, as in JPEG files; a few images of ImageNet have them.

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
    return augment.from_pil(picture.convert("L" if channels == 1 else "RGB"))


def _statistics(config: Any) -> tuple[np.ndarray, np.ndarray]:
    return 255 * np.asarray(config.mean, np.float32), 255 * np.asarray(config.std, np.float32)


def _normalized(image: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    return (image.astype(np.float32) - mean) / std
