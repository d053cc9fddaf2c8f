"""Data of Hugging Face's `datasets`, from a folder and without a network:

    --config.data.name=sigmarep.data.datasets.hugging_face.open_split --config.data.folder=DIR

DIR is what `save_to_disk` wrote, of one data set (the split train) or of a dictionary of splits; or it holds parquet files
of the splits that their names begin with, as `train.parquet` or `train-00000-of-00002.parquet`; or it is one parquet file,
the split train. Features within a feature are joined by a slash: `translation` of `en` and `de` is `translation/en` and
`translation/de` (`--config.data.source_feature`, `--config.data.text_feature`).
"""

import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from sigmarep.errors import BadInput, one_line


class Examples:
    """The examples of a split: mappings from features to text, numbers and arrays."""

    def __init__(self, dataset: Any):
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict(_flattened(self._dataset[index]))


def open_split(split: str, folder: str) -> Examples:
    """The examples of a split in a folder; see the module.

    Raises:
      BadInput: the extra is missing, the folder cannot be read, or there is no such split.
    """
    try:
        import datasets
    except ImportError:
        raise BadInput(
            'config.data.name: data of Hugging Face\'s datasets need the extra "others"; pip install "sigmarep[others]"'
        ) from None
    if not folder or not os.path.exists(os.path.expanduser(folder)):
        raise BadInput(f"config.data.folder = {folder!r}: expected a folder of save_to_disk or of parquet files")
    folder = os.path.expanduser(folder)
    try:
        splits = _saved(datasets, folder) if _is_saved(folder) else _parquet(datasets, folder)
        dataset = splits[split]() if split in splits else None
    except BadInput:
        raise
    except Exception as error:
        # pyarrow and datasets raise errors of their own.
        raise BadInput(f"config.data.folder = {folder!r}: cannot be read ({one_line(error)})") from error
    if dataset is None:
        raise BadInput(f"config.data: {folder} has no split {split!r}; expected one of {', '.join(sorted(splits))}")
    return Examples(dataset)


def _is_saved(folder: str) -> bool:
    return any(os.path.exists(os.path.join(folder, name)) for name in ("dataset_dict.json", "state.json"))


def _saved(datasets: Any, folder: str) -> dict[str, Any]:
    loaded = datasets.load_from_disk(folder)
    if not isinstance(loaded, datasets.DatasetDict):
        loaded = {"train": loaded}
    return {str(name): lambda dataset=dataset: dataset for name, dataset in loaded.items()}


def _parquet(datasets: Any, folder: str) -> dict[str, Any]:
    whole = os.path.isfile(folder)
    paths = [folder] if whole else [os.path.join(folder, name) for name in sorted(os.listdir(folder))]
    files: dict[str, list[str]] = {}
    for path in paths:
        if match := re.fullmatch(r"([A-Za-z]\w*?)([-.].*)?\.parquet", os.path.basename(path)):
            files.setdefault("train" if whole else match[1], []).append(path)
    if not files:
        raise BadInput(f"config.data.folder = {folder!r}: holds no parquet files such as train.parquet")
    # In memory: nothing is written to the cache of the user's home.
    return {
        name: lambda of_split=of_split: datasets.Dataset.from_parquet(of_split, keep_in_memory=True)
        for name, of_split in files.items()
    }


def _flattened(example: Mapping[str, Any], prefix: str = ""):
    for name, value in example.items():
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{prefix}{name}/")
        elif type(value).__module__.startswith("PIL."):
            yield f"{prefix}{name}", np.asarray(value)
        else:
            yield f"{prefix}{name}", value
