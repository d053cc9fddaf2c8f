"""CIFAR-10 from scratch on one GPU: a small ViT with 4 x 4 patches, norm-free σReparam or pre-LN.

    python scripts/prepare_data.py --name cifar10
    python scripts/train.py --config configs/vit/cifar10.py --workdir runs/cifar10
    python scripts/train.py --config configs/vit/cifar10.py:reparam=none,norm=pre --workdir runs/cifar10_pre

Arguments: reparam (sigma), norm (post), learning_rate (0.001), epochs (200).

A recipe of this project; no figure of the paper belongs to it. Not run yet: it has only been built and checked.
"""

from sigmarep.training.config import arguments, default_config


def get_config(text=""):
    args = arguments(text, reparam="sigma", norm="post", learning_rate=1e-3, epochs=200.0)
    config = default_config("image_classification")
    config.batch_size = 256
    config.total_epochs = args["epochs"]
    config.log_every_steps = 50
    config.eval_every_epochs = 10
    config.checkpoint_every_epochs = 10
    config.compute_dtype = "bfloat16"

    config.model.depth, config.model.width, config.model.num_heads, config.model.mlp_dim = 8, 384, 6, 1536
    config.model.patch_size = 4
    config.model.reparam = args["reparam"]
    config.model.norm = args["norm"]
    config.model.pool = "mean"
    config.model.drop_path = 0.1

    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = args["learning_rate"]
    config.optimizer.warmup_epochs = 5
    config.optimizer.weight_decay = 0.05
    config.optimizer.clip_norm = 1.0

    config.label_smoothing = 0.1
    config.data.name = "cifar10"
    config.data.image_size = 32
    config.data.mean = (0.4914, 0.4822, 0.4465)
    config.data.std = (0.247, 0.2435, 0.2616)
    augment = config.data.augment
    augment.crop, augment.pad, augment.flip = "pad", 4, True
    augment.randaugment_layers, augment.randaugment_magnitude = 2, 9.0
    augment.mixup, augment.cutmix = 0.8, 1.0
    return config
