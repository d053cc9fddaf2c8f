"""The paper's robustness grid in small: a ViT on Fashion-MNIST, by batch, rate and warmup.

    python scripts/train.py --config configs/stability/robustness.py:arm=sigma_only --workdir runs/one
    python scripts/sweep.py --config configs/stability/robustness.py --workdir runs/robustness           # two cores
    python scripts/sweep.py --config configs/stability/robustness.py:size=gpu --workdir runs/robustness  # one GPU
    python scripts/robustness.py --workdir runs/robustness

Arguments: arm (one of sigmarep.remedies.ARMS), width (48), depth (4), patch_size (2), init_std (0.02), batch_size (64),
base_learning_rate (0.001, times batch / 512), warmup_epochs (0), epochs (1), share (100, per cent of the training
pictures), dtype (float32).

Patches of 2 x 2 make 197 tokens of a picture of 28 x 28, as many as ImageNet's at 224. AdamW with weight decay 0.05 on a
cosine, as DeiT's; pad-and-crop and flips are the only augmentation. The data are those of `fashion_mnist_package`, a
package of Debian's that the first run names.

`sweep()` has three forms of five arms, two batches, two base rates, and warmup or none. For two cores width 48, depth 4 and
patches of 7 x 7, batches 64 and 256, base rates 0.128 and 0.512, one epoch, of which warmup is half, three seeds; kernels
start with a standard deviation of 0.08, which to width 48 is what 0.02 is to 768. With size=gpu ViT-Ti (width 192, depth
12, 3 heads), batches 512 and 2,048, base rates 0.001 and 0.004, two epochs, of which warmup is one, bfloat16, three seeds;
with size=gpu_s the same of ViT-S (width 384, 6 heads) with one seed. docs/experiments.md has the definitions and the
prediction.
"""

from sigmarep.remedies import set_arm
from sigmarep.sweeps import product, seeds, values
from sigmarep.training.config import arguments, choice, default_config

ARMS = ("pre_ln", "post_ln", "qk_norm", "sigma_only", "sigma_pre_ln")
HEADS = {48: 3, 192: 3, 384: 6}
# Points that all runs of a form share, its batches, its base rates, its epochs of warmup, and its seeds.
SMALL = {"width": 48, "depth": 4, "patch_size": 7, "init_std": 0.08, "epochs": 1.0, "dtype": "float32"}
LARGE = {"depth": 12, "epochs": 2.0, "dtype": "bfloat16"}
SIZES = {
    "cpu": (SMALL, (64, 256), (0.128, 0.512), (0.0, 0.5), 3),
    "gpu": ({"width": 192, **LARGE}, (512, 2048), (0.001, 0.004), (0.0, 1.0), 3),
    "gpu_s": ({"width": 384, **LARGE}, (512, 2048), (0.001, 0.004), (0.0, 1.0), 1),
}


def get_config(text=""):
    args = arguments(
        text,
        arm="sigma_only",
        width=48,
        depth=4,
        patch_size=2,
        init_std=0.02,
        batch_size=64,
        base_learning_rate=1e-3,
        warmup_epochs=0.0,
        epochs=1.0,
        share=100,
        dtype="float32",
    )
    config = default_config("image_classification")
    config.batch_size = args["batch_size"]
    config.total_epochs = args["epochs"]
    config.log_every_steps = 25
    # Every run reaches its end unless its loss is no number: what a setting does to it is the question.
    config.divergence_factor = 0.0
    # The weights of some hundred runs, of which the question needs none.
    config.keep_checkpoints = 0
    config.compute_dtype = args["dtype"]

    model = config.model
    model.depth, model.width, model.mlp_dim = args["depth"], args["width"], 4 * args["width"]
    model.num_heads = choice("width", args["width"], HEADS)
    model.patch_size, model.init_std = args["patch_size"], args["init_std"]
    # Ŵ₀ = W₀, as in the paper's vision code.
    model.gamma_init = "sigma"
    # One kernel of attention in all types, under vmap too; what it keeps of 197 x 197 tokens of several runs fills a card.
    model.attention_implementation = "xla"
    model.remat = "none" if args["depth"] < 12 else "full"

    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = args["base_learning_rate"] * args["batch_size"] / 512
    config.optimizer.warmup_epochs = args["warmup_epochs"]
    config.optimizer.weight_decay = 0.05

    data = config.data
    data.name = "fashion_mnist_package"
    data.train_split = f"train[:{args['share']}%]"
    data.image_size = 28
    data.mean, data.std = (0.286,), (0.353,)
    data.in_memory = True
    data.num_threads = 4
    data.augment.crop, data.augment.pad, data.augment.flip = "pad", 2, True
    set_arm(config, args["arm"])
    return config


def sweep(text=""):
    common, batches, rates, warmups, count = choice("size", arguments(text, size="cpu")["size"], SIZES)
    return product(
        values("arm", *ARMS),
        values("batch_size", *batches),
        values("warmup_epochs", *warmups),
        values("base_learning_rate", *rates),
        [common],
        seeds(count),
    )
