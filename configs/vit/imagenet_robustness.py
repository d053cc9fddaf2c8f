"""ImageNet-1k ViT-B/16 under batch sizes, learning rates and warmups: which of eight settings diverge.

    python scripts/train.py --config configs/vit/imagenet_robustness.py:base_learning_rate=0.001 --workdir runs/robust
    python scripts/sweep.py --config configs/vit/imagenet_robustness.py --workdir runs/robustness --dry_run

Arguments: reparam (sigma), norm (none), batch_size (1024), base_learning_rate (0.0005, times batch /
512), warmup_epochs (5), epochs (300).
`sweep()` gives the grid: two models x two batch sizes x two base rates x warmup on or off.

Notes on the paper report that seven of its eight pre-LN settings diverge; the third factor of the grid is not certain,
and warmup is this project's reading. So is the rate: that the paper's 0.0005 and 0.001 are base rates in DeiT's sense,
to be multiplied by batch / 512. Taken as they stand, 0.001 at a batch of 1,024 with warmup would be DeiT's own recipe,
which trains. Not run by this project: it has only been built and checked, for want of the data.
"""

from sigmarep.data.images.transforms import imagenet_2012
from sigmarep.models.vit import variant
from sigmarep.sweeps import product, values, zipped
from sigmarep.training.config import arguments, default_config


def get_config(text=""):
    args = arguments(
        text,
        reparam="sigma",
        norm="none",
        batch_size=1024,
        base_learning_rate=5e-4,
        warmup_epochs=5.0,
        epochs=300.0,
    )
    config = default_config("image_classification")
    config.batch_size = args["batch_size"]
    config.total_epochs = args["epochs"]
    config.log_every_steps = 50
    config.eval_every_epochs = 10
    config.checkpoint_every_epochs = 5
    config.compute_dtype = "bfloat16"

    config.model.update(variant("B/16"))
    config.model.reparam, config.model.norm = args["reparam"], args["norm"]
    config.model.gamma_init = "sigma"
    config.model.qkv = "fused"
    config.model.drop_path = 0.1

    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = args["base_learning_rate"] * args["batch_size"] / 512
    config.optimizer.warmup_epochs = args["warmup_epochs"]
    config.optimizer.weight_decay = 0.05

    config.label_smoothing = 0.1
    imagenet_2012(config.data)
    config.data.augment.erasing = 0.25
    return config


def sweep():
    return product(
        zipped(values("reparam", "none", "sigma"), values("norm", "pre", "none")),
        values("batch_size", 1024, 2048),
        values("base_learning_rate", 5e-4, 1e-3),
        values("warmup_epochs", 0, 5),
    )
