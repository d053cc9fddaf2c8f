"""The model side of contrastive learning: SimCLR's and MoCo v3's losses, and features of pictures."""

import dataclasses
import functools
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from sigmarep import configuration, fields
from sigmarep.data.images import files as picture_files
from sigmarep.data.images import views
from sigmarep.errors import BadInput
from sigmarep.fields import field
from sigmarep.models import simclr
from sigmarep.nn.linear import REPARAMS
from sigmarep.tasks import image_classification
from sigmarep.tasks.image_classification.model import create_module as create_vit
from sigmarep.tasks.pictures import apply_to_pictures
from sigmarep.tasks.protocol import AXIS, Files, LossOutput, TaskModel
from sigmarep.tasks.transformer_config import portable

METHODS = ("simclr", "moco_v3")
MOMENTUM_SCHEDULES = ("constant", "cosine")
PATCH_KERNEL = "vit/patch_embedding/kernel"


_HEAD: dict[str, Any] = {
    "layers": field(3, "Dense layers.", at_least=1, at_most=1000),
    "hidden": field(256, "Units of the hidden layers.", at_least=1, at_most=2**20),
    "width": field(64, "Units of the last layer.", at_least=1, at_most=2**20),
    "norm": field("batch", "Norm after each layer.", choices=simclr.HEAD_NORMS),
    "reparam": field("none", "Reparametrization of the layers.", choices=REPARAMS),
}
_VIT = image_classification.FIELDS
FIELDS: dict[str, Any] = {
    "model": fields.with_defaults(_VIT["model"], pool="mean"),
    "data": {**{name: each for name, each in _VIT["data"].items() if name != "augment"}, "views": views.FIELDS},
    "method": field("simclr", "simclr, or moco_v3 with its momentum encoder.", choices=METHODS),
    "temperature": field(0.2, "Temperature of the contrastive loss.", above=0),
    "momentum": field(
        0.99, "Decay of the momentum encoder per step (moco_v3), the first one on a cosine.", at_least=0, at_most=1
    ),
    "momentum_schedule": field(
        "constant", "That decay over the run: constant, or rising to 1 on half a cosine.", choices=MOMENTUM_SCHEDULES
    ),
    "freeze_patch_embedding": field(False, "The patch embedding stays as initialized, MoCo v3's remedy."),
    "projector": _HEAD,
    # Of moco_v3 alone.
    "predictor": fields.with_defaults(_HEAD, layers=2),
    "knn": {
        "neighbours": field(20, "Neighbors that vote.", at_least=1),
        "temperature": field(0.07, "Temperature of their weights.", above=0),
    },
    "probe": {
        "learning_rates": field(
            (0.01, 0.03, 0.1, 0.3, 1.0),
            "Learning rates tried; the best on a held-out tenth of the training split is used.",
            nonempty=True,
            at_least=0,
        ),
        "weight_decays": field((0.0, 1e-4, 1e-3, 1e-2, 1e-1), "Weight decays tried.", nonempty=True, at_least=0),
        "epochs": field(50, "Epochs of the linear probe; 0 for none.", at_least=0),
        "batch_size": field(256, "Examples of a batch of the probe.", at_least=1),
        "baselines": field(True, "Also probes the encoder before its first step, and the pixels."),
    },
}


def default_config() -> ml_collections.ConfigDict:
    """The ViT's `model` and `data` as in image classification, and the fields of the two methods and the evaluators."""
    return configuration.make(FIELDS)


def create_model(config: ml_collections.ConfigDict, files: Files) -> "Contrastive":
    """The model side; it needs no file.

    Raises:
      BadInput: a field has an unknown word or an impossible value.
    """
    return Contrastive(config)


def create_module(config: ml_collections.ConfigDict) -> simclr.ContrastiveModel:
    """The model of a configuration, without touching any data.

    Raises:
      BadInput: a field has an unknown word or an impossible value.
    """
    _check(config)
    vit = create_vit(config, 0).clone(frozen_patches=config.freeze_patch_embedding)
    predicting = config.method == "moco_v3"
    return simclr.ContrastiveModel(
        vit=vit,
        projector=_head(config, "projector", config.model.width),
        predictor=_head(config, "predictor", config.projector.width) if predicting else None,
    )


