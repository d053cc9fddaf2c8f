"""SimCLR on 1,437 real handwritten digits without their labels, and what a linear probe reads from the features.

    python scripts/train.py --config configs/ssl/quickstart.py --workdir runs/ssl_quickstart
    python scripts/ssl_stability.py --workdir runs/ssl_stability     # four arms, three seeds: docs/results.md

Arguments: arm (sigma_pre_ln: σReparam with pre-LN; sigma: σReparam without a norm; pre_ln; frozen_patch: pre-LN with the
patch embedding as initialised), method (simclr), learning_rate (0.003), epochs (60).
"""

from sigmarep.remedies import SELF_SUPERVISED, set_self_supervised_arm
from sigmarep.sweeps import product, seeds, values
from sigmarep.training.config import arguments, default_config


def get_config(text=""):
    args = arguments(text, arm="sigma_pre_ln", method="simclr", learning_rate=3e-3, epochs=60.0)
    config = default_config("contrastive")
    config.method = args["method"]
    config.batch_size = 125
    config.total_epochs = args["epochs"]
    config.log_every_steps = 20
    config.eval_every_epochs = 20
    config.checkpoint_every_epochs = 10

    config.model.depth, config.model.width, config.model.num_heads, config.model.mlp_dim = 4, 128, 4, 256
    config.model.patch_size = 2
    set_self_supervised_arm(config, args["arm"])
    config.model.init_std = 0.1

    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = args["learning_rate"]
    config.optimizer.warmup_epochs = 3
    config.optimizer.weight_decay = 0.01

    config.data.name = "digits"
    config.data.in_memory = True
    config.data.num_threads = 1
    views = config.data.views
    # A mirrored digit is another sign, and a stroke of these is no wider than a blur.
    views.flip, views.blur = 0.0, (0.0, 0.0)
    views.crop_scale = (0.5, 1.0)
    views.brightness = 0.2
    return config


def sweep():
    return product(values("arm", *SELF_SUPERVISED), seeds(3))
