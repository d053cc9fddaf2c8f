"""A σReparam translation model, English to German, on strings of program interfaces that packages bring.

    python scripts/train.py --config configs/mt/quickstart.py --workdir runs/mt

Prints BLEU on held-out strings, and beside it that of copying the source and of the most similar string's translation.

Arguments: reparam (sigma), norm (post).
"""

from sigmarep.training.config import arguments, default_config


def get_config(text=""):
    args = arguments(text, reparam="sigma", norm="post")
    config = default_config("translation")
    config.batch_size = 2048
    config.total_steps = 700
    config.log_every_steps = 50
    config.checkpoint_every_steps = 350
    config.baselines = True

    config.model.depth, config.model.width, config.model.num_heads, config.model.mlp_dim = 2, 128, 4, 512
    config.model.reparam, config.model.norm = args["reparam"], args["norm"]
    config.model.init_std = 0.1
    config.model.dropout = 0.1

    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 6e-3
    config.optimizer.beta2 = 0.98
    config.optimizer.warmup_steps = 100

    config.data.max_source_length = config.data.max_target_length = 32
    config.data.buckets = (8, 16, 32)
    config.data.vocabulary.size = 4000
    return config
