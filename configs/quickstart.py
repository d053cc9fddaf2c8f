"""A σReparam ViT on 1,797 real handwritten digits: the whole trainer in about a minute on two CPU cores.

python scripts/train.py --config configs/quickstart.py --workdir runs/quickstart
"""

from sigmarep.training.config import default_config


def get_config(_=None):
    config = default_config("image_classification")
    config.batch_size = 64
    config.total_steps = 700
    config.log_every_steps = 50
    config.eval_every_steps = 350
    config.checkpoint_every_steps = 100

    config.model.depth, config.model.width, config.model.num_heads, config.model.mlp_dim = 6, 64, 4, 128
    config.model.patch_size = 2
    config.model.reparam = "sigma"
    config.model.norm = "post"
    # σReparam does not change the function for it: a larger kernel turns more slowly, as at a lower learning rate.
    config.model.init_std = 0.1

    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 3e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 50
    config.ema_decay = 0.99

    config.data.name = "digits"
    config.data.in_memory = True
    config.data.num_threads = 1
    config.data.augment.crop = "resized"
    config.data.augment.crop_scale = (0.6, 1.0)
    return config
