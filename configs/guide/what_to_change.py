"""Switching σReparam on, and what else to change: one change at a time, on small models and real data.

    python scripts/what_to_change.py --workdir runs/what_to_change      # every run, and the tables of docs/switching_on.md
    python scripts/train.py --config configs/guide/what_to_change.py:change=gamma_decays --workdir runs/one

Arguments: change (sigma; one of CHANGES), learning_rate (0.01).

The model is a ViT of four blocks on the digits, post-LN under σReparam with γ₀ = 1; AdamW on a cosine with 20 steps of
warmup, 150 steps of 32 pictures, no weight decay. A change whose name begins with lm_ is one of a language model of two
blocks on Python's help. A change is a few fields of that; QUESTIONS has those that are to be compared.
"""

from sigmarep.sweeps import product, seeds
from sigmarep.training.config import arguments, choice, default_config

PRE_LN = {"model.reparam": "none", "model.norm": "pre"}
NO_NORM = {"model.norm": "none"}
SMALL = {"model.init_std": 0.02}
GAMMA_SIGMA = {"model.gamma_init": "sigma"}
NO_WARMUP = {"optimizer.warmup_steps": 0}
# Of a rate of 0.01 on a cosine of 150 steps this takes 95 % of a parameter that has no gradient.
DECAY = {"optimizer.weight_decay": 4.0}
ALL_BUT_GAMMA = ("bias$", "scale$", "alpha$", "shift$", "position", "class_token")
# Words of the tables, and fields.
CHANGES = {
    "pre_ln": ("plain, pre-LN", PRE_LN),
    "sigma": ("σReparam, post-LN, γ₀ = 1, kernels of 0.1", {}),
    "pre_ln_no_warmup": ("plain, pre-LN, no warmup", PRE_LN | NO_WARMUP),
    "no_warmup": ("σReparam, no warmup", NO_WARMUP),
    "decay": ("σReparam, decay 4, γ left out", DECAY),
    "gamma_decays": ("σReparam, decay 4, of γ too", DECAY | {"optimizer.no_decay": ALL_BUT_GAMMA}),
    "sigma_pre_ln": ("σReparam, pre-LN", {"model.norm": "pre"}),
    "no_norm": ("σReparam, no norms, γ₀ = 1", NO_NORM),
    "plain_no_norm": ("plain, no norms", NO_NORM | {"model.reparam": "none"}),
    "small_kernels": ("σReparam, kernels of 0.02", SMALL),
    "no_norm_gamma_sigma": ("σReparam, no norms, γ₀ = σ(W₀)", NO_NORM | GAMMA_SIGMA),
    "no_norm_gamma_sigma_small": ("the same, kernels of 0.02", NO_NORM | GAMMA_SIGMA | SMALL),
    "averaged": ("σReparam, averaged by 0.98", {"ema_decay": 0.98}),
    "bfloat16": ("σReparam, bfloat16", {"compute_dtype": "bfloat16"}),
    "lm_blocks": ("σReparam in the blocks alone", {}),
    "lm_all": ("σReparam in tables and head too", {"model.reparam_embedding": True}),
}
# Changes whose weights scripts/what_to_change.py and examples/lora.py go on with.
GOES_ON = ("sigma", "averaged")


def _at_one_rate(*changes):
    return [(change, 1e-2) for change in changes]


# The rows of each table: changes and learning rates.
QUESTIONS = {
    "Learning rate": [(change, rate) for change in ("pre_ln", "sigma") for rate in (3e-3, 1e-2, 3e-2)],
    "Weight decay": _at_one_rate("sigma", "decay", "gamma_decays"),
    "Norms": _at_one_rate("sigma", "sigma_pre_ln", "no_norm", "plain_no_norm"),
    "Initial γ and size of kernels": _at_one_rate(
        "sigma", "small_kernels", "no_norm", "no_norm_gamma_sigma", "no_norm_gamma_sigma_small"
    ),
    "Warmup": _at_one_rate("pre_ln", "pre_ln_no_warmup", "sigma", "no_warmup"),
    "Averaged weights": _at_one_rate("sigma", "averaged"),
    "Precision": _at_one_rate("sigma", "bfloat16"),
    "Embeddings and head": _at_one_rate("lm_blocks", "lm_all"),
}


def get_config(text=""):
    args = arguments(text, change="sigma", learning_rate=1e-2)
    _, fields = choice("change", args["change"], CHANGES)
    config = language_model() if args["change"].startswith("lm_") else vit()
    # Every run reaches its end unless its loss is no number: what a change does to it is the question.
    config.divergence_factor = 0.0
    # Every step: the program with the panel is then the only one to compile.
    config.log_every_steps = 1
    # Weights are of use where scripts/what_to_change.py goes on with them.
    config.keep_checkpoints = 2 if args["change"] in GOES_ON else 0
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = args["learning_rate"]
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 20
    config.data.num_threads = 1
    config.update_from_flattened_dict(fields)
    return config


def vit():
    config = default_config("image_classification")
    config.batch_size = 32
    config.total_steps = 150
    model = config.model
    model.depth, model.width, model.num_heads, model.mlp_dim = 4, 48, 4, 96
    model.patch_size = 2
    model.reparam, model.norm, model.init_std = "sigma", "post", 0.1
    config.data.in_memory = True
    config.data.augment.crop = "resized"
    config.data.augment.crop_scale = (0.6, 1.0)
    return config


def language_model():
    config = default_config("language_modeling")
    config.batch_size = 16
    config.total_steps = 150
    model = config.model
    model.depth, model.width, model.num_heads, model.mlp_dim = 2, 48, 4, 96
    model.reparam, model.norm, model.init_std = "sigma", "post", 0.1
    # The head is a layer of its own.
    model.tie_embeddings = False
    config.data.sequence_length = 64
    config.data.vocabulary.size = 1000
    return config


def sweep():
    rows = dict.fromkeys(row for rows in QUESTIONS.values() for row in rows)
    return product([{"change": change, "learning_rate": rate} for change, rate in rows], seeds(3))
