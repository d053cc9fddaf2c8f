"""A speech Transformer of 36 narrow post-LN blocks without warmup, on the packaged synthesised speech: who still trains?

    python scripts/train.py --config configs/asr/deep.py:arm=sigma --workdir runs/deep_asr_sigma
    python scripts/train.py --config configs/asr/deep.py:arm=plain --workdir runs/deep_asr_plain
    python scripts/deep_speech.py --workdir runs/deep_asr      # all, three seeds, and the tables of docs/results.md

Arguments: arm (sigma: post-LN with σReparam, γ of the blocks starting at 0.1; sigma_one: γ starting at 1; plain: post-LN
without it, the plain layers of the paper's code), depth (36), steps (300), learning_rate (0.004), warmup (0).
Everything else is the same in all arms, but for the kernels' initial scale, which σReparam does not see.
"""

from sigmarep.sweeps import product, seeds, values
from sigmarep.training.config import arguments, choice, default_config

# Reparametrisation, γ at the start, and the initialiser of the kernels.
ARMS = {
    "sigma": ("sigma", "0.1", "normal"),
    "sigma_one": ("sigma", "one", "normal"),
    "plain": ("none", "one", "fan_in_uniform"),
}


def get_config(text=""):
    args = arguments(text, arm="sigma", depth=36, steps=300, learning_rate=4e-3, warmup=0)
    config = default_config("speech_recognition")
    config.batch_size = 33
    config.total_steps = args["steps"]
    config.log_every_steps = 10

    config.model.depth, config.model.width, config.model.num_heads, config.model.mlp_dim = args["depth"], 48, 2, 96
    config.model.norm = "post"
    config.model.reparam, config.model.gamma_init, config.model.kernel_init = choice("arm", args["arm"], ARMS)
    config.model.max_global_shift = 0.0

    config.optimizer.name = "adam"
    config.optimizer.learning_rate = args["learning_rate"]
    config.optimizer.beta2 = 0.98
    config.optimizer.warmup_steps = args["warmup"]

    config.decoding.beam_size = 16
    config.decoding.language_model = "ngram"
    config.decoding.insertion_bonus = 2.0

    config.data.buckets = (2.0, 4.1)
    config.data.in_memory = True
    config.divergence_factor = 0.0
    return config


def sweep():
    return product(values("arm", *ARMS), seeds(3))
