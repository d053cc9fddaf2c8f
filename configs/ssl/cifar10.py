"""SimCLR or MoCo v3 on CIFAR-10 on one GPU: a small ViT with 4 x 4 patches, under each of the four arms.

    python scripts/prepare_data.py --name cifar10
    python scripts/train.py --config configs/ssl/cifar10.py --workdir runs/ssl_cifar10
    python scripts/train.py --config configs/ssl/cifar10.py:arm=pre_ln,method=moco_v3 --workdir runs/ssl_cifar10_moco

Arguments: arm (sigma_pre_ln: σReparam with pre-LN; sigma: σReparam without a norm; pre_ln; frozen_patch: pre-LN with the
patch embedding as initialised), method (simclr), learning_rate (0.001), epochs (400).

A recipe of this project; no figure of the paper belongs to it. Not run yet: it has only been built and checked.
"""

from sigmarep.remedies import set_self_supervised_arm
from sigmarep.training.config import arguments, default_config


def get_config(text=""):
    args = arguments(text, arm="sigma_pre_ln", method="simclr", learning_rate=1e-3, epochs=400.0)
    config = default_config("contrastive")
    config.method = args["method"]
    config.batch_size = 512
    config.total_epochs = args["epochs"]
    config.log_every_steps = 50
    config.eval_every_epochs = 50
    config.checkpoint_every_epochs = 10
    config.compute_dtype = "bfloat16"

    config.model.depth, config.model.width, config.model.num_heads, config.model.mlp_dim = 8, 384, 6, 1536
    config.model.patch_size = 4
    config.model.positions = "sincos"
    set_self_supervised_arm(config, args["arm"])
    config.projector.hidden, config.projector.width = 1024, 128
    config.predictor.hidden, config.predictor.width = 1024, 128

    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = args["learning_rate"]
    config.optimizer.warmup_epochs = 10
    config.optimizer.weight_decay = 0.05

    config.data.name = "cifar10"
    config.data.image_size = 32
    config.data.mean = (0.4914, 0.4822, 0.4465)
    config.data.std = (0.247, 0.2435, 0.2616)
    # SimCLR's on CIFAR-10 (its appendix B.9): no blur.
    config.data.views.blur = (0.0, 0.0)
    return config
