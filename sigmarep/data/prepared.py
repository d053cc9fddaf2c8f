"""Data sets that TFDS has prepared, opened from their folders alone."""

import glob
import json
import os
import re
from typing import Any

from sigmarep.errors import BadInput

VERSION = re.compile(r"\d+\.\d+\.\d+")


def newest(name: str, folder: str) -> str | None:
    """Folder of the newest prepared version of `dataset[/variant][:version]`; None if there is none.

    Raises:
      BadInput: several variants are prepared and none is named.
    """
    dataset, _, asked = name.partition(":")
    root = glob.escape(os.path.join(folder, *dataset.split("/")))
    infos = [path for depth in ("*", "*/*") for path in glob.glob(f"{root}/{depth}/dataset_info.json")]
    # Interrupted preparations leave folders such as 1.0.0.incompleteXY.
    versions = [path for path in map(os.path.dirname, infos) if VERSION.fullmatch(os.path.basename(path))]
    variants = sorted({os.path.relpath(os.path.dirname(path), folder) for path in versions})
    if len(variants) > 1:
        raise BadInput(f"config.data.name = {name!r}: has variants; expected one of {', '.join(variants)}")
    versions = [path for path in versions if asked in ("", os.path.basename(path))]
    return max(versions, key=lambda path: [int(part) for part in os.path.basename(path).split(".")], default=None)


def opened(directory: str):
    """Builder of a prepared folder.

    TFDS needs TensorFlow for its feature Audio, even for audio that is stored as plain numbers. Such audio is read as the
    feature Tensor instead.
    """
    import tensorflow_datasets as tfds

    with open(os.path.join(directory, "features.json")) as file:
        features = json.load(file)
    plain = _plain_audio(features)
    if plain == features:
        return tfds.builder_from_directory(directory)
    info = tfds.core.dataset_info.read_proto_from_builder_dir(directory)
    info.features.CopyFrom(tfds.features.FeatureConnector.from_json(plain).to_proto())
    return tfds.core.read_only_builder.ReadOnlyBuilder(directory, info_proto=info)


def _plain_audio(features: Any) -> Any:
    if not isinstance(features, dict):
        return features
    audio = features.get("audio", {})
    if str(features.get("pythonClassName", "")).endswith(".Audio") and not audio.get("lazyDecode"):
        tensor = {name: audio[name] for name in ("shape", "dtype", "encoding") if name in audio}
        return {"pythonClassName": "tensorflow_datasets.core.features.tensor_feature.Tensor", "tensor": tensor}
    return {name: _plain_audio(value) for name, value in features.items()}
