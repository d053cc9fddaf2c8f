"""WMT'17 English to German, from 6 to 100 blocks in the encoder and as many in the decoder (the paper's section 4.3).

    pip install "sigmarep[tf]" && python scripts/prepare_data.py --name wmt17_translate/de-en
    python scripts/train.py --config configs/mt/wmt17_en_de.py:depth=100 --workdir runs/wmt17_100
    python scripts/train.py --config configs/mt/wmt17_en_de.py:depth=18,norm=post,reparam=none --workdir runs/wmt17_post

Arguments: depth (6, 18, 50, 100), norm (none, pre, post, deepnorm), reparam (sigma or none), learning_rate (0.001),
steps (100000).

The paper's arms are norm=pre, post or deepnorm with reparam=none, and norm=none, post or deepnorm with reparam=sigma,
trained on 524,288 tokens an update with newstest2016 for validation and newstest2017 for testing. The rest follows the
public DeepNet recipe (Adam 0.9/0.98, inverse square root, 4,000 steps of warmup, label smoothing 0.1, dropout 0.4, weight
decay 1e-4, beam 4, length penalty 0.6), from memory; the learning rate is this project's choice. The paper's BLEU figures
are not known here. Not run yet.
"""

from sigmarep.sweeps import product, seeds, values, zipped
from sigmarep.training.config import arguments, default_config


def get_config(text=""):
    args = arguments(text, depth=6, norm="post", reparam="sigma", learning_rate=1e-3, steps=100_000)
    config = default_config("translation")
    config.batch_size = 524_288
    config.total_steps = args["steps"]
    config.log_every_steps = 100
    config.eval_every_steps = 10_000
    config.checkpoint_every_steps = 2_000
    # As many as are averaged by `evaluate.py --average 10`.
    config.keep_checkpoints = 10
    config.compute_dtype = "bfloat16"

    model = config.model
    # As the paper: attention and σ in float32, the rest in half precision.
    model.attention_float32 = True
    model.depth, model.width, model.num_heads, model.mlp_dim = args["depth"], 512, 8, 2048
    model.norm, model.reparam = args["norm"], args["reparam"]
    model.activation = "relu"
    model.dropout, model.activation_dropout = 0.4, 0.0
    # N blocks keep their inputs alone, and go through them once more on the way back.
    model.remat = "full" if args["depth"] >= 50 else "none"

    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = args["learning_rate"]
    config.optimizer.beta2 = 0.98
    config.optimizer.schedule = "rsqrt"
    config.optimizer.warmup_steps = 4_000
    config.optimizer.weight_decay = 1e-4

    data = config.data
    data.name = "wmt17_translate/de-en"
    data.eval_splits = ("validation", "test")
    data.max_source_length = data.max_target_length = 256
    data.buckets = (32, 64, 128, 256)
    data.rows_multiple = 64
    data.num_threads = 8
    data.vocabulary.size = 32_000
    data.vocabulary.model = "bpe"
    return config


def sweep():
    """The paper's arms at four depths, three seeds."""
    arms = zipped(
        values("norm", "pre", "post", "deepnorm", "none", "post", "deepnorm"),
        values("reparam", *["none"] * 3, *["sigma"] * 3),
    )
    return product(arms, values("depth", 6, 18, 50, 100), seeds(3))
