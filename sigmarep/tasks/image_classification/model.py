"""The model side of image classification: loss, evaluation, classes and features of pictures."""

import dataclasses
import functools
import json
import os
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from sigmarep import configuration
from sigmarep.data import sources
from sigmarep.data.images import files as picture_files
from sigmarep.data.images import transforms
from sigmarep.errors import BadInput
from sigmarep.fields import field
from sigmarep.models.vit import POOLS, ViT
from sigmarep.nn.positions import POSITIONS
from sigmarep.tasks.pictures import apply_to_pictures, where
from sigmarep.tasks.protocol import Files, LossOutput, TaskModel
from sigmarep.tasks.transformer_config import create_transformer, portable, transformer_fields

# Its name in the folder of a run.
LABELS = "labels.json"


FIELDS: dict[str, Any] = {
    "model": {
        **transformer_fields(depth=6, width=64, num_heads=4, mlp_dim=128),
        "patch_size": field(2, "Height and width of a patch in pixels.", at_least=1, at_most=2**14),
        "positions": field("learned", "Position embeddings.", choices=POSITIONS),
        "pool": field("token", "Input of the head: the class token, or the mean of the patches.", choices=POOLS),
        "patch_gain": field(1.0, "Factor on the initial patch embedding.", above=0),
    },
    "data": transforms.FIELDS,
    "label_smoothing": field(0.0, "Share of each target that is spread evenly over all classes.", at_least=0, below=1),
}


def default_config() -> ml_collections.ConfigDict:
    """The fields `model`, `data` and `label_smoothing`; the model's default is a small pre-LN ViT for the digits."""
    return configuration.make(FIELDS)


def create_model(config: ml_collections.ConfigDict, files: Files) -> "ImageClassification":
    """The model side; `files` holds `labels.json`, the names of the classes in order.

    Raises:
      BadInput: a field of `config.model` has an unknown word or an impossible value.
    """
    return ImageClassification(config, json.loads(files[LABELS]))


def planned_files(config: ml_collections.ConfigDict) -> dict[str, bytes]:
    """The classes that are published of the data set."""
    classes = sources.published(config.data.name, **where(config.data)).num_classes
    return {LABELS: label_file([str(number) for number in range(classes)])}


def label_file(class_names: Sequence[str]) -> bytes:
    """The contents of `labels.json`."""
    return json.dumps(list(class_names), indent=0, ensure_ascii=False).encode() + b"\n"


def create_module(config: ml_collections.ConfigDict, num_classes: int) -> ViT:
    """The ViT of `config.model`, without touching any data.

    Raises:
      BadInput: a field has an unknown word or an impossible value.
    """
    options = {name: config.model[name] for name in ("patch_size", "positions", "pool", "patch_gain", "dropout")}
    transformer = create_transformer(config)
    try:
        model = ViT(transformer, num_classes=num_classes, **options)
    except ValueError as error:
        raise BadInput(f"config.model.{error}") from error
    return model


class ImageClassification(TaskModel):
    """Classifies images; see `sigmarep.tasks.protocol.TaskModel`.

    Attributes:
      model: the Linen module. class_names: in the order of its outputs.
    """

    primary_metric = "accuracy"

    def __init__(self, config: ml_collections.ConfigDict, class_names: Sequence[str]):
        transforms.check(config.data)
        self.config, self.class_names = config, tuple(class_names)
        self.model = create_module(config, len(self.class_names))

    @property
    def plain_module(self) -> ViT:
        """The module that takes folded parameters (`sigmarep.nn.fold`)."""
        return self.model.clone(transformer=dataclasses.replace(self.model.transformer, reparam="none"))

    def serving(self) -> tuple[Any, jax.ShapeDtypeStruct]:
        """Logits (B, classes) of normalized images; see `sigmarep.inference.Run.serving`."""
        plain, size = self.plain_module, self.config.data.image_size
        image = jax.ShapeDtypeStruct((size, size, len(self.config.data.mean)), jnp.float32)
        return plain.clone(transformer=portable(plain.transformer)).apply, image

    def init(self, rng):
        size, channels = self.config.data.image_size, len(self.config.data.mean)
        return self.model.init(rng, jnp.zeros((1, size, size, channels), jnp.float32))

    def abstract_batches(self):
        rows, size, channels = self.config.batch_size, self.config.data.image_size, len(self.config.data.mean)
        return [
            {
                "image": jax.ShapeDtypeStruct((rows, size, size, channels), jnp.float32),
                "label": jax.ShapeDtypeStruct((rows,), jnp.int32),
                "mix": jax.ShapeDtypeStruct((rows,), jnp.float32),
                "mix_label": jax.ShapeDtypeStruct((rows,), jnp.int32),
            }
        ]

    def loss(self, params, model_state, batch, rng, *, attention):
        logits, updates = self.model.apply(
            {"params": params, **model_state},
            batch["image"],
            deterministic=False,
            rngs={"dropout": rng},
            mutable=[*model_state, "attention"] if attention else list(model_state),
        )
        logits = logits.astype(jnp.float32)
        classes = logits.shape[-1]
        own, other = jax.nn.one_hot(batch["label"], classes), jax.nn.one_hot(batch["mix_label"], classes)
        mix = batch["mix"][:, None]
        target = optax.smooth_labels(mix * own + (1 - mix) * other, self.config.label_smoothing)
        losses = optax.softmax_cross_entropy(logits, target)
        correct = jnp.argmax(logits, axis=-1) == batch["label"]
        count = jnp.float32(losses.size)
        changed: dict[str, Any] = dict(updates)
        recorded = changed.pop("attention", {})
        return LossOutput(
            loss=(jnp.sum(losses), count),
            metrics={"accuracy": (jnp.sum(correct.astype(jnp.float32)), count)},
            model_state={**model_state, **changed},
            attention=recorded,
        )

    def evaluate(self, variables: Any, batch: Any) -> dict[str, Any]:
        """Sums and weights of accuracy and loss over a batch."""
        logits = jnp.asarray(self.model.apply(variables, batch["image"]), jnp.float32)
        mask = batch["mask"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        correct = (jnp.argmax(logits, axis=-1) == batch["label"]).astype(jnp.float32)
        weight = jnp.sum(mask)
        return {
            "accuracy": (jnp.sum(correct * mask), weight),
            "loss": (jnp.sum(losses * mask), weight),
        }

    def picture(self, path: str | os.PathLike) -> np.ndarray:
        """The picture of a file, uint8 (height, width, channels); see `sigmarep.data.images.files.read`."""
        return picture_files.read(path, len(self.config.data.mean))

    def classify(self, variables: Any, pictures: Iterable[np.ndarray]) -> np.ndarray:
        """Probabilities (N, classes) of pictures, uint8 (height, width, channels) of any size."""
        return apply_to_pictures(self._probabilities, variables, pictures, self.config.data)

    def features(self, variables: Any, pictures: Iterable[np.ndarray]) -> np.ndarray:
        """The inputs (N, width) of the last layer, float32; see `classify`."""
        return apply_to_pictures(self._features, variables, pictures, self.config.data)

    @functools.cached_property
    def _probabilities(self):
        def step(variables, images):
            return jax.nn.softmax(jnp.asarray(self.model.apply(variables, images), jnp.float32))

        return jax.jit(step)

    @functools.cached_property
    def _features(self):
        headless = self.model.clone(num_classes=0)
        return jax.jit(lambda variables, images: jnp.asarray(headless.apply(variables, images), jnp.float32))
