"""Translates with a trained model.

    python scripts/translate.py --workdir runs/mt --text "Delete the file" [--text "Open in a new window"]
    python scripts/translate.py --workdir runs/mt --input sentences.txt > translations.txt

One translation a line, in the order of the sentences. A file has one sentence a line, in UTF-8; it may be gzipped. The
folder of the run is all that is needed, not its data.
"""

from absl import flags

from sigmarep import command
from sigmarep.errors import BadInput

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
AVERAGE = command.define_average_flag()
TEXT = flags.DEFINE_multi_string("text", [], "A sentence; may be given several times.")
INPUT = flags.DEFINE_string("input", None, "A file of sentences.")


def main() -> None:
    workdir = command.required("workdir", WORKDIR.value)
    if bool(TEXT.value) == bool(INPUT.value):
        raise BadInput("--text, --input: give the one or the other")
    from sigmarep.data.datasets import text_folder
    from sigmarep.inference import open_run

    sentences = list(text_folder.lines(INPUT.value)) if INPUT.value else TEXT.value
    names = [f"{INPUT.value}:{i + 1}" if INPUT.value else f"--text {text!r}" for i, text in enumerate(sentences)]
    for translation in open_run(workdir, average=AVERAGE.value).translate(sentences, names=names):
        print(translation.replace("\n", " "))


if __name__ == "__main__":
    command.run(main, compiles=True)
