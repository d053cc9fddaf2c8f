"""Continues a text with a trained language model.

    python scripts/generate.py --workdir runs/lm --prompt "The for statement" [--temperature 0.8] [--top_p 0.95]

Temperature 0 takes the likeliest token each time. The folder of the run is all that is needed, not its data.
"""

from absl import flags

from sigmarep import command

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
AVERAGE = command.define_average_flag()
PROMPT = flags.DEFINE_multi_string("prompt", [""], "Text to continue; may be given several times.")
MAX_LENGTH = flags.DEFINE_integer("max_length", 128, "Tokens of a text, the prompt among them.", lower_bound=2)
TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "Divides the logits.", lower_bound=0)
TOP_K = flags.DEFINE_integer("top_k", 0, "Draw from so many of the likeliest tokens, 0 for all.", lower_bound=0)
TOP_P = flags.DEFINE_float("top_p", 0.95, "Draw from the fewest tokens that reach this probability.", 0, 1)
SEED = flags.DEFINE_integer("seed", 0, "Of the draws.")


def main() -> None:
    workdir = command.required("workdir", WORKDIR.value)
    from sigmarep.inference import open_run

    for text in open_run(workdir, average=AVERAGE.value).generate(
        PROMPT.value,
        seed=SEED.value,
        max_length=MAX_LENGTH.value,
        temperature=TEMPERATURE.value,
        top_k=TOP_K.value,
        top_p=TOP_P.value,
    ):
        print(text)


if __name__ == "__main__":
    command.run(main, compiles=True)
