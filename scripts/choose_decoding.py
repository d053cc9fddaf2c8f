"""Chooses language weight and insertion bonus of a trained speech model's beam search: word error rates over a grid.

    python scripts/choose_decoding.py --workdir runs/asr [--split dev] [--language_weight 0.5] [--insertion_bonus 0,1,2]

The model hears the split once; the beam search of every pair is made from that. The best pair is printed as the fields that
it stands for. Choose on a split that is not reported: a rate is too good an estimate on the split that chose it.
"""

import ml_collections
from absl import flags

from sigmarep import command
from sigmarep.errors import BadInput

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
AVERAGE = command.define_average_flag()
SPLIT = flags.DEFINE_string("split", "dev", "The split to choose on.")
WEIGHTS = flags.DEFINE_list(
    "language_weight", ["0.3", "0.5", "0.8", "1.2"], "Values of config.decoding.language_weight."
)
BONUSES = flags.DEFINE_list(
    "insertion_bonus", ["0", "1", "1.5", "2", "3"], "Values of config.decoding.insertion_bonus."
)


def numbers(name: str, values: list[str]) -> list[float]:
    """Raises BadInput where one is none."""
    try:
        return [float(value) for value in values]
    except ValueError:
        raise BadInput(f"--{name} {','.join(values)}: expected numbers with commas between them") from None


def main() -> None:
    workdir = command.required("workdir", WORKDIR.value)
    weights, bonuses = numbers("language_weight", WEIGHTS.value), numbers("insertion_bonus", BONUSES.value)
    from sigmarep.inference import open_run
    from sigmarep.tasks import speech_recognition
    from sigmarep.training.evaluation import Evaluator

    run = open_run(workdir, average=AVERAGE.value)
    if run.config.task != "speech_recognition":
        raise BadInput(f"--workdir {workdir}: is a run of {run.config.task}; expected speech_recognition")
    decoding = ml_collections.ConfigDict(run.config.decoding)
    if not decoding.beam_size:
        raise BadInput(
            f"--workdir {workdir}: its config.decoding.beam_size is 0; greedy decoding has nothing to choose"
        )
    if decoding.language_model == "none":
        weights = [0.0]
    data = speech_recognition.open_data(run.config, run.files)
    results = Evaluator(run.mesh, []).results(data.evaluation(run.task, SPLIT.value), run.variables)
    corpus, rates = data.open_corpus(SPLIT.value), {}
    print(f"Words wrong, {SPLIT.value}:\n")
    print(f"| language_weight | {' | '.join(f'bonus {bonus:g}' for bonus in bonuses)} |\n|---{'|---' * len(bonuses)}|")
    for weight in weights:
        for bonus in bonuses:
            decoding.language_weight, decoding.insertion_bonus = weight, bonus
            rates[weight, bonus] = speech_recognition.word_error_rate(corpus, run.task.decoded(results, decoding))
        row = " | ".join(f"{100 * rates[weight, bonus]:.1f} %" for bonus in bonuses)
        print(f"| {weight:g} | {row} |", flush=True)
    weight, bonus = min(rates, key=lambda pair: rates[pair])
    print(f"\nconfig.decoding.language_weight = {weight:g}\nconfig.decoding.insertion_bonus = {bonus:g}")


if __name__ == "__main__":
    command.run(main, compiles=True)
