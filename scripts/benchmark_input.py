"""Measures the throughput of one process's input pipelines: tokens of text and pictures per second.

    python scripts/benchmark_input.py [--seconds 5] [--sequence_length 256] [--batch_tokens 8192] [--data_dir DIR]

Text goes from tokenized data to batches; tokenization, which is done once, is timed separately. Pictures go from JPEG to
batches with the augmentation of the ImageNet recipes. The text comes from installed packages; the pictures are
scikit-learn's two photographs of 640 x 427 over and over, so reading from a disk or bucket is not included. For audio see
scripts/benchmark_audio.py.
"""

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

from absl import flags

from sigmarep import command

SECONDS = flags.DEFINE_float("seconds", 5.0, "Duration of each measurement.")
SEQUENCE_LENGTH = flags.DEFINE_integer("sequence_length", 256, "Tokens per window.")
BATCH_TOKENS = flags.DEFINE_integer("batch_tokens", 8192, "Tokens per batch, padding included.")
THREADS = flags.DEFINE_integer("threads", 2, "Threads that make batches.")
DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder of prepared data; $TFDS_DATA_DIR or ~/tensorflow_datasets.")


def draw(stream: Iterator[Any], count: Callable[[Any], tuple[int, int]]) -> tuple[float, float]:
    """Draws batches for `SECONDS`; returns tokens and positions (tokens and padding) per second."""
    next(stream)
    tokens = positions = 0
    start = time.perf_counter()
    while (elapsed := time.perf_counter() - start) < SECONDS.value:
        more = count(next(stream))
        tokens, positions = tokens + more[0], positions + more[1]
    return tokens / elapsed, positions / elapsed


def tokenization_speed(config: Any, module: Any, vocabulary: Any) -> str:
    """Times the tokenization of the training split."""
    texts = list(module.texts(config, config.train_split))
    size = sum(len(text.encode("utf-8")) for text in texts)
    start = time.perf_counter()
    for text in texts:
        vocabulary.encode(text)
    return f"{size / (time.perf_counter() - start) / 1e6:.1f} MB/s"


class Photographs:
    """Two photographs as a long data set; every access decodes a JPEG file as TFDS does."""

    def __init__(self) -> None:
        import importlib.resources

        import tensorflow_datasets as tfds

        folder = importlib.resources.files("sklearn.datasets").joinpath("images")
        self.files = [folder.joinpath(name).read_bytes() for name in ("china.jpg", "flower.jpg")]
        self.feature = tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg")

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.feature.decode_example_np(self.files[index % 2]), "label": index % 1000}


def pictures() -> None:
    """Times the way from JPEG to training batches, with and without RandAugment, mixup and CutMix."""
    from sigmarep.data import pipeline
    from sigmarep.data.images import transforms

    for name, strong in (("crop and flip", False), ("with RandAugment, mixup and CutMix", True)):
        config = transforms.default_config()
        transforms.imagenet_2012(config)
        if not strong:
            config.augment.randaugment_layers, config.augment.mixup, config.augment.cutmix = 0, 0.0, 0.0
        transform, pair_transform = transforms.train_transforms(config)
        stream = pipeline.training_stream(
            Photographs(),
            batch_size=32,
            seed=0,
            transform=transform,
            pair_transform=pair_transform,
            num_threads=THREADS.value,
        )
        speed, _ = draw(stream, lambda batch: (len(batch["label"]), 0))
        stream.close()
        print(f"pictures to 224 x 224, {name}: {speed:,.0f} pictures/s (JPEG of 640 x 427)")


def main() -> None:
    from sigmarep.data import pipeline
    from sigmarep.data.text import documents, parallel

    windows = documents.default_config()
    windows.data_dir, windows.sequence_length, windows.vocabulary.size = DATA_DIR.value, SEQUENCE_LENGTH.value, 4000
    pairs = parallel.default_config()
    pairs.data_dir, pairs.vocabulary.size, pairs.num_threads = DATA_DIR.value, 4000, THREADS.value
    print(f"{os.cpu_count()} CPU cores, {THREADS.value} threads, batches of {BATCH_TOKENS.value} tokens")

    vocabulary = documents.open_vocabulary(windows)
    for packing in documents.PACKINGS:
        windows.packing = packing
        source = documents.open_windows(windows, vocabulary, "train", train=True)
        rows = max(BATCH_TOKENS.value // SEQUENCE_LENGTH.value, 1)
        stream = pipeline.training_stream(source, batch_size=rows, seed=0, num_threads=THREADS.value)
        tokens, positions = draw(stream, lambda batch: (int(batch["weights"].sum()), batch["weights"].size))
        print(
            f"language model, {packing}: {tokens:,.0f} tokens/s in {positions:,.0f} positions/s ({windows.name}, "
            f"{source.num_tokens:,} tokens; tokenization {tokenization_speed(windows, documents, vocabulary)})"
        )

    vocabulary = parallel.open_vocabulary(pairs)
    corpus = parallel.PairCorpus(pairs, vocabulary, "train")
    batches = parallel.BucketedBatches(corpus, batch_tokens=BATCH_TOKENS.value, seed=0)
    tokens, positions = draw(
        batches.stream(start=0, process_index=0, process_count=1),
        lambda batch: (
            int((batch["source"] > 0).sum() + (batch["targets"] > 0).sum()),
            batch["source"].size + batch["targets"].size,
        ),
    )
    print(
        f"translation, source and target: {tokens:,.0f} tokens/s in {positions:,.0f} positions/s "
        f"({pairs.name}, {len(corpus):,} pairs; tokenization {tokenization_speed(pairs, parallel, vocabulary)})"
    )
    pictures()


if __name__ == "__main__":
    command.run(main)
