"""Baselines without a network, for language and translation models to beat."""

import gzip
import math
from collections.abc import Iterable, Sequence

import numpy as np

from sigmarep.data.text.documents import Windows
from sigmarep.errors import BadInput


def unigram(train: Windows, test: Windows, vocabulary_size: int) -> float:
    """Total −ln p, in nats, of the targets of `test` under an add-one-smoothed unigram model of the training targets."""
    counts = np.ones(vocabulary_size, np.float64)
    for targets in train.targets():
        np.add.at(counts, targets, 1)
    log_p = np.log(counts / counts.sum())
    return -float(sum(log_p[targets].sum() for targets in test.targets()))


def gzip_bits_per_byte(texts: Iterable[str]) -> float:
    """Bits per byte of the texts, joined by line breaks, under gzip at its highest level."""
    content = "\n".join(texts).encode()
    return 8 * len(gzip.compress(content, compresslevel=9, mtime=0)) / len(content)


def nearest_neighbor(train_sources: Sequence[str], train_targets: Sequence[str], sources: Sequence[str]) -> list[str]:
    """Translates each source by the translation of the most similar training source.

    Similarity is the cosine of TF-IDF vectors of words and of 2- to 4-grams of characters within words. The earliest
    source wins a tie.

    Raises:
      BadInput: scikit-learn is not installed.
    """
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.pipeline import make_union
    except ImportError:
        raise BadInput(
            'config.baselines = True: needs the extra "packaged"; pip install "sigmarep[packaged]"'
        ) from None
    vectors = make_union(TfidfVectorizer(token_pattern=r"\w+"), TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4)))
    train = vectors.fit_transform(train_sources)
    translations: list[str] = []
    block = max(10_000_000 // max(len(train_sources), 1), 1)
    for i in range(math.ceil(len(sources) / block)):
        similarity = vectors.transform(sources[i * block : (i + 1) * block]) @ train.T
        translations += [train_targets[j] for j in np.asarray(similarity.argmax(axis=1)).reshape(-1)]
    return translations
