"""ImageNet-1k without LayerNorm, warmup, weight decay or an adaptive optimizer: σReparam with LARS and a step schedule.

    python scripts/train.py --config configs/vit/imagenet_simplified.py --workdir runs/simplified_b
    python scripts/train.py --config configs/vit/imagenet_simplified.py:variant=L/16 --workdir runs/simplified_l
    python scripts/train.py --config configs/vit/imagenet_simplified.py:reparam=spectral --workdir runs/spectral_norm
    python scripts/train.py --config configs/vit/imagenet_simplified.py:reparam=weight,norm=pre --workdir runs/weight_norm

`sweep()` makes ViT-B with γ starting at σ(W₀) and at 1, its ablations by spectral and weight normalisation, and L and H
with the small patch convolution and without.

Arguments: variant (B/16, L/16 or H/16), reparam (sigma), norm (none), gamma_init (sigma, as the paper's vision code; one
is the paper's text), base_learning_rate (0.1, times batch / 256), batch_size (4096).

Expected top-1 (Zhai et al., 2023): spectral normalisation, γ fixed at 1, falls to 69.81 % with ViT-B. The paper's other
figures for this recipe are not at hand in a form that can be quoted; weight normalisation is reported to diverge
without pre-LN. From the paper: LARS with momentum 0.9, no warmup, no weight decay, no LayerNorm, patch convolution
started at 0.125 of the usual standard deviation for L and H (H/16 here; the MAE paper's H has patches of 14),
stochastic depth 0.1 (B) and 0.2 (L). This project's choice: base learning rate, batch size, the step at 84 % of the
run, epochs (250, 300, 170 for B, L, H), stochastic depth 0.2 (H), the augmentation, which is DeiT's without repeats and
erasing.
Not run by this project: it has only been built and checked, for want of the data.
"""

from sigmarep.data.images.transforms import imagenet_2012
from sigmarep.errors import BadInput
from sigmarep.models.vit import variant
from sigmarep.sweeps import values, zipped
from sigmarep.training.config import arguments, default_config

# Epochs, stochastic depth and patch gain of each size.
SIZES = {"B": (250.0, 0.1, 1.0), "L": (300.0, 0.2, 0.125), "H": (170.0, 0.2, 0.125)}


def get_config(text=""):
    args = arguments(
        text,
        variant="B/16",
        reparam="sigma",
        norm="none",
        gamma_init="sigma",
        base_learning_rate=0.1,
        batch_size=4096,
    )
    size = args["variant"].split("/")[0]
    if size not in SIZES:
        raise BadInput(f"config argument variant = {args['variant']!r}: this recipe has the sizes {', '.join(SIZES)}")
    config = default_config("image_classification")
    config.batch_size = args["batch_size"]
    config.log_every_steps = 50
    config.eval_every_epochs = 10
    config.checkpoint_every_epochs = 5
    config.compute_dtype = "bfloat16"

    config.model.update(variant(args["variant"]))
    config.total_epochs, config.model.drop_path, config.model.patch_gain = SIZES[size]
    # Without it H needs more than the 16 GiB of a v5e chip at 16 pictures each (scripts/compile_check.py).
    config.model.remat = "full" if size == "H" else "none"
    config.model.reparam = args["reparam"]
    config.model.norm = args["norm"]
    config.model.gamma_init = args["gamma_init"]
    config.model.qkv = "fused"

    config.optimizer.name = "lars"
    config.optimizer.momentum = 0.9
    config.optimizer.learning_rate = args["base_learning_rate"] * args["batch_size"] / 256
    config.optimizer.schedule = "step"
    config.optimizer.step_at = (0.84,)
    config.optimizer.step_factor = 0.1
    config.optimizer.weight_decay = 0.0

    config.label_smoothing = 0.1
    imagenet_2012(config.data)
    return config


def sweep():
    return [
        *values("gamma_init", "sigma", "one"),
        {"reparam": "spectral"},
        *zipped(values("reparam", "weight", "weight"), values("norm", "none", "pre")),
        *values("variant", "L/16", "H/16"),
        *({"variant": size, "config.model.patch_gain": 1.0} for size in ("L/16", "H/16")),
    ]
