"""ImageNet-1k from scratch with the supervised recipe of the MAE paper: the pre-LN baseline of the large models.

    python scripts/train.py --config configs/vit/imagenet_mae.py:variant=L/16 --workdir runs/mae_l

Arguments: variant (B/16), reparam (none), warmup_epochs (20), epochs (0 for 300, 200, 200 of B, L, H),
batch_size (4096).

The recipe (He et al., 2022, appendix): AdamW (0.9, 0.95), batch 4096, base learning rate 1e-4 per 256, weight decay 0.3,
cosine, 20 epochs of warmup, stochastic depth 0.1 / 0.2 / 0.2, RandAugment 9/0.5, mixup 0.8, CutMix 1.0, label smoothing
0.1, sine-cosine positions, Xavier initialisation, averaged weights with decay 0.9999. No figure is quoted here for what
it should reach. The paper on σReparam measures sharpness with it for 100 epochs, with and without warmup, and with a
temperature of attention lowered after ten epochs: `sweep()`.
Not run by this project: it has only been built and checked, for want of the data.
"""

from sigmarep.data.images.transforms import imagenet_2012
from sigmarep.errors import BadInput
from sigmarep.models.vit import variant
from sigmarep.sweeps import product, values
from sigmarep.training.config import arguments, default_config

# Epochs and stochastic depth of each size.
SIZES = {"B": (300.0, 0.1), "L": (200.0, 0.2), "H": (200.0, 0.2)}


def get_config(text=""):
    args = arguments(text, variant="B/16", reparam="none", warmup_epochs=20.0, epochs=0.0, batch_size=4096)
    size = args["variant"].split("/")[0]
    if size not in SIZES:
        raise BadInput(f"config argument variant = {args['variant']!r}: this recipe has the sizes {', '.join(SIZES)}")
    config = default_config("image_classification")
    config.batch_size = args["batch_size"]
    config.log_every_steps = 50
    config.eval_every_epochs = 10
    config.checkpoint_every_epochs = 5
    config.compute_dtype = "bfloat16"
    config.ema_decay = 0.9999

    config.model.update(variant(args["variant"]))
    config.total_epochs, config.model.drop_path = SIZES[size]
    # The state alone, with two moments and averaged weights, is 9.4 GiB of H.
    config.model.remat = "full" if size == "H" else "none"
    if args["epochs"]:
        config.total_epochs = args["epochs"]
    config.model.reparam = args["reparam"]
    config.model.gamma_init = "sigma"
    config.model.qkv = "fused"
    config.model.positions = "sincos"
    config.model.kernel_init = "xavier_uniform"

    config.optimizer.name = "adamw"
    config.optimizer.beta2 = 0.95
    config.optimizer.learning_rate = 1e-4 * config.batch_size / 256
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_epochs = args["warmup_epochs"]
    config.optimizer.weight_decay = 0.3

    config.label_smoothing = 0.1
    imagenet_2012(config.data)
    return config


def sweep():
    """Row V1 of the paper's experiments: warmup on and off, plain and σReparam, and the temperature lowered at epoch 10."""
    common = {"epochs": 100.0, "config.sharpness.every_steps": 500}
    temperatures = {"config.intervention.at_epochs": 10.0, "config.intervention.attention_temperature": 0.1}
    points = product(values("reparam", "none", "sigma"), values("warmup_epochs", 0.0, 20.0))
    return [
        common | point for point in [*points, *(point | temperatures for point in points if point["warmup_epochs"])]
    ]
