"""Evaluates the newest checkpoint of a run on its task's splits.

python scripts/evaluate.py --workdir runs/quickstart
"""

from absl import flags

from sigmarep import command
from sigmarep.training import processes

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
processes.define_flags()


def main() -> None:
    workdir = command.required("workdir", WORKDIR.value)
    from sigmarep.training.loop import evaluate

    processes.join_by_flags()
    with processes.ending_together():
        result = evaluate(None, workdir)
    if processes.index():
        return
    print(f"checkpoint of step {result.pop('step')}")
    for name, value in result.items():
        print(f"{name.removeprefix('eval/').replace('/', ' ')}: {value:.4g}")


if __name__ == "__main__":
    command.run(main)
