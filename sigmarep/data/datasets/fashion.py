"""Fashion-MNIST: 28 x 28 gray pictures of clothes in ten classes (Xiao et al., 2017; Expat license), its official split.

It comes with the Debian package `dataset-fashion-mnist` (31 MB): 60,000 pictures for training and 10,000 for testing, as
many of each class. Published accuracies apply.
"""

import gzip
import io
import os
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from sigmarep.data.datasets import debian_package
from sigmarep.errors import BadInput

INSTALLED = "/usr/share/datasets/fashion-mnist"
CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
FILES = {"train": "train", "test": "t10k"}
# Bytes before the values of an idx file: a magic number, then a size for each dimension, four bytes each.
LABELS_HEADER, IMAGES_HEADER = 8, 16


class FashionMnistPackage(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of the pictures, from the installed package or from a package unpacked into downloads/fashion."""

    name = "fashion_mnist_package"
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First."}  # noqa: RUF012

    def __init__(self, *, data_dir: str, **options: Any):
        self._unpacked = os.path.join(data_dir, "downloads", "fashion")
        super().__init__(data_dir=data_dir, **options)

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(28, 28, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=list(CLASSES)),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://github.com/zalandoresearch/fashion-mnist",
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        path = debian_package.find_file([INSTALLED, self._unpacked], "t10k-labels-idx1-ubyte.gz")
        if path is None:
            raise debian_package.missing(self.name, "dataset-fashion-mnist", INSTALLED, self._unpacked)
        return {split: self._generate_examples(*read(os.path.dirname(path), split)) for split in FILES}

    def _generate_examples(self, images, labels):
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            encoded = io.BytesIO()
            Image.fromarray(image).save(encoded, format="PNG")
            encoded.seek(0)
            yield i, {"image": encoded, "label": int(label)}


def read(folder: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 28, 28) and labels (n,) of a split, uint8, in the order of the files.

    Raises:
      BadInput: a file is missing or damaged.
    """
    parts = []
    for name, header in (("images-idx3", IMAGES_HEADER), ("labels-idx1", LABELS_HEADER)):
        path = os.path.join(folder, f"{FILES[split]}-{name}-ubyte.gz")
        try:
            with gzip.open(path) as file:
                parts.append(np.frombuffer(file.read(), np.uint8, offset=header))
        except (OSError, EOFError, ValueError) as error:
            raise BadInput(f"{path}: cannot be read ({error})") from error
    pixels, labels = parts
    if len(pixels) != 28 * 28 * len(labels):
        raise BadInput(f"{folder}: has {len(pixels)} pixels for {len(labels)} labels of {split}; expected 784 a label")
    return pixels.reshape(-1, 28, 28), labels
