"""Contrastive learning of a ViT without labels: SimCLR and MoCo v3.

Labels are read by evaluation only: by nearest neighbours and by a linear probe on frozen features, always of whole
splits. `config.batch_size` counts pictures, of which each gives two views.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from sigmarep.data import pipeline, sources
from sigmarep.data.images import views
from sigmarep.errors import BadInput
from sigmarep.models import simclr
from sigmarep.tasks import features, image_classification
from sigmarep.tasks.protocol import AXIS, UNKNOWN_EXAMPLES, Evaluation, LossOutput, Task

METHODS = ("simclr", "moco_v3")
PATCH_KERNEL = "vit/patch_embedding/kernel"
# Keeps the views of evaluation apart from those of training, which come from config.seed.
EVALUATION_SEED = 1_000_003


def default_config() -> ml_collections.ConfigDict:
    """The ViT's `model` and `data` as in image classification, and the fields of the two methods and the evaluators."""
    config = image_classification.default_config()
    del config.label_smoothing
    config.model.pool = "mean"
    del config.data.augment
    config.data.views = views.default_config()
    config.method = "simclr"
    config.temperature = 0.2
    # Of the momentum encoder, a step (moco_v3).
    config.momentum = 0.99
    # MoCo v3's remedy against instability: the patch embedding stays as it was initialised.
    config.freeze_patch_embedding = False
    head = {"layers": 3, "hidden": 256, "width": 64, "norm": "batch", "reparam": "none"}
    config.projector = ml_collections.ConfigDict(head)
    # moco_v3 only.
    config.predictor = ml_collections.ConfigDict(head | {"layers": 2})
    config.knn = ml_collections.ConfigDict({"neighbours": 20, "temperature": 0.07})
    config.probe = ml_collections.ConfigDict()
    # Those that do best on a held-out tenth of the training split are used.
    config.probe.learning_rates = (0.01, 0.03, 0.1, 0.3, 1.0)
    config.probe.weight_decays = (0.0, 1e-4, 1e-3, 1e-2, 1e-1)
    # 0 leaves the probe out.
    config.probe.epochs = 50
    config.probe.batch_size = 256
    # The same probe on the encoder before its first step, and on the pixels.
    config.probe.baselines = True
    return config


def create(config: ml_collections.ConfigDict, *, abstract: bool = False) -> "Contrastive":
    """The task of a resolved configuration; see `sigmarep.tasks.protocol.Task` for `abstract`.

    Raises:
      BadInput: a field is wrong, or the data set is not prepared.
    """
    return Contrastive(config, abstract=abstract)


def create_model(config: ml_collections.ConfigDict) -> simclr.ContrastiveModel:
    """The model of a configuration, without touching any data.

    Raises:
      BadInput: a field has an unknown word or an impossible value.
    """
    _check(config)
    vit = image_classification.create_model(config, 0).clone(frozen_patches=config.freeze_patch_embedding)
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
    if config.method == "moco_v3":
        variables["momentum"] = {name: jax.tree.map(jnp.copy, _unpredicted(tree)) for name, tree in variables.items()}
    return variables


