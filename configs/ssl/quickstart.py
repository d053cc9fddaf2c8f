"""SimCLR on 4,000 real handwritten digits without their labels, and what a linear probe reads from the features.

python scripts/train.py --config configs/ssl/quickstart.py --workdir runs/ssl_quickstart
"""

from sigmarep.training.config import default_config


def get_config(_=None):
    config = default_config("contrastive")
    config.batch_size = 250
    config.total_epochs = 25
    config.log_every_steps = 20
    config.eval_every_epochs = 25
    config.checkpoint_every_epochs = 5

    config.model.depth, config.model.width, config.model.num_heads, config.model.mlp_dim = 4, 64, 4, 128
    config.model.patch_size = 4
    config.model.reparam = "sigma"
    config.model.norm = "pre"
    config.model.init_std = 0.1

    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_epochs = 2
    config.optimizer.weight_decay = 0.01

    config.data.name = "mnist5k"
    config.data.image_size = 28
    config.data.in_memory = True
    config.data.num_threads = 1
    views = config.data.views
    # A mirrored digit is another sign.
    views.flip = 0.0
    views.crop_scale = (0.3, 1.0)
    views.blur_sigma = (0.1, 1.0)
    return config
