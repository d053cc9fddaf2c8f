"""A ViT on Fashion-MNIST without norms, warmup, weight decay or an adaptive optimizer: who trains?

    python scripts/train.py --config configs/stability/claim_a.py:arm=sigma_only,optimizer=lars --workdir runs/one
    python scripts/sweep.py --config configs/stability/claim_a.py --workdir runs/claim_a            # two cores
    python scripts/sweep.py --config configs/stability/claim_a.py:size=gpu --workdir runs/claim_a   # one GPU
    python scripts/best_rates.py --workdir runs/claim_a --metric eval/test/accuracy

Arguments: arm (one of sigmarep.remedies.ARMS), optimizer (lars or sgd), learning_rate (1.0), width (48), depth (4),
patch_size (4), batch_size (32), epochs (1), share (10, per cent of the training pictures), test_share (20, of the test
pictures), dtype (float32).

Claim (a) of the paper: σReparam alone trains a ViT by LARS or SGD with momentum. Data and model are those of
configs/stability/robustness.py; momentum 0.9, a cosine, no clipping. Kernels start at spectral norms near 1, those of ViT-B
started with 0.02: a width of 48 started with 0.02 has norms of a quarter. They start as W₀ in all arms
but `spectral_only`, whose kernels start at 1 exactly.

Under LARS the trust ratio is that of kernels. γ, biases, positions and the class token have none, and move by the raw
gradient at the full rate; `sigma_only_trust` is σReparam with the ratio for γ too, which differs under LARS alone.

`sweep()` has two forms, each with both optimizers, five rates a factor of √10 apart, and three seeds: for two cores width
48, depth 4, patches of 4 x 4 (50 tokens: 197 would leave few steps in the same time), batch 32, one epoch of a tenth of
the pictures (188 steps), tested on 2,000; with size=gpu ViT-Ti (width 192, depth 12), patches of 2 x 2, batch 512, two
epochs of all, bfloat16. docs/experiments.md has the definitions and the prediction.
"""

from sigmarep.remedies import set_arm
from sigmarep.sweeps import product, seeds, values
from sigmarep.training.config import arguments, choice, default_config

ARMS = ("no_norm", "weight_only", "spectral_only", "sigma_only")
RATES = {"lars": (0.1, 0.316, 1.0, 3.16, 10.0), "sgd": (0.01, 0.0316, 0.1, 0.316, 1.0)}
HEADS = {48: 3, 192: 3}
# Points that all runs of a form share.
SIZES = {
    "cpu": {
        "width": 48,
        "depth": 4,
        "patch_size": 4,
        "batch_size": 32,
        "epochs": 1.0,
        "share": 10,
        "test_share": 20,
        "dtype": "float32",
    },
    "gpu": {
        "width": 192,
        "depth": 12,
        "patch_size": 2,
        "batch_size": 512,
        "epochs": 2.0,
        "share": 100,
        "test_share": 100,
        "dtype": "bfloat16",
    },
}


def get_config(text=""):
    args = arguments(
        text,
        arm="sigma_only",
        optimizer="lars",
        learning_rate=1.0,
        width=48,
        depth=4,
        patch_size=4,
        batch_size=32,
        epochs=1.0,
        share=10,
        test_share=20,
        dtype="float32",
    )
    config = default_config("image_classification")
    config.batch_size = args["batch_size"]
    config.total_epochs = args["epochs"]
    config.log_every_steps = 25
    # Every run reaches its end unless its loss is no number: what a rate does to it is the question.
    config.divergence_factor = 0.0
    # The weights of some hundred runs, of which the question needs none.
    config.keep_checkpoints = 0
    config.compute_dtype = args["dtype"]

    model = config.model
    model.depth, model.width, model.mlp_dim = args["depth"], args["width"], 4 * args["width"]
    model.num_heads = choice("width", args["width"], HEADS)
    model.patch_size = args["patch_size"]
    # Spectral norms of the start as the paper's 0.02 gives them at width 768, about 1 in every width.
    model.init_std = 0.02 * (768 / args["width"]) ** 0.5
    # Ŵ₀ = W₀, as in the paper's vision code.
    model.gamma_init = "sigma"
    # One kernel of attention in all types, under vmap too; what it keeps of 197 x 197 tokens of several runs fills a card.
    model.attention_implementation = "xla"
    model.remat = "none" if args["depth"] < 12 else "full"

    choice("optimizer", args["optimizer"], RATES)
    config.optimizer.name = args["optimizer"]
    config.optimizer.momentum = 0.9
    config.optimizer.learning_rate = args["learning_rate"]

    data = config.data
    data.name = "fashion_mnist_package"
    data.train_split = f"train[:{args['share']}%]"
    data.eval_splits = (f"test[:{args['test_share']}%]",)
    data.image_size = 28
    data.mean, data.std = (0.286,), (0.353,)
    data.in_memory = True
    data.num_threads = 4
    data.augment.crop, data.augment.pad, data.augment.flip = "pad", 2, True
    set_arm(config, args["arm"])
    return config


def sweep(text=""):
    common = choice("size", arguments(text, size="cpu")["size"], SIZES)
    points = []
    for optimizer, rates in RATES.items():
        arms = (*ARMS, "sigma_only_trust") if optimizer == "lars" else ARMS
        points += product(
            values("optimizer", optimizer), values("arm", *arms), values("learning_rate", *rates), [common], seeds(3)
        )
    return points
