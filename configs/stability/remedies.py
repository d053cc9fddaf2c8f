"""All remedies on two tasks: which of them let a small model train at which rates, and how well does it predict?

    python scripts/train.py --config configs/stability/remedies.py:task=lm,arm=hyperball --workdir runs/one
    python scripts/sweep.py --config configs/stability/remedies.py --workdir runs/remedies_vit
    python scripts/sweep.py --config configs/stability/remedies.py:task=lm --workdir runs/remedies_lm
    python scripts/best_rates.py --workdir runs/remedies_vit --metric eval/test/loss --reference pre_ln

Arguments: task (vit: the digits; lm: the reference prose of Python's own help), arm (one of sigmarep.remedies.ARMS),
learning_rate (0.003), steps (150).

One rate for everything, by Adam where the arm does not say otherwise, with ten steps of warmup and a cosine; no weight
decay but where it is the remedy. `sweep()` has every arm at five rates over two decades, three seeds; docs/experiments.md
has the definitions and the prediction.
"""

from sigmarep.remedies import ARMS, set_arm
from sigmarep.sweeps import product, seeds, values
from sigmarep.training.config import arguments, choice, default_config

RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
TASKS = {"vit": "image_classification", "lm": "language_modeling"}
# Under LARS and LAMB alone it differs from `sigma_only`.
LEFT_OUT = ("sigma_only_trust",)


def get_config(text=""):
    args = arguments(text, task="vit", arm="sigma", learning_rate=3e-3, steps=150)
    config = default_config(choice("task", args["task"], TASKS))
    config.total_steps = args["steps"]
    config.log_every_steps = 10
    # Every run reaches its end unless its loss is no number: what a raised rate does to it is the question.
    config.divergence_factor = 0.0
    # The weights of some hundred runs, of which the question needs none.
    config.keep_checkpoints = 0

    config.model.depth, config.model.init_std = 4, 0.1
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = args["learning_rate"]
    config.optimizer.warmup_steps = 10
    config.data.num_threads = 1
    if args["task"] == "vit":
        config.batch_size = 64
        config.label_smoothing = 0.1
        config.data.in_memory = True
        config.data.augment.crop = "resized"
        config.data.augment.crop_scale = (0.6, 1.0)
    else:
        config.batch_size = 16
        config.model.width, config.model.num_heads, config.model.mlp_dim = 64, 4, 128
        config.data.sequence_length = 64
        config.data.vocabulary.size = 1000
    set_arm(config, args["arm"])
    return config


def sweep(text=""):
    task = arguments(text, task="vit")["task"]
    choice("task", task, TASKS)
    arms = [arm for arm in ARMS if arm not in LEFT_OUT]
    return product(values("arm", *arms), values("task", task), values("learning_rate", *RATES), seeds(3))
