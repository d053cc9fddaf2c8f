"""Classifies picture files with a trained model.

    python scripts/classify.py --workdir runs/quickstart --images pictures/ [--images one.png]

PNG, JPEG, WebP and whatever else Pillow reads, of any size; of a folder, the pictures in and below it. Prints a line for
each file: its name, a tab, the likeliest class, a tab, and its probability. Files that cannot be read are named at the end
with what is wrong with them; the exit status is then 2. The folder of the run is all that is needed, not its data.
"""

import itertools

from absl import flags

from sigmarep import command
from sigmarep.errors import BadInput

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
AVERAGE = command.define_average_flag()
IMAGES = flags.DEFINE_multi_string("images", [], "A picture or a folder of pictures; may be given several times.")
# Pictures held in memory at a time.
AT_A_TIME = 256


def main() -> None:
    workdir = command.required("workdir", WORKDIR.value)
    if not IMAGES.value:
        raise BadInput("--images is missing: name a picture or a folder of pictures")
    from sigmarep.data.images import files
    from sigmarep.inference import open_run

    run, paths, problems = open_run(workdir, average=AVERAGE.value), files.find(IMAGES.value), []
    while part := list(itertools.islice(paths, AT_A_TIME)):
        pictures = {}
        for path in part:
            try:
                pictures[path] = run.picture(path)
            except BadInput as error:
                problems.append(str(error))
        for path, result in zip(pictures, run.classify(pictures.values()), strict=True):
            print(f"{path}\t{result.label}\t{result.probability:.4f}")
    if problems:
        raise BadInput(f"--images {'; '.join(problems)}")


if __name__ == "__main__":
    command.run(main, compiles=True)
