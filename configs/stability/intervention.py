"""Sharpens attention in mid-training by lowering its temperature at one step, on the digits.

    python scripts/train.py --config configs/stability/intervention.py:arm=pre_ln --workdir runs/intervention_pre_ln
    python scripts/intervention.py --workdir runs/intervention      # both arms, three seeds, the table and the plot

Arguments: arm (sigma: σReparam with post-LN; pre_ln: plain layers), temperature (0.1), at (150), steps (300),
learning_rate (0.003).
"""

from sigmarep.sweeps import product, seeds, values
from sigmarep.training.config import arguments, choice, default_config

ARMS = {"pre_ln": ("none", "pre"), "sigma": ("sigma", "post")}


def get_config(text=""):
    args = arguments(text, arm="sigma", temperature=0.1, at=150, steps=300, learning_rate=3e-3)
    config = default_config("image_classification")
    config.batch_size = 64
    config.total_steps = args["steps"]
    config.log_every_steps = 5
    config.divergence_factor = 0.0
    config.sharpness.every_steps = 5

    config.model.reparam, config.model.norm = choice("arm", args["arm"], ARMS)
    config.model.depth, config.model.init_std = 4, 0.1
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = args["learning_rate"]
    config.optimizer.schedule = "constant"
    config.optimizer.warmup_steps = 10
    config.intervention.at_steps = args["at"]
    config.intervention.attention_temperature = args["temperature"]

    config.data.in_memory = True
    config.data.num_threads = 1
    config.data.augment.crop = "resized"
    config.data.augment.crop_scale = (0.6, 1.0)
    return config


def sweep():
    return product(values("arm", *ARMS), seeds(3))
