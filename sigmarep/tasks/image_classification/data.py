"""The data side of image classification."""

import ml_collections

from sigmarep.data.images import transforms
from sigmarep.errors import BadInput
from sigmarep.tasks.image_classification.model import LABELS, ImageClassification, label_file
from sigmarep.tasks.pictures import PictureData
from sigmarep.tasks.protocol import Evaluation, Files, split_name


def open_data(config: ml_collections.ConfigDict, files: Files | None = None) -> "ImageClassificationData":
    """The data side; see `sigmarep.tasks.protocol.Task.open_data`.

    Raises:
      BadInput: a field of `config.data` is wrong.
    """
    return ImageClassificationData(config)


class ImageClassificationData(PictureData):
    """Images with classes; see `sigmarep.tasks.protocol.TaskData`."""

    def __init__(self, config: ml_collections.ConfigDict):
        super().__init__(config)
        transforms.check(config.data)

    def files(self):
        return {LABELS: label_file(self.description.class_names), **super().files()}

    def train_stream(self, *, start, process_index, process_count):
        transform, pair_transform = transforms.train_transforms(self.config.data)
        return self.stream(
            start=start,
            process_index=process_index,
            process_count=process_count,
            transform=transform,
            pair_transform=pair_transform,
            repeats=self.config.data.augment.repeats,
        )

    def evaluations(self, model):
        return [self._evaluation(model, split) for split in self.config.data.eval_splits]

    def _evaluation(self, model: ImageClassification, split: str) -> Evaluation:
        data = self.config.data
        if self.description.class_names != model.class_names:
            raise BadInput(
                f"config.data.name = {data.name!r}: has {self.description.num_classes} classes that are not the "
                f"{len(model.class_names)} of the run's {LABELS}"
            )
        transform = transforms.eval_transform(data)

        def batches(*, process_index, process_count):
            source = self.open_source(split)
            return self.evaluated(source, transform, process_index, process_count)

        return Evaluation(split_name(split), batches, model.evaluate, _means)


def _means(results: list[dict[str, tuple[float, float]]]) -> dict[str, float]:
    return {
        name: float(sum(float(r[name][0]) for r in results) / sum(float(r[name][1]) for r in results))
        for name in results[0]
    }
