"""WikiText-103, word by word, with adaptive input and softmax: σReparam without LayerNorm, or the pre-LN baseline.

    python scripts/train.py --config configs/lm/wikitext103.py:folder=DIR --workdir runs/wikitext103
    python scripts/train.py --config configs/lm/wikitext103.py:folder=DIR,norm=pre,reparam=none --workdir runs/wikitext_pre

DIR holds the raw files wiki.train.tokens, wiki.valid.tokens and wiki.test.tokens.

Arguments: folder, norm (none), reparam (sigma), learning_rate (1.0), steps (286000).

The baseline is the public recipe of Baevski and Auli (2019): 16 blocks, 247 M parameters, Nesterov's momentum, learning
rate 1, cosine after 16,000 steps of warmup, windows of 3,072 tokens; its reference test perplexity is 18.7. Momentum
0.99 and the batch of 24 windows are this recipe's too; one cosine period instead of several, no dropout in the adaptive
softmax, and the baseline's norm after the last block are this project's choices. The paper's σReparam perplexities are
not known here. Not run yet.
"""

from sigmarep.training.config import arguments, default_config


def get_config(text=""):
    args = arguments(text, folder="", norm="none", reparam="sigma", learning_rate=1.0, steps=286_000)
    config = default_config("language_modeling")
    config.batch_size = 24
    config.total_steps = args["steps"]
    config.log_every_steps = 100
    config.eval_every_steps = 10_000
    config.checkpoint_every_steps = 5_000
    config.compute_dtype = "bfloat16"

    model = config.model
    model.depth, model.width, model.num_heads, model.mlp_dim = 16, 1024, 8, 4096
    model.norm, model.reparam = args["norm"], args["reparam"]
    model.activation = "relu"
    model.dropout = 0.3
    model.attention_dropout = model.activation_dropout = 0.1
    model.positions = "sinusoidal"
    model.adaptive_cutoffs = (20_000, 60_000)
    model.logit_chunk = 256
    model.remat = "full"

    config.optimizer.name = "sgd"
    config.optimizer.nesterov = True
    config.optimizer.momentum = 0.99
    config.optimizer.learning_rate = args["learning_rate"]
    config.optimizer.warmup_steps = 16_000
    config.optimizer.clip_norm = 0.1

    data = config.data
    data.name, data.folder = "text_folder", args["folder"]
    data.eval_splits = ("validation", "test")
    data.sequence_length = 3072
    data.packing = "stream"
    # The context of every evaluated word but the first ones is at least 2,560 words, as in the published evaluation.
    data.eval_stride = 512
    data.vocabulary.kind = "word"
    # 267,735 distinct words (with <unk>), the line's end, and four special tokens.
    data.vocabulary.size = 267_744
    return config
