"""The default data set: 1,797 real handwritten digits, 8 x 8 gray levels (UCI, public domain; part of scikit-learn).

The split is by position in the file: the first 1,437 images for training, the last 360 for testing. Neighboring images
come from the same writers, so a shuffled split would show every test writer's hand in training.
"""

import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from sigmarep.errors import BadInput

NUM_TRAIN = 1437


class Digits(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of scikit-learn's `load_digits`; needs no network and no TensorFlow."""

    name = "digits"
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First."}  # noqa: RUF012

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80",
        )

    def _split_generators(self, dl_manager):
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise BadInput(
                'config.data.name = \'digits\': needs the extra "packaged"; pip install "sigmarep[packaged]"'
            ) from None
        bunch = load_digits()
        images, labels = bunch.images, bunch.target
        return {
            "train": self._generate_examples(images[:NUM_TRAIN], labels[:NUM_TRAIN]),
            "test": self._generate_examples(images[NUM_TRAIN:], labels[NUM_TRAIN:]),
        }

    def _generate_examples(self, images, labels):
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            # Pixels are counts from 0 to 16.
            pixels = np.round(image * (255 / 16)).astype(np.uint8)
            encoded = io.BytesIO()
            Image.fromarray(pixels).save(encoded, format="PNG")
            encoded.seek(0)
            yield i, {"image": encoded, "label": int(label)}
