"""Pictures of prepared data sets, decoded by `sigmarep.data.images.files` as those that a trained model is given."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from sigmarep.data.images import files
from sigmarep.errors import BadInput


def picture_features(features: Mapping[str, Any]) -> list[str]:
    """Names of the features that are encoded pictures of 8 or 16 bits a value.

    TFDS's floating-point pictures are PNG files only in name; TFDS decodes them.
    """
    return [
        name
        for name, feature in features.items()
        if type(feature) is tfds.features.Image and feature.np_dtype in (np.uint8, np.uint16)
    ]


class DecodedPictures:
    """A source of TFDS's whose pictures are uint8 (height, width, 1 or 3)."""

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str, features: Sequence[str], name: str):
        """Opens a split.

        Args:
          builder: a prepared data set.
          split: see `sigmarep.data.sources.open_source`.
          features: names of the pictures.
          name: of the data set, for messages.
        """
        self._source = builder.as_data_source(split, decoders={each: tfds.decode.SkipDecoding() for each in features})
        self._features, self._name, self._split = tuple(features), name, split

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The example of an index.

        Raises:
          BadInput: a picture cannot be decoded; the message names it.
        """
        example = dict(self._source[index])
        for feature in self._features:
            try:
                example[feature] = files.decode(bytes(example[feature]))
            except files.PictureError as error:
                raise BadInput(
                    f"config.data.name = {self._name!r}: example {index}{_file_name(example)} of the split {self._split!r} "
                    f"has a picture that cannot be read ({error})"
                ) from None
        return example

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))


def _file_name(example: Mapping[str, Any]) -> str:
    """The name that the example's file once had, in parentheses; "" if the data set does not keep it."""
    name = example.get("file_name")
    return f" ({name.decode(errors='backslashreplace')})" if isinstance(name, bytes) and name else ""
