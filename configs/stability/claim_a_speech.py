"""A CTC speech Transformer without norms, warmup, weight decay or an adaptive optimizer: who trains?

    python scripts/train.py --config configs/stability/claim_a_speech.py:arm=sigma_only,optimizer=lars --workdir runs/one
    python scripts/sweep.py --config configs/stability/claim_a_speech.py --workdir runs/claim_a_speech
    python scripts/best_rates.py --workdir runs/claim_a_speech --metric eval/test/cer

Arguments: arm (one of sigmarep.remedies.ARMS), optimizer (lars or sgd), learning_rate (1.0), steps (600).

Claim (a) of the paper on its second kind of data, beside configs/stability/claim_a.py: three blocks of width 64 on the
packaged synthesised speech, momentum 0.9, a cosine, no clipping, no dropout. Kernels start at spectral norms near 1, and
as W₀ in all arms but `spectral_only`; the paper's own speech model starts with γ = 1. Under LARS the trust ratio is that
of kernels alone, but in `sigma_only_trust`.

`sweep()` has both optimizers, five rates a factor of √10 apart, and three seeds. docs/experiments.md has the definitions
and the prediction.
"""

from sigmarep.remedies import set_arm
from sigmarep.sweeps import product, seeds, values
from sigmarep.training.config import arguments, choice, default_config

ARMS = ("no_norm", "weight_only", "spectral_only", "sigma_only")
RATES = {"lars": (0.1, 0.316, 1.0, 3.16, 10.0), "sgd": (0.00316, 0.01, 0.0316, 0.1, 0.316)}


def get_config(text=""):
    args = arguments(text, arm="sigma_only", optimizer="lars", learning_rate=1.0, steps=600)
    config = default_config("speech_recognition")
    # Seconds: 16 utterances of two, or 8 of 4.1.
    config.batch_size = 33
    config.total_steps = args["steps"]
    config.log_every_steps = 25
    # Every run reaches its end unless its loss is no number: what a rate does to it is the question.
    config.divergence_factor = 0.0
    # The weights of some hundred runs, of which the question needs none.
    config.keep_checkpoints = 0

    model = config.model
    model.depth, model.width, model.num_heads, model.mlp_dim = 3, 64, 4, 128
    model.kernel_init, model.init_std = "normal", 0.02 * (768 / 64) ** 0.5
    # Ŵ₀ = W₀.
    model.gamma_init = "sigma"
    model.max_global_shift = 0.0

    choice("optimizer", args["optimizer"], RATES)
    config.optimizer.name = args["optimizer"]
    config.optimizer.momentum = 0.9
    config.optimizer.learning_rate = args["learning_rate"]

    config.data.buckets = (2.0, 4.1)
    config.data.in_memory = True
    config.data.num_threads = 1
    set_arm(config, args["arm"])
    return config


def sweep():
    points = []
    for optimizer, rates in RATES.items():
        arms = (*ARMS, "sigma_only_trust") if optimizer == "lars" else ARMS
        points += product(
            values("optimizer", optimizer), values("arm", *arms), values("learning_rate", *rates), seeds(3)
        )
    return points
