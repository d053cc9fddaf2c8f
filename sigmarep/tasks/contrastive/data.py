"""The data side of contrastive learning: views of pictures, and the measures of features on whole splits."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import ml_collections
import numpy as np

from sigmarep.data import sources
from sigmarep.data.images import views
from sigmarep.tasks import features
from sigmarep.tasks.contrastive.model import Contrastive
from sigmarep.tasks.pictures import PictureData
from sigmarep.tasks.protocol import Evaluation, Files, split_name

# Keeps the views of evaluation apart from those of training, which come from config.seed.
EVALUATION_SEED = 1_000_003


def open_data(config: ml_collections.ConfigDict, files: Files | None = None) -> "ContrastiveData":
    """The data side; see `sigmarep.tasks.protocol.Task.open_data`.

    Raises:
      BadInput: a field of `config.data` is wrong.
    """
    return ContrastiveData(config)


class ContrastiveData(PictureData):
    """Two views of every picture; see `sigmarep.tasks.protocol.TaskData`."""

    def __init__(self, config: ml_collections.ConfigDict):
        super().__init__(config)
        self._transform = views.train_transform(config.data)
        self._baselines: dict[str, dict[str, float]] = {}

    def train_stream(self, *, start, process_index, process_count):
        return self.stream(
            start=start, process_index=process_index, process_count=process_count, transform=self._transform
        )

    def evaluations(self, model):
        return [self._evaluation(model, split) for split in self.config.data.eval_splits]

    def _evaluation(self, model: Contrastive, split: str) -> Evaluation:
        def batches(*, process_index, process_count):
            return self.evaluation_batches(split, process_index, process_count)

        def finish(results):
            return self._measured(model, split, results)

        return Evaluation(split_name(split), batches, model.evaluate, finish)

    def evaluation_batches(self, split: str, process_index: int, process_count: int) -> Iterator[dict[str, np.ndarray]]:
        """The whole training split, then the whole of `split`, whose batches have `views` beside `image`."""
        data = self.config.data
        tested = self.open_source(split)
        for source, transform in (
            (self.train_source, views.evaluation_transform(data)),
            (_Numbered(tested), views.evaluation_transform(data, seed=self.config.seed + EVALUATION_SEED)),
        ):
            yield from self.evaluated(source, transform, process_index, process_count)

    def _measured(self, model: Contrastive, split: str, results: list[dict[str, np.ndarray]]) -> dict[str, float]:
        train = _joined([each for each in results if "views" not in each])
        test = _joined([each for each in results if "views" in each])
        metrics = self._worth(train["features"], train["label"], test["features"], test["label"])
        metrics["alignment"] = features.alignment(test["views"][:, 0], test["views"][:, 1])
        metrics["uniformity"] = features.uniformity(test["projection"])
        if self.config.probe.baselines:
            # They are the same at every evaluation.
            if split not in self._baselines:
                self._baselines[split] = self._baselines_of(model, split)
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
            num_classes=self.description.num_classes,
        )
        metrics = {"knn_accuracy": float(np.mean(predicted == test_labels))}
        if probe.epochs:
            fitted = features.linear_probe(
                train,
                train_labels,
                test,
                test_labels,
                num_classes=self.description.num_classes,
                learning_rates=probe.learning_rates,
                weight_decays=probe.weight_decays,
                epochs=probe.epochs,
                batch_size=probe.batch_size,
            )
            metrics["probe_accuracy"] = fitted.accuracy
        return metrics

    def _baselines_of(self, model: Contrastive, split: str) -> dict[str, float]:
        """The same measures of the encoder before its first step and of the pixels, on this process's own device."""
        # The trainer's own first key, so that it is the encoder that this run began with.
        key = jax.random.split(jax.random.key(self.config.seed))[0]
        variables = jax.device_get(jax.jit(model.init)(key))
        variables.pop("momentum", None)
        results: list[dict[str, np.ndarray]] = []
        for batch in self.evaluation_batches(split, 0, 1):
            encoded = np.asarray(model.encode(variables, batch["image"]))
            pixels = batch["image"].reshape(len(batch["image"]), -1)
            results.append({**batch, "random_init": encoded, "pixels": pixels})
        train = _joined([each for each in results if "views" not in each])
        test = _joined([each for each in results if "views" in each])
        metrics: dict[str, float] = {}
        for name in ("random_init", "pixels"):
            scores = self._worth(train[name], train["label"], test[name], test["label"])
            metrics |= {f"{measure}_{name}": value for measure, value in scores.items()}
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
    real = [np.asarray(each["mask"]) > 0 for each in results]
    return {
        name: np.concatenate([np.asarray(each[name])[rows] for each, rows in zip(results, real, strict=True)])
        for name in results[0]
    }
