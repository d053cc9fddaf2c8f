"""How should a trained speech model's beam search be set? Word error rates of a split over language weights and bonuses.

    python scripts/choose_decoding.py --workdir runs/asr [--split dev] [--language_weight 0.5] [--insertion_bonus 0,1,2]

The model hears the split once; the beam search of every pair is made from that. The best pair is printed as the fields that
it stands for. Choose on a split that is not reported: a rate is too good an estimate on the split that chose it.
"""

import ml_collections
from absl import flags

from sigmarep import command
from sigmarep.errors import BadInput

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
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
    from sigmarep.tasks.speech_recognition import SpeechRecognition
    from sigmarep.training.evaluation import Evaluator
    from sigmarep.training.loop import restore
    from sigmarep.training.step import evaluation_variables

    experiment, _, state = restore(None, workdir)
    task = experiment.task
    if not isinstance(task, SpeechRecognition):
        raise BadInput(f"--workdir {workdir}: its task is {experiment.config.task}; speech_recognition is expected")
    decoding = ml_collections.ConfigDict(task.config.decoding)
    if not decoding.beam_size:
        raise BadInput(
            f"--workdir {workdir}: its config.decoding.beam_size is 0; greedy decoding has nothing to choose"
        )
    if decoding.language_model == "none":
        weights = [0.0]
    results = Evaluator(experiment).results(task.evaluation(SPLIT.value), evaluation_variables(state))
    corpus, rates = task.open_corpus(SPLIT.value), {}
    print(f"Words wrong, {SPLIT.value}:\n")
    print(f"| language_weight | {' | '.join(f'bonus {bonus:g}' for bonus in bonuses)} |\n|---{'|---' * len(bonuses)}|")
    for weight in weights:
        for bonus in bonuses:
            decoding.language_weight, decoding.insertion_bonus = weight, bonus
            rates[weight, bonus] = task.word_error_rate(corpus, results, decoding)
        row = " | ".join(f"{100 * rates[weight, bonus]:.1f} %" for bonus in bonuses)
        print(f"| {weight:g} | {row} |", flush=True)
    weight, bonus = min(rates, key=lambda pair: rates[pair])
    print(f"\nconfig.decoding.language_weight = {weight:g}\nconfig.decoding.insertion_bonus = {bonus:g}")


if __name__ == "__main__":
    command.run(main)