def initial_variables(config: ml_collections.ConfigDict, model: simclr.ContrastiveModel, rng: jax.Array):
    """The variables before the first step; in MoCo v3 the momentum encoder's are in the collection `momentum`."""
    size, channels = config.data.image_size, len(config.data.mean)
    variables = dict(model.init(rng, jnp.zeros((2, size, size, channels), jnp.float32)))
    return _with_momentum(variables) if config.method == "moco_v3" else variables


def _with_momentum(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The variables with the momentum encoder's beginning, which is the encoder itself."""
    own = {name: tree for name, tree in variables.items() if name != "momentum"}
    return {**own, "momentum": {name: jax.tree.map(jnp.copy, _unpredicted(tree)) for name, tree in own.items()}}


class Contrastive(TaskModel):
    """Learns features without labels; see `sigmarep.tasks.protocol.TaskModel`.

    Attributes:
      model: the Linen module.
    """

    primary_metric = "probe_accuracy"
    model_fields = ("method", "model.", "projector.", "predictor.")
    microbatches = False
    takes_progress = True

    def __init__(self, config: ml_collections.ConfigDict):
        self.config = config
        self.model = create_module(config)

    @property
    def plain_module(self) -> simclr.ContrastiveModel:
        """The module that takes folded parameters (`sigmarep.nn.fold`)."""
        vit, predictor = self.model.vit, self.model.predictor
        return self.model.clone(
            vit=vit.clone(transformer=dataclasses.replace(vit.transformer, reparam="none")),
            projector=self.model.projector.clone(reparam="none"),
            predictor=None if predictor is None else predictor.clone(reparam="none"),
        )

    def init(self, rng):
        return initial_variables(self.config, self.model, rng)

    def serving(self) -> tuple[Any, jax.ShapeDtypeStruct]:
        """Features (B, width) of normalized images; see `sigmarep.inference.Run.serving`."""
        plain, size = self.plain_module, self.config.data.image_size
        encoder = plain.clone(vit=plain.vit.clone(transformer=portable(plain.vit.transformer)))
        image = jax.ShapeDtypeStruct((size, size, len(self.config.data.mean)), jnp.float32)

        def encode(variables, images):
            own = {name: value for name, value in variables.items() if name != "momentum"}
            return encoder.apply(own, images, method="encode")

        return encode, image

    def follow_parameters(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """The variables with the momentum encoder as the parameters are, where there is one."""
        return _with_momentum(variables) if "momentum" in variables else dict(variables)

    def abstract_batches(self):
        rows, size, channels = self.config.batch_size, self.config.data.image_size, len(self.config.data.mean)
        return [{"views": jax.ShapeDtypeStruct((rows, 2, size, size, channels), jnp.float32)}]

    def loss(self, params, model_state, batch, rng, *, attention, progress=0.0):
        images = batch["views"].reshape(-1, *batch["views"].shape[2:])
        own = {name: value for name, value in model_state.items() if name != "momentum"}
        # Both views in one apply: one power step, and one batch to normalise over.
        outputs, updates = self.model.apply(
            {"params": params, **own},
            images,
            train=True,
            rngs={"dropout": rng},
            mutable=[*own, "attention"] if attention else list(own),
        )
        changed: dict[str, Any] = dict(updates)
        recorded = changed.pop("attention", {})
        options = {"axis_name": _axis_name(self.config)}
        if "momentum" in model_state:
            changed["momentum"], keys = self._momentum_step(params, model_state["momentum"], images, rng, progress)
            sums = simclr.momentum_contrast(outputs.prediction, keys, self.config.temperature, **options)
        else:
            sums = simclr.nt_xent(outputs.projection, self.config.temperature, **options)
        return LossOutput(
            loss=(sums.loss, sums.weight),
            metrics={"accuracy": (sums.correct, sums.weight)},
            model_state={**model_state, **changed},
            attention=recorded,
        )

    def _momentum_step(self, params, momentum, images, rng, progress):
        """The momentum encoder after its update from the parameters as they are before this step's, and its keys.

        That order is the method's (algorithm 1). The power step is taken on the averaged kernels, from vectors that
        follow them alone.
        """
        decay = self.config.momentum
        if self.config.momentum_schedule == "cosine":
            decay = 1 - (1 - decay) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        averaged = jax.tree.map(
            lambda old, new: decay * old + (1 - decay) * jax.lax.stop_gradient(new),
            momentum["params"],
            _unpredicted(params),
        )
        state = {name: value for name, value in momentum.items() if name != "params"}
        outputs, updates = self.model.clone(predictor=None).apply(
            {"params": averaged, **state}, images, train=True, rngs={"dropout": rng}, mutable=list(state)
        )
        return {"params": averaged, **state, **updates}, jax.lax.stop_gradient(outputs.projection)

    def evaluate(self, variables: Any, batch: Any) -> dict[str, jax.Array]:
        """Features and projections of images, and projections of both views of those that have them."""
        own = {name: value for name, value in variables.items() if name != "momentum"}
        outputs: Any = self.model.apply(own, batch["image"])
        vectors = {"features": outputs.features, "projection": outputs.projection}
        if "views" in batch:
            two = batch["views"]
            of_views: Any = self.model.apply(own, two.reshape(-1, *two.shape[2:]))
            vectors["views"] = of_views.projection.reshape(*two.shape[:2], -1)
        return {name: value.astype(jnp.float32) for name, value in vectors.items()} | {
            "label": batch["label"],
            "mask": batch["mask"],
        }

    def picture(self, path: str | os.PathLike) -> np.ndarray:
        """The picture of a file, uint8 (height, width, channels); see `sigmarep.data.images.files.read`."""
        return picture_files.read(path, len(self.config.data.mean))

    def features(self, variables: Any, pictures: Iterable[np.ndarray]) -> np.ndarray:
        """Features (N, width) of the encoder, float32, of pictures, uint8 (height, width, channels) of any size."""
        return apply_to_pictures(self.encode, variables, pictures, self.config.data)

    @functools.cached_property
    def encode(self) -> Any:
        """Compiled: features of images (B, size, size, channels)."""

        def step(variables, images):
            own = {name: value for name, value in variables.items() if name != "momentum"}
            return jnp.asarray(self.model.apply(own, images, method="encode"), jnp.float32)

        return jax.jit(step)


def _unpredicted(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a collection that the momentum encoder has too."""
    return {name: value for name, value in tree.items() if name != "predictor"}


def _axis_name(config: ml_collections.ConfigDict) -> str | None:
    return AXIS if config.parallel == "pmap" else None


def _head(config: ml_collections.ConfigDict, name: str, inputs: int) -> simclr.Head:
    dtype = jnp.dtype(config.compute_dtype)
    head = simclr.Head(**config[name], axis_name=_axis_name(config), dtype=dtype)
    try:
        jax.eval_shape(lambda: head.init(jax.random.key(0), jnp.zeros((2, inputs)), train=False))
    except ValueError as error:
        raise BadInput(f"config.{name}.{error}") from error
    return head


def _check(config: ml_collections.ConfigDict) -> None:
    if config.batch_size < 2:
        raise BadInput(f"config.batch_size = {config.batch_size}: a contrastive loss needs at least 2 pictures")
    decayed = not any(re.search(rule, PATCH_KERNEL) for rule in config.optimizer.no_decay)
    if config.freeze_patch_embedding and config.optimizer.weight_decay and decayed:
        raise BadInput(
            "config.freeze_patch_embedding = True: weight decay would still shrink the patch embedding; "
            'add "patch_embedding" to config.optimizer.no_decay'
        )
