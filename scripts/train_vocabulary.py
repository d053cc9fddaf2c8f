"""Trains a vocabulary on a configuration's text and writes it to a file.

    python scripts/train_vocabulary.py --config configs/lm/quickstart.py --output FILE [--config.data.vocabulary.size=…]

scripts/train.py trains a vocabulary by itself. A file is for sharing one between data sets or runs:
--config.data.vocabulary.file=FILE.
"""

import os

from absl import flags

from sigmarep import command
from sigmarep.data.text import documents, parallel, vocabulary
from sigmarep.errors import BadInput
from sigmarep.files import write_atomically

CONFIG = command.define_config_flag()
OUTPUT = flags.DEFINE_string("output", None, "File to write the vocabulary to.")


def main() -> None:
    config, output = command.resolved_config(CONFIG), command.required("output", OUTPUT.value)
    data = config.data
    if "vocabulary" not in data:
        raise BadInput(f"--config: the data of task {config.task!r} has no vocabulary")
    module = parallel if "source_feature" in data else documents
    trained = vocabulary.train(data.vocabulary, module.texts(data, data.train_split))
    try:
        os.makedirs(os.path.dirname(os.path.abspath(output)), exist_ok=True)
        write_atomically(output, trained.to_bytes())
    except OSError as error:
        raise BadInput(f"--output {output}: cannot be written ({error.strerror})") from error
    print(f"{data.vocabulary.kind} vocabulary of {trained.size} tokens: {output}")
    print(f"SHA-256: {vocabulary.fingerprint(trained)}")


if __name__ == "__main__":
    command.run(main)
