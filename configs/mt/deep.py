"""Encoder-decoders of up to 100 + 100 blocks, narrow, on the packaged interface strings: who still trains?

    python scripts/train.py --config configs/mt/deep.py:arm=sigma --workdir runs/deep_sigma
    python scripts/train.py --config configs/mt/deep.py:arm=plain --workdir runs/deep_plain
    python scripts/deep_translation.py --workdir runs/deep      # all, three seeds, and the tables of docs/results.md

Arguments: arm (sigma: post-LN with σReparam, γ starting at 0.1; sigma_one: γ starting at 1; plain: post-LN without it),
depth (100; of the encoder and of the decoder), steps (200).
Everything else is the same in all arms. Layers have no biases: with them, in a trial at a learning rate of 0.005, no arm
learnt more than the frequencies of tokens in 140 steps.
"""

from sigmarep.sweeps import product, seeds, values
from sigmarep.training.config import arguments, choice, default_config

# Reparametrisation, and γ at the start.
ARMS = {"sigma": ("sigma", "0.1"), "sigma_one": ("sigma", "one"), "plain": ("none", "one")}


def get_config(text=""):
    args = arguments(text, arm="sigma", depth=100, steps=200)
    config = default_config("translation")
    config.batch_size = 512
    config.total_steps = args["steps"]
    config.log_every_steps = 5

    config.model.depth, config.model.width, config.model.num_heads, config.model.mlp_dim = args["depth"], 32, 2, 128
    config.model.norm = "post"
    config.model.reparam, config.model.gamma_init = choice("arm", args["arm"], ARMS)
    config.model.use_bias = config.model.norm_bias = False
    config.model.kernel_init = "xavier_uniform"

    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 3e-3
    config.optimizer.beta2 = 0.98
    config.optimizer.warmup_steps = 20
    config.optimizer.schedule = "constant"

    config.data.max_source_length = config.data.max_target_length = 16
    config.data.buckets = (16,)
    config.data.vocabulary.size = 2000
    config.data.eval_splits = ()
    return config


def sweep():
    return product(values("arm", *ARMS), seeds(3))
