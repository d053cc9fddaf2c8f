"""A σReparam ViT on 1,797 real handwritten digits: the whole trainer in about a minute on two CPU cores.

python scripts/train.py --config configs/quickstart.py --workdir runs/quickstart
"""

from sigmarep.training.config import default_config


def get_config(_=None):
    config = default_config("image_classification")
    config.batch_size = 64
    config.total_steps = 600
    config.log_every_steps = 25
    config.eval_every_steps = 200
    config.checkpoint_every_steps = 100
    config.ema_decay = 0.0

    config.model.depth = 6
    config.model.width = 64
    config.model.num_heads = 4
    config.model.mlp_dim = 128
    config.model.reparam = "sigma"
    config.model.norm = "post"

    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 50

    config.data.augment.crop = "pad"
    config.data.augment.pad = 1
    return config
