"""Evaluates the newest checkpoint of a run on its task's splits.

    python scripts/evaluate.py --workdir runs/quickstart

With --config the model is that of the run and everything else of the given file and its overrides, such as other splits, or
other ways to decode:

    python scripts/evaluate.py --workdir runs/asr --config configs/asr/quickstart.py --config.decoding.beam_size=64
"""

from absl import flags

from sigmarep import command
from sigmarep.training import processes

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
CONFIG = command.define_config_flag()
processes.define_flags()


def main() -> None:
    workdir = command.required("workdir", WORKDIR.value)
    from sigmarep.training.loop import evaluate

    processes.join_by_flags()
    with processes.ending_together():
        result = evaluate(command.resolved_config(CONFIG) if CONFIG.value is not None else None, workdir)
    if processes.index():
        return
    print(f"checkpoint of step {result.pop('step')}")
    for name, value in result.items():
        print(f"{name.removeprefix('eval/').replace('/', ' ')}: {value:.4g}")


if __name__ == "__main__":
    command.run(main)
