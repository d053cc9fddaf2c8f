"""Entropy collapse, seen: a pre-LN ViT at a raised learning rate, and σReparam at the same one, on the digits.

    python scripts/train.py --config configs/collapse.py:arm=pre_ln --workdir runs/collapse_pre_ln
    python scripts/train.py --config configs/collapse.py:arm=sigma --workdir runs/collapse_sigma
    python scripts/collapse.py --workdir runs/collapse      # both, three seeds, and the table of the README

Arguments: arm (sigma: σReparam with post-LN; pre_ln: the usual pre-LN ViT without it), learning_rate (0.02), steps (500).
Everything else is the same in both arms.
"""

from sigmarep.sweeps import product, seeds, values
from sigmarep.training.config import arguments, choice, default_config

ARMS = {"pre_ln": ("none", "pre"), "sigma": ("sigma", "post")}


def get_config(text=""):
    args = arguments(text, arm="sigma", learning_rate=0.02, steps=500)
    config = default_config("image_classification")
    config.batch_size = 64
    config.total_steps = args["steps"]
    config.log_every_steps = 25
    config.checkpoint_every_steps = 250

    config.model.reparam, config.model.norm = choice("arm", args["arm"], ARMS)
    config.model.init_std = 0.1
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = args["learning_rate"]
    config.optimizer.warmup_steps = 50

    config.data.in_memory = True
    config.data.num_threads = 2
    config.data.augment.crop = "resized"
    config.data.augment.crop_scale = (0.6, 1.0)
    return config


def sweep():
    return product(values("arm", *ARMS), seeds(3))