class Contrastive(Task):
    """See `sigmarep.tasks.protocol.Task`."""

    headline = "probe_accuracy"

    def __init__(self, config: ml_collections.ConfigDict, *, abstract: bool):
        self.config = config
        data = config.data
        self.model = create_model(config)
        self._transform = views.train_transform(data)
        describe = sources.published if abstract else sources.describe
        described = describe(data.name, data_dir=data.data_dir)
        if abstract:
            self.num_train_examples = described.splits.get(data.train_split.split("[")[0], UNKNOWN_EXAMPLES)
            return
        self._num_classes = described.num_classes
        self.train_source: sources.Source = sources.open_source(data.name, data.train_split, data_dir=data.data_dir)
        if data.in_memory:
            self.train_source = [self.train_source[i] for i in range(len(self.train_source))]
        self.num_train_examples = len(self.train_source)
        self._baselines: dict[str, dict[str, float]] = {}

    def init(self, rng):
        return initial_variables(self.config, self.model, rng)

    def abstract_batches(self):
        rows, size, channels = self.config.batch_size, self.config.data.image_size, len(self.config.data.mean)
        return [{"views": jax.ShapeDtypeStruct((rows, 2, size, size, channels), jnp.float32)}]

    def train_stream(self, *, start, process_index, process_count):
        data = self.config.data
        return pipeline.training_stream(
            self.train_source,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            start=start,
            transform=self._transform,
            process_index=process_index,
            process_count=process_count,
            num_threads=data.num_threads,
            num_workers=data.num_workers,
        )

    def loss(self, params, model_state, batch, rng, *, attention):
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
            changed["momentum"], keys = self._momentum_step(params, model_state["momentum"], images, rng)
            sums = simclr.momentum_contrast(outputs.prediction, keys, self.config.temperature, **options)
        else:
            sums = simclr.nt_xent(outputs.projection, self.config.temperature, **options)
        return LossOutput(
            loss=(sums.loss, sums.weight),
            metrics={"accuracy": (sums.correct, sums.weight)},
            model_state={**model_state, **changed},
            attention=recorded,
        )

    def _momentum_step(self, params, momentum, images, rng):
        """The momentum encoder after its update from the parameters as they are before this step's, and its keys.

        That order is the method's (algorithm 1). The power step is taken on the averaged kernels, from vectors that
        follow them alone.
        """
        decay = self.config.momentum
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

    def evaluations(self):
        def of_split(split):
            def batches(*, process_index, process_count):
                return self._evaluation_batches(split, process_index, process_count)

            # "train[:10%]" names a split, and would make an awkward metric name.
            name = split.split("[")[0] if "[" in split else split
            return Evaluation(name, batches, self._evaluate, lambda results: self._measured(split, results))

        return [of_split(split) for split in self.config.data.eval_splits]

    def _evaluation_batches(self, split, process_index, process_count) -> Iterator[dict[str, np.ndarray]]:
        """The whole training split, then the whole of `split`, whose batches have `views` beside `image`."""
        data = self.config.data
        tested = sources.open_source(data.name, split, data_dir=data.data_dir)
        for source, transform in (
            (self.train_source, views.evaluation_transform(data)),
            (_Numbered(tested), views.evaluation_transform(data, seed=self.config.seed + EVALUATION_SEED)),
        ):
            yield from pipeline.evaluation_batches(
                source,
                batch_size=self.config.batch_size,
                transform=transform,
                process_index=process_index,
                process_count=process_count,
                num_threads=data.num_threads,
            )

    def _evaluate(self, variables, batch):
        own = {name: value for name, value in variables.items() if name != "momentum"}
        outputs: Any = self.model.apply(own, batch["image"])
        found = {"features": outputs.features, "projection": outputs.projection}
        if "views" in batch:
            two = batch["views"]
            of_views: Any = self.model.apply(own, two.reshape(-1, *two.shape[2:]))
            found["views"] = of_views.projection.reshape(*two.shape[:2], -1)
        return {name: value.astype(jnp.float32) for name, value in found.items()} | {
            "label": batch["label"],
            "mask": batch["mask"],
        }

    def _measured(self, split: str, results: list[dict[str, np.ndarray]]) -> dict[str, float]:
        train = _joined([each for each in results if "views" not in each])
        test = _joined([each for each in results if "views" in each])
        metrics = self._worth(train["features"], train["label"], test["features"], test["label"])
        metrics["alignment"] = features.alignment(test["views"][:, 0], test["views"][:, 1])
        metrics["uniformity"] = features.uniformity(test["projection"])
        if self.config.probe.baselines:
            # They are the same at every evaluation.
            if split not in self._baselines:
                self._baselines[split] = self._baselines_of(split)
            metrics |= self._baselines[split]
            if "probe_accuracy" in metrics:
                for name in ("random_init", "pixels"):
                    margin = metrics["probe_accuracy"] - metrics[f"probe_accuracy_{name}"]
                    metrics[f"probe_margin_over_{name}"] = margin
        return metrics

    def _worth(self, train, train_labels, test, test_labels) -> dict[str, float]:
        knn, probe = self.config.knn, self.config.probe
        predicted = features.knn_predictions(
            train,
            train_labels,
            test,
            neighbours=knn.neighbours,
            temperature=knn.temperature,
            num_classes=self._num_classes,
        )
        metrics = {"knn_accuracy": float(np.mean(predicted == test_labels))}
        if probe.epochs:
            found = features.linear_probe(
                train,
                train_labels,
                test,
                test_labels,
                num_classes=self._num_classes,
                learning_rates=probe.learning_rates,
                weight_decays=probe.weight_decays,
                epochs=probe.epochs,
                batch_size=probe.batch_size,
            )
            metrics["probe_accuracy"] = found.accuracy
        return metrics

    def _baselines_of(self, split: str) -> dict[str, float]:
        """The same measures of the encoder before its first step and of the pixels, on this process's own device."""
        # The trainer's own first key, so that it is the encoder that this run began with.
        key = jax.random.split(jax.random.key(self.config.seed))[0]
        variables = jax.device_get(jax.jit(self.init)(key))
        variables.pop("momentum", None)
        encode = jax.jit(lambda variables, image: self.model.apply(variables, image, method="encode"))
        results: list[dict[str, np.ndarray]] = []
        for batch in self._evaluation_batches(split, 0, 1):
            encoded = np.asarray(encode(variables, batch["image"]), np.float32)
            pixels = batch["image"].reshape(len(batch["image"]), -1)
            results.append({**batch, "random_init": encoded, "pixels": pixels})
        train = _joined([each for each in results if "views" not in each])
        test = _joined([each for each in results if "views" in each])
        metrics: dict[str, float] = {}
        for name in ("random_init", "pixels"):
            found = self._worth(train[name], train["label"], test[name], test["label"])
            metrics |= {f"{measure}_{name}": value for measure, value in found.items()}
        return metrics


