"""A σReparam language model on the reference prose of Python's own help: text that every machine with Python has.

    python scripts/train.py --config configs/lm/quickstart.py --workdir runs/lm
    python scripts/generate.py --workdir runs/lm --prompt "The for statement"

Prints the perplexity of held-out topics, and beside it what a unigram model and gzip make of the same text.

Arguments: reparam (sigma), norm (post).
"""

from sigmarep.training.config import arguments, default_config


def get_config(text=""):
    args = arguments(text, reparam="sigma", norm="post")
    config = default_config("language_modeling")
    config.batch_size = 16
    config.total_steps = 700
    config.log_every_steps = 25
    config.eval_every_steps = 350
    config.checkpoint_every_steps = 350
    config.baselines = True

    config.model.depth, config.model.width, config.model.num_heads, config.model.mlp_dim = 4, 128, 4, 512
    config.model.reparam, config.model.norm = args["reparam"], args["norm"]
    config.model.init_std = 0.1
    config.model.dropout = 0.1

    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 50

    config.data.sequence_length = 128
    config.data.vocabulary.size = 2000
    return config
