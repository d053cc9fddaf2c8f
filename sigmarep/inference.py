"""A trained model, opened from the folder of its run alone.

    from sigmarep.inference import open_run

    run = open_run("runs/lm")
    run.generate(["The for statement"], seed=1)

Neither the training data nor the devices of the run are needed: a copy of its folder is enough. Nothing in it is changed.
"""

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from sigmarep.errors import BadInput
from sigmarep.nn import fold
from sigmarep.tasks.protocol import Files
from sigmarep.training.restore import restore

Path = str | os.PathLike


class Classified(NamedTuple):
    """The likeliest class of a picture, its probability, and the probabilities of all classes (C,) in their order."""

    label: str
    probability: float
    probabilities: np.ndarray


class Plain(NamedTuple):
    """A Linen module without reparametrization, and its variables."""

    module: nn.Module
    variables: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Run:
    """The newest checkpoint of a run. A method for which its task has no use raises BadInput.

    Attributes:
      folder: the workdir.
      step: updates made.
      config: that the run was made with.
      task: the model side, a `sigmarep.tasks.protocol.TaskModel`.
      files: of the run by name, such as its vocabulary.
      variables: parameters and other collections, as evaluation uses them: averaged if the run kept an average. They lie
        on the devices of `mesh`.
    """

    folder: str
    step: int
    config: ml_collections.FrozenConfigDict
    task: Any
    files: Files
    variables: dict[str, Any]
    mesh: Mesh

    def generate(
        self,
        prompts: Sequence[str],
        *,
        seed: int = 0,
        max_length: int = 128,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 0.95,
    ) -> list[str]:
        """Continuations of texts by a language model, the prompts included.

        Args:
          max_length: tokens of a text, its begin and end among them.
          temperature, top_k, top_p: see `sigmarep.models.decoding.sample`; temperature 0 takes the likeliest token.

        Raises:
          BadInput: a prompt has too many tokens.
        """
        return self._method("generate")(
            self.variables,
            list(prompts),
            jax.random.key(seed),
            max_length=max_length,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
        )

    def translate(self, sentences: Sequence[str], *, names: Sequence[str] | None = None, rows: int = 32) -> list[str]:
        """Translations of sentences, by the beam search of `config.decoding`; an empty one of an empty one.

        Args:
          names: for the sentences in messages.
          rows: sentences at a time.

        Raises:
          BadInput: a sentence has too many tokens.
        """
        names = [f"sentence {i + 1}" for i in range(len(sentences))] if names is None else names
        return self._method("translate")(self.variables, list(sentences), names=names, rows=rows)

    def transcribe(self, recordings: Sequence[Path | np.ndarray], *, rows: int = 8) -> list[str]:
        """The words of recordings: paths of audio files, or samples (n,) in [−1, 1] at `config.data.sample_rate`.

        Args:
          rows: recordings at a time.

        Raises:
          BadInput: a file cannot be read, or is longer than all that the model was trained on.
        """
        transcribe = self._method("transcribe")
        samples = [self.recording(each) if isinstance(each, Path) else each for each in recordings]
        return transcribe(self.variables, samples, rows=rows)

    def recording(self, path: Path) -> np.ndarray:
        """The samples (n,) of an audio file for `transcribe`, the mean of its channels, resampled.

        Raises:
          BadInput: see `transcribe`.
        """
        return self._method("recording")(path)

    def classify(self, images: Iterable[Path | np.ndarray]) -> list[Classified]:
        """The class of each picture: paths of files, or uint8 arrays (height, width, channels) of any size.

        Raises:
          BadInput: a file cannot be read (`sigmarep.data.images.files.read`).
        """
        classify = self._method("classify")
        names = self.task.class_names
        return [
            Classified(names[int(each.argmax())], float(each.max()), each)
            for each in classify(self.variables, self._pictures(images))
        ]

    def picture(self, path: Path) -> np.ndarray:
        """The picture of a file for `classify` and `features`, uint8 (height, width, channels of the model).

        Raises:
          BadInput: see `classify`.
        """
        return self._method("picture")(path)

    def features(self, images: Iterable[Path | np.ndarray]) -> np.ndarray:
        """Features (N, width) float32 of pictures, which are given as to `classify`."""
        return self._method("features")(self.variables, self._pictures(images))

    def plain(self) -> Plain:
        """The model without reparametrization: the same outputs, from kernels that are fixed for good."""
        others = {
            name: value for name, value in self.variables.items() if name not in ("params", "spectral", "momentum")
        }
        return Plain(self._method("plain_module"), {"params": fold(self.variables), **others})

    def serving(self) -> tuple[Callable[[Any, jax.Array], jax.Array], jax.ShapeDtypeStruct]:
        """The model as one function of `plain().variables` and a batch, and the shape of one example of the batch."""
        return self._method("serving")()

    def _pictures(self, images: Iterable[Path | np.ndarray]) -> Iterator[np.ndarray]:
        return (self.picture(each) if isinstance(each, Path) else each for each in images)

    def _method(self, name: str) -> Any:
        if not hasattr(self.task, name):
            raise BadInput(f"--workdir {self.folder}: is a run of {self.config.task}, which has no {name}")
        return getattr(self.task, name)


def open_run(folder: str, *, average: int = 1) -> Run:
    """The trained model of a workdir.

    Args:
      average: the number of newest checkpoints whose parameters are averaged; as many must be in the folder
        (`config.keep_checkpoints`). Other collections are the newest one's.

    Raises:
      BadInput: the folder holds no run, no checkpoint that is whole, or fewer than `average`.
    """
    restored = restore(None, folder, average=average)
    return Run(folder=folder, **restored._asdict())
