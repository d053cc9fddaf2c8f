"""Measures the throughput of one process's input pipelines: tokens of text and pictures per second.

    python scripts/benchmark_input.py [--seconds 5] [--only pictures] [--sequence_length 256] [--batch_tokens 8192]

Text goes from tokenized data to batches; tokenization, which is done once, is timed separately. Pictures go from JPEG to
batches with the augmentation of the ImageNet recipes, and one by one on the plain road, Pillow and NumPy alone, in turn
with this project's: processor time, and the crops' distance from Pillow's and from exact bicubic interpolation. The text
comes from installed packages; the pictures are scikit-learn's two photographs of 640 x 427 over and over, so reading from
a disk or bucket is not included. For audio see scripts/benchmark_audio.py.
"""

import io
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from absl import flags

from sigmarep import command

SECONDS = flags.DEFINE_float("seconds", 5.0, "Duration of each measurement.")
SEQUENCE_LENGTH = flags.DEFINE_integer("sequence_length", 256, "Tokens per window.")
BATCH_TOKENS = flags.DEFINE_integer("batch_tokens", 8192, "Tokens per batch, padding included.")
THREADS = flags.DEFINE_integer("threads", 2, "Threads that make batches.")
ONLY = flags.DEFINE_enum("only", None, ["text", "pictures"], "Measures these alone.")
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
    """Two photographs as a long data set; every access decodes a JPEG file as prepared data sets do."""

    def __init__(self) -> None:
        import importlib.resources

        folder = importlib.resources.files("sklearn.datasets").joinpath("images")
        self.files = [folder.joinpath(name).read_bytes() for name in ("china.jpg", "flower.jpg")]

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, index: int) -> dict[str, Any]:
        from sigmarep.data.images import files

        return {"image": files.decode(self.files[index % 2]), "label": index % 1000}


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


def imagenet_sized() -> list[bytes]:
    """The two photographs as JPEG files of 500 x 375 and quality 94."""
    from PIL import Image

    stored = []
    for photograph in Photographs().files:
        file = io.BytesIO()
        picture = Image.open(io.BytesIO(photograph)).crop((0, 0, 569, 427))
        picture.resize((500, 375), Image.Resampling.BICUBIC).save(file, "JPEG", quality=94)
        stored.append(file.getvalue())
    return stored


def exact_crop(image: np.ndarray, size: int, box: tuple[int, int, int, int]) -> np.ndarray:
    """Pillow's bicubic interpolation in float64, rounded once, at its end."""

    def weights(start: int, stop: int, length: int) -> np.ndarray:
        scale = (stop - start) / size
        centers = start + (np.arange(size)[:, None] + 0.5) * scale
        x = np.abs(np.arange(length) + 0.5 - centers) / max(scale, 1)
        near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
        values = np.where(x < 1, near, np.where(x < 2, far, 0))
        return values / values.sum(1, keepdims=True)

    left, top, right, bottom = box
    rows, columns = weights(top, bottom, image.shape[0]), weights(left, right, image.shape[1])
    exact = np.tensordot(rows, np.tensordot(columns, image.astype(float), (1, 1)), (1, 1))
    return np.clip(np.rint(exact), 0, 255)


def decibels(squares: list[float]) -> str:
    """Peak signal-to-noise ratio of mean squared errors on a scale of 255."""
    return f"{10 * np.log10(255**2 / np.mean(squares)):.1f} dB" if np.mean(squares) else "equal"


def roads(rounds: int = 7, pictures_per_round: int = 100) -> None:
    """Times the plain road and the project's in turn, in this process, and compares their crops."""
    from PIL import Image

    from sigmarep.data.images import augment, files, native, transforms

    config = transforms.default_config()
    transforms.imagenet_2012(config)
    config.augment.randaugment_layers, config.augment.mixup, config.augment.cutmix = 0, 0.0, 0.0
    transform, _ = transforms.train_transforms(config)
    size, scale = config.image_size, config.augment.crop_scale
    mean, std = (255 * np.asarray(values, np.float32) for values in (config.mean, config.std))
    stored = imagenet_sized()

    def plain(index: int, rng: np.random.Generator) -> np.ndarray:
        picture = Image.open(io.BytesIO(stored[index % 2]))
        box = augment.crop_box(picture.height, picture.width, scale, rng)
        image = np.asarray(Image.fromarray(np.asarray(picture)).resize((size, size), Image.Resampling.BICUBIC, box=box))
        if rng.random() < 0.5:
            image = image[:, ::-1]
        return (image.astype(np.float32) - mean) / std

    def own(index: int, rng: np.random.Generator) -> np.ndarray:
        return transform({"image": files.decode(stored[index % 2]), "label": 0}, rng)["image"]

    times: dict[str, list[float]] = {"plain": [], "own": []}
    for round_ in range(rounds):
        for name, road in (("plain", plain), ("own", own)):
            start = time.process_time()
            for index in range(pictures_per_round):
                road(index, np.random.default_rng((round_, index)))
            times[name].append(1000 * (time.process_time() - start) / pictures_per_round)
    ratios = np.divide(times["plain"], times["own"])
    packages = [name for name in ("simplejpeg", "cykooz_resizer") if getattr(native, name) is not None]
    low, middle, high = np.percentile(ratios, (25, 50, 75))
    print(
        f"JPEG of 500 x 375 to {size} x {size}, crop and flip, processor time of a picture: "
        f"{np.median(times['plain']):.2f} ms by Pillow and NumPy, {np.median(times['own']):.2f} ms here with "
        f"{' and '.join(packages) or 'Pillow alone'}; ratio {middle:.2f} ({low:.2f} to {high:.2f})"
    )

    errors: dict[str, list[float]] = {"pillow": [], "plain_exact": [], "own_exact": []}
    for index in range(16):
        image = files.decode(stored[index % 2])
        box = augment.crop_box(image.shape[0], image.shape[1], scale, np.random.default_rng(index))
        crop = augment.random_resized_crop(image, size, scale, "bicubic", np.random.default_rng(index)).astype(float)
        pillow, exact = augment.resized(image, (size, size), "bicubic", box=box), exact_crop(image, size, box)
        for name, difference in (
            ("pillow", crop - pillow),
            ("plain_exact", pillow - exact),
            ("own_exact", crop - exact),
        ):
            errors[name].append(float(np.mean(difference**2)))
    print(
        f"crops against Pillow's: {decibels(errors['pillow'])}; against exact interpolation: "
        f"{decibels(errors['own_exact'])}, Pillow's {decibels(errors['plain_exact'])}"
    )


def main() -> None:
    print(f"{os.cpu_count()} CPU cores, {THREADS.value} threads")
    if ONLY.value != "pictures":
        texts()
    if ONLY.value != "text":
        pictures()
        roads()


def texts() -> None:
    """Times windows of documents and bucketed pairs."""
    from sigmarep.data import pipeline
    from sigmarep.data.text import documents, parallel

    windows = documents.default_config()
    windows.data_dir, windows.sequence_length, windows.vocabulary.size = DATA_DIR.value, SEQUENCE_LENGTH.value, 4000
    pairs = parallel.default_config()
    pairs.data_dir, pairs.vocabulary.size, pairs.num_threads = DATA_DIR.value, 4000, THREADS.value
    print(f"batches of {BATCH_TOKENS.value} tokens")

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


if __name__ == "__main__":
    command.run(main)
