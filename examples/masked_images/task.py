"""The task: hide patches of pictures, predict their pixels, count the squared error of hidden ones alone.

See `sigmarep.tasks.protocol` for the three functions that make a task, and for the two classes that they return.
"""

import functools
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from masked_images.model import MaskedViT, patches
from sigmarep import configuration
from sigmarep.data.images import files as picture_files
from sigmarep.data.images import transforms
from sigmarep.errors import BadInput
from sigmarep.fields import field
from sigmarep.tasks.pictures import PictureData, apply_to_pictures
from sigmarep.tasks.protocol import Evaluation, Files, LossOutput, TaskModel, split_name
from sigmarep.tasks.transformer_config import create_transformer, transformer_fields

FIELDS: dict[str, Any] = {
    "model": {
        **transformer_fields(depth=4, width=64, num_heads=4, mlp_dim=128),
        "patch_size": field(2, "Height and width of a patch in pixels.", at_least=1, at_most=2**14),
    },
    "data": transforms.FIELDS,
    "mask_ratio": field(0.6, "Share of patches that are hidden.", above=0, below=1),
}


def default_config() -> ml_collections.ConfigDict:
    """The fields `model`, `data` and `mask_ratio`; the default is a small model for the digits."""
    return configuration.make(FIELDS)


def create_model(config: ml_collections.ConfigDict, files: Files) -> "MaskedImages":
    """The model side; it needs no files of the run.

    Raises:
      BadInput: a field is wrong.
    """
    return MaskedImages(config)


def open_data(config: ml_collections.ConfigDict, files: Files | None = None) -> "MaskedImageData":
    """The data side.

    Raises:
      BadInput: a field of `config.data` is wrong.
    """
    return MaskedImageData(config)


def shape_of_patches(config: ml_collections.ConfigDict) -> tuple[int, int]:
    """The number of patches of a picture, and of those that are hidden.

    Raises:
      BadInput: patches do not fit the picture, or none or all of them would be hidden.
    """
    size, patch = config.data.image_size, config.model.patch_size
    if patch < 1 or size % patch:
        raise BadInput(f"config.model.patch_size = {patch}: does not divide config.data.image_size = {size}")
    count = (size // patch) ** 2
    hidden = round(config.mask_ratio * count)
    if not 0 < hidden < count:
        raise BadInput(f"config.mask_ratio = {config.mask_ratio}: hides {hidden} of {count} patches; expected some")
    return count, hidden


class MaskedImages(TaskModel):
    """The model side; see `sigmarep.tasks.protocol.TaskModel`."""

    primary_metric = "explained"

    def __init__(self, config: ml_collections.ConfigDict):
        transforms.check(config.data)
        self.config = config
        self.num_patches, _ = shape_of_patches(config)
        self.model = MaskedViT(create_transformer(config), patch_size=config.model.patch_size)

    def init(self, rng):
        return self.model.init(rng, *(jnp.zeros(x.shape, x.dtype) for x in self._shapes(rows=1).values()))

    def abstract_batches(self):
        return [self._shapes(rows=self.config.batch_size)]

    def _shapes(self, *, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
        size, channels = self.config.data.image_size, len(self.config.data.mean)
        return {
            "image": jax.ShapeDtypeStruct((rows, size, size, channels), jnp.float32),
            "hidden": jax.ShapeDtypeStruct((rows, self.num_patches), jnp.bool_),
        }

    def loss(self, params, model_state, batch, rng, *, attention):
        predicted, updates = self.model.apply(
            {"params": params, **model_state},
            batch["image"],
            batch["hidden"],
            deterministic=False,
            rngs={"dropout": rng},
            mutable=[*model_state, "attention"] if attention else list(model_state),
        )
        changed = dict(updates)
        recorded = changed.pop("attention", {})
        target = patches(batch["image"], self.config.model.patch_size)
        errors = jnp.mean((predicted.astype(jnp.float32) - target) ** 2, axis=-1)
        return LossOutput(
            loss=(jnp.sum(errors * batch["hidden"]), jnp.sum(batch["hidden"], dtype=jnp.float32)),
            metrics={},
            model_state={**model_state, **changed},
            attention=recorded,
        )

    def evaluate(self, variables: Any, batch: Any) -> dict[str, jax.Array]:
        """Sums over hidden patches that are no padding: squared errors, pixels, their squares, and their number."""
        predicted = self.model.apply(variables, batch["image"], batch["hidden"])
        target = patches(batch["image"], self.config.model.patch_size)
        weight = (batch["hidden"] * batch["mask"][:, None])[..., None] * jnp.ones_like(target)
        values = {
            "error": (jnp.asarray(predicted, jnp.float32) - target) ** 2,
            "sum": target,
            "square": target**2,
            "count": 1.0,
        }
        return {name: jnp.sum(value * weight) for name, value in values.items()}

    def picture(self, path):
        """The picture of a file, uint8 (height, width, channels)."""
        return picture_files.read(path, len(self.config.data.mean))

    def features(self, variables, pictures):
        """Mean features (N, width) of pictures without hidden patches, for `sigmarep.inference.Run.features`."""
        return apply_to_pictures(self._features, variables, pictures, self.config.data)

    @functools.cached_property
    def _features(self):
        def step(variables, images):
            hidden = jnp.zeros((len(images), self.num_patches), bool)
            encoded = self.model.apply(variables, images, hidden, method="encode")
            return jnp.mean(jnp.asarray(encoded, jnp.float32), axis=1)

        return jax.jit(step)


class MaskedImageData(PictureData):
    """The data side; see `sigmarep.tasks.protocol.TaskData`."""

    def __init__(self, config: ml_collections.ConfigDict):
        super().__init__(config)
        self._num_patches, self._num_hidden = shape_of_patches(config)

    def train_stream(self, *, start, process_index, process_count):
        augmented, mix = transforms.train_transforms(self.config.data)
        if mix is not None:
            raise BadInput("config.data.augment.mixup and cutmix: mix classes, and here are none; set them to 0.0")

        def transform(example, rng):
            return self._masked(augmented({"image": example["image"], "label": 0}, rng)["image"], rng)

        return self.stream(start=start, process_index=process_index, process_count=process_count, transform=transform)

    def evaluations(self, model):
        return [self._evaluation(model, split) for split in self.config.data.eval_splits]

    def _evaluation(self, model: MaskedImages, split: str) -> Evaluation:
        data = self.config.data
        centered = transforms.eval_transform(data)

        def transform(example):
            image = centered({"image": example["image"], "label": 0})["image"]
            # A picture hides the same patches at every evaluation.
            return self._masked(image, np.random.default_rng(zlib.crc32(image.tobytes())))

        def batches(*, process_index, process_count):
            source = self.open_source(split)
            return self.evaluated(source, transform, process_index, process_count)

        return Evaluation(split_name(split), batches, model.evaluate, measures)

    def _masked(self, image: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
        hidden = np.zeros(self._num_patches, bool)
        hidden[rng.permutation(self._num_patches)[: self._num_hidden]] = True
        return {"image": image, "hidden": hidden}


def measures(results: list[dict[str, float]]) -> dict[str, float]:
    """`loss`, the mean squared error of hidden pixels, and `explained`, the share of their variance that is predicted."""
    error, total, square, count = (
        sum(float(each[name]) for each in results) for name in ("error", "sum", "square", "count")
    )
    variance = square / count - (total / count) ** 2
    return {"loss": error / count, "explained": 1 - error / count / variance}
