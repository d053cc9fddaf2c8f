"""Evaluates the newest checkpoint of a run on its task's splits.

    python scripts/evaluate.py --workdir runs/quickstart

On other splits, or on own files; the training data need not be there:

    python scripts/evaluate.py --workdir runs/lm --split validation
    python scripts/evaluate.py --workdir runs/lm --name text_folder --folder my_texts --split test

With --config the model is that of the run and everything else of the given file and its overrides, such as other ways to
decode:

    python scripts/evaluate.py --workdir runs/asr --config configs/asr/quickstart.py --config.decoding.beam_size=64
"""

from absl import flags

from sigmarep import command
from sigmarep.training import process_flags

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
SPLIT = flags.DEFINE_list("split", None, "Splits in place of config.data.eval_splits, separated by commas.")
NAME = flags.DEFINE_string("name", None, "A data set in place of config.data.name.")
FOLDER = flags.DEFINE_string("folder", None, "Own files in place of config.data.folder.")
DATA_DIR = flags.DEFINE_string("data_dir", None, "In place of config.data.data_dir.")
AVERAGE = command.define_average_flag()
CONFIG = command.define_config_flag()
process_flags.define()


def main() -> None:
    workdir = command.required("workdir", WORKDIR.value)
    from sigmarep.training import processes
    from sigmarep.training.evaluation import evaluate

    given = {
        "name": NAME.value,
        "folder": FOLDER.value,
        "data_dir": DATA_DIR.value,
        "eval_splits": None if SPLIT.value is None else tuple(SPLIT.value),
    }
    data = {name: value for name, value in given.items() if value is not None}
    processes.join_by_flags()
    with processes.ending_together():
        config = command.resolved_config(CONFIG) if CONFIG.value is not None else None
        result = evaluate(config, workdir, data=data, average=AVERAGE.value)
    if processes.index():
        return
    print(f"checkpoint of step {result.pop('step')}")
    for name, value in result.items():
        print(f"{name.removeprefix('eval/').replace('/', ' ')}: {value:.4g}")


if __name__ == "__main__":
    command.run(main, compiles=True)
