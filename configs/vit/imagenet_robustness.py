"""ImageNet-1k ViT-B/16 under batch sizes, learning rates and warmups: which of eight settings diverge.

    python scripts/train.py --config configs/vit/imagenet_robustness.py:learning_rate=0.001 --workdir runs/robust

Arguments: reparam (sigma), norm (none), batch_size (1024), learning_rate (0.0005), warmup_epochs (5), epochs (300).
`sweep()` gives the grid: two models x two batch sizes x two learning rates x warmup on or off.

Notes on the paper report that seven of its eight pre-LN settings diverge; the third factor of the grid is not certain,
and warmup is this project's reading. Not run by this project: it has only been built and checked, for want of the data.
"""

from sigmarep.data.images.transforms import imagenet_2012
from sigmarep.models.vit import variant
from sigmarep.training.config import arguments, default_config


def get_config(text=""):
    args = arguments(
        text,
        reparam="sigma",
        norm="none",
        batch_size=1024,
        learning_rate=5e-4,
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
    config.optimizer.learning_rate = args["learning_rate"]
    config.optimizer.warmup_epochs = args["warmup_epochs"]
    config.optimizer.weight_decay = 0.05

    config.label_smoothing = 0.1
    imagenet_2012(config.data)
    config.data.augment.erasing = 0.25
    return config


def sweep():
    """Arguments of the sixteen runs."""
    return [
        f"reparam={reparam},norm={norm},batch_size={batch_size},learning_rate={learning_rate},warmup_epochs={warmup}"
        for reparam, norm in (("none", "pre"), ("sigma", "none"))
        for batch_size in (1024, 2048)
        for learning_rate in (5e-4, 1e-3)
        for warmup in (0, 5)
    ]
