"""Masked-image modelling on 1,797 real handwritten digits, under σReparam; about a minute on two CPU cores.

    python scripts/train.py --config examples/masked_images/config.py --workdir runs/masked_images
    python scripts/sweep.py --config examples/masked_images/config.py --workdir runs/masking

Arguments: arm (one of sigmarep.remedies.ARMS), steps (600).
"""

from sigmarep.remedies import set_arm
from sigmarep.sweeps import values
from sigmarep.training.config import arguments, default_config


def get_config(text=""):
    args = arguments(text, arm="sigma", steps=600)
    config = default_config("masked_images.task")
    config.batch_size = 64
    config.total_steps = args["steps"]
    config.log_every_steps = 50
    config.eval_every_steps = 300
    config.checkpoint_every_steps = 100

    config.model.init_std = 0.1
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 50

    config.data.in_memory = True
    config.data.num_threads = 1
    config.data.augment.crop = "resized"
    config.data.augment.crop_scale = (0.6, 1.0)
    set_arm(config, args["arm"])
    return config


def sweep():
    return values("config.mask_ratio", 0.4, 0.8)