class _Numbered:
    """A source whose examples know their index, from which their evaluation views are drawn."""

    def __init__(self, source: sources.Source):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return {**self._source[index], "index": index}


def _joined(results: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """All real rows of the batches, in order."""
    kept = [np.asarray(each["mask"]) > 0 for each in results]
    return {
        name: np.concatenate([np.asarray(each[name])[rows] for each, rows in zip(results, kept, strict=True)])
        for name in results[0]
    }


def _unpredicted(tree: Mapping[str, Any]) -> dict[str, Any]:
    """What of a collection the momentum encoder has too."""
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
    if config.method not in METHODS:
        raise BadInput(f"config.method = {config.method!r}: expected one of {', '.join(METHODS)}")
    if config.accumulation > 1:
        raise BadInput(
            f"config.accumulation = {config.accumulation}: a contrastive loss compares all pictures of a batch, and "
            "microbatches would not see each other; set it to 1"
        )
    if config.batch_size < 2:
        raise BadInput(f"config.batch_size = {config.batch_size}: a contrastive loss needs at least 2 pictures")
    for name, value in (("temperature", config.temperature), ("knn.temperature", config.knn.temperature)):
        if not value > 0:
            raise BadInput(f"config.{name} = {value}: expected a number above 0")
    if not 0 <= config.momentum <= 1:
        raise BadInput(f"config.momentum = {config.momentum}: expected a number from 0 to 1")
    for name, count, least in (
        ("knn.neighbours", config.knn.neighbours, 1),
        ("probe.epochs", config.probe.epochs, 0),
        ("probe.batch_size", config.probe.batch_size, 1),
    ):
        if count < least:
            raise BadInput(f"config.{name} = {count}: expected at least {least}")
    for name, values in (
        ("learning_rates", config.probe.learning_rates),
        ("weight_decays", config.probe.weight_decays),
    ):
        if not values or min(values) < 0:
            raise BadInput(f"config.probe.{name} = {values}: expected at least one number, none below 0")
    decayed = not any(re.search(rule, PATCH_KERNEL) for rule in config.optimizer.no_decay)
    if config.freeze_patch_embedding and config.optimizer.weight_decay and decayed:
        raise BadInput(
            "config.freeze_patch_embedding = True: weight decay would still shrink the patch embedding; "
            'add "patch_embedding" to config.optimizer.no_decay'
        )
