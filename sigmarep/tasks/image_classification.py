"""Supervised image classification with a Vision Transformer."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax

from sigmarep.data import pipeline, sources
from sigmarep.data.images import transforms
from sigmarep.errors import BadInput
from sigmarep.models.vit import ViT
from sigmarep.tasks.protocol import UNKNOWN_EXAMPLES, Evaluation, LossOutput, Task
from sigmarep.tasks.transformer_config import create_transformer, transformer_defaults


def default_config() -> ml_collections.ConfigDict:
    """The fields `model`, `data` and `label_smoothing`; the model's default is a small pre-LN ViT for the digits."""
    config = ml_collections.ConfigDict()
    config.model = transformer_defaults(depth=6, width=64, num_heads=4, mlp_dim=128)
    config.model.patch_size = 2
    config.model.positions = "learned"
    config.model.pool = "token"
    config.model.patch_gain = 1.0
    config.data = transforms.default_config()
    config.label_smoothing = 0.0
    return config


def create(config: ml_collections.ConfigDict, *, abstract: bool = False) -> "ImageClassification":
    """The task of a resolved configuration; see `sigmarep.tasks.protocol.Task` for `abstract`.

    Raises:
      BadInput: a field of `config.model` or `config.data` is wrong, or the data set is not prepared.
    """
    return ImageClassification(config, abstract=abstract)


def create_model(config: ml_collections.ConfigDict, num_classes: int) -> ViT:
    """The ViT of `config.model`, without touching any data.

    Raises:
      BadInput: a field has an unknown word or an impossible value.
    """
    options = {name: config.model[name] for name in ("patch_size", "positions", "pool", "patch_gain", "dropout")}
    transformer = create_transformer(config)
    try:
        model = ViT(transformer, num_classes=num_classes, **options)
        size = config.data.image_size
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, size, size, len(config.data.mean))))
    except ValueError as error:
        raise BadInput(f"config.model.{error}") from error
    return model


class ImageClassification(Task):
    """See `sigmarep.tasks.protocol.Task`."""

    headline = "accuracy"

    def __init__(self, config: ml_collections.ConfigDict, *, abstract: bool):
        self.config = config
        data = config.data
        transforms.check(data)
        describe = sources.published if abstract else sources.describe
        described = describe(data.name, data_dir=data.data_dir)
        self.model = create_model(config, described.num_classes)
        if abstract:
            self.num_train_examples = described.splits.get(data.train_split.split("[")[0], UNKNOWN_EXAMPLES)
            return
        self.train_source: sources.Source = sources.open_source(data.name, data.train_split, data_dir=data.data_dir)
        if data.in_memory:
            self.train_source = [self.train_source[i] for i in range(len(self.train_source))]
        self.num_train_examples = len(self.train_source)

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

    def train_stream(self, *, start, process_index, process_count):
        data = self.config.data
        transform, pair_transform = transforms.train_transforms(data)
        return pipeline.training_stream(
            self.train_source,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            start=start,
            transform=transform,
            pair_transform=pair_transform,
            process_index=process_index,
            process_count=process_count,
            num_threads=data.num_threads,
            num_workers=data.num_workers,
        )

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

    def evaluations(self):
        data = self.config.data
        transform = transforms.eval_transform(data)

        def of_split(split):
            def batches(*, process_index, process_count):
                return pipeline.evaluation_batches(
                    sources.open_source(data.name, split, data_dir=data.data_dir),
                    batch_size=self.config.batch_size,
                    transform=transform,
                    process_index=process_index,
                    process_count=process_count,
                    num_threads=data.num_threads,
                )

            # "train[:10%]" names a split, and would make an awkward metric name.
            name = split.split("[")[0] if "[" in split else split
            return Evaluation(name, batches, self._evaluate, _means)

        return [of_split(split) for split in data.eval_splits]

    def _evaluate(self, variables, batch):
        logits = jnp.asarray(self.model.apply(variables, batch["image"]), jnp.float32)
        mask = batch["mask"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        correct = (jnp.argmax(logits, axis=-1) == batch["label"]).astype(jnp.float32)
        weight = jnp.sum(mask)
        return {
            "accuracy": (jnp.sum(correct * mask), weight),
            "loss": (jnp.sum(losses * mask), weight),
        }


def _means(results: list[dict[str, tuple[float, float]]]) -> dict[str, float]:
    return {
        name: float(sum(float(r[name][0]) for r in results) / sum(float(r[name][1]) for r in results))
        for name in results[0]
    }
