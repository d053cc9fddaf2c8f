"""A decoder as they are built today: RMSNorm, rotary positions, grouped queries, SwiGLU, no biases, an untied head.

    python scripts/train.py --config configs/lm/decoder.py --workdir runs/decoder                       # σ, two cores
    python scripts/train.py --config configs/lm/decoder.py:arm=pre_ln,optimizer=muon --workdir runs/decoder_muon
    python scripts/train.py --config configs/lm/decoder.py:size=full,folder=DIR --workdir runs/decoder_full
    python scripts/sweep.py --config configs/lm/decoder.py --workdir runs/decoders       # 2 arms, 2 optimizers, 3 rates

Arguments: size (small; full), arm (one of sigmarep.remedies.ARMS: sigma), optimizer (adamw; muon), learning_rate (0.003,
or 0.0003 at the full size), qk_norm (false; true puts RMSNorm on queries and keys), folder (of texts, for the full size).

The small one reads the reference prose of Python's own help, as quickstart.py does, half an hour on two busy cores. The
full one has 24 blocks of width 2,048, 1.2 billion parameters, sharded over eight devices (`config.mesh.fsdp`), and reads
26 billion tokens in batches of half a million; its sizes and rates are what such models commonly have, no one's recipe.
Muon's updates are of the size of Adam's, so that one learning rate serves both. Not run yet at the full size.
"""

from sigmarep.remedies import set_arm
from sigmarep.sweeps import product, seeds, values
from sigmarep.training.config import arguments, choice, default_config

# Blocks, width, heads, heads of keys and values, hidden units of the MLP.
SIZES = {"small": (4, 128, 4, 2, 344), "full": (24, 2048, 16, 4, 5632)}
RATES = {"small": (1e-3, 3e-3, 1e-2), "full": (1e-4, 3e-4, 1e-3)}
OPTIMIZERS = {name: name for name in ("adamw", "muon")}


def get_config(text=""):
    args = arguments(text, size="small", arm="sigma", optimizer="adamw", learning_rate=0.0, qk_norm=False, folder="")
    config = default_config("language_modeling")
    model = config.model
    sizes = choice("size", args["size"], SIZES)
    model.depth, model.width, model.num_heads, model.num_kv_heads, model.mlp_dim = sizes
    set_arm(config, args["arm"])
    model.norm_type, model.activation, model.mlp_gate, model.use_bias = "rms", "silu", True, False
    model.tie_embeddings = False
    if args["qk_norm"]:
        model.qk_norm = "rms"

    optimizer = config.optimizer
    optimizer.name = choice("optimizer", args["optimizer"], OPTIMIZERS)
    optimizer.learning_rate = args["learning_rate"] or RATES[args["size"]][1]
    optimizer.beta2, optimizer.momentum, optimizer.weight_decay = 0.95, 0.95, 0.1
    optimizer.schedule, optimizer.end_factor, optimizer.clip_norm = "cosine", 0.1, 1.0
    if args["size"] == "full":
        _full(config, args["folder"])
    else:
        _small(config)
    return config


def _small(config):
    config.batch_size, config.total_steps = 16, 300
    config.log_every_steps, config.eval_every_steps = 10, 100
    config.model.init_std = 0.1
    config.optimizer.warmup_steps = 30
    config.data.sequence_length = 128
    config.data.vocabulary.size = 2000


def _full(config, folder):
    config.batch_size, config.total_steps = 256, 50_000
    config.log_every_steps, config.eval_every_steps, config.checkpoint_every_steps = 100, 5_000, 2_500
    config.compute_dtype = "bfloat16"
    config.model.remat = "dots"
    config.model.logit_chunk = 256
    # The state alone is 13.6 GiB.
    config.mesh.fsdp = 8
    config.optimizer.warmup_steps = 2_000
    data = config.data
    data.name, data.folder = "text_folder", folder
    data.packing = "stream"
    data.sequence_length = 2048
    data.vocabulary.size = 32_000


def sweep(text=""):
    args = arguments(text, size="small", folder="")
    rates = choice("size", args["size"], RATES)
    return product(
        values("arm", "pre_ln", "sigma"),
        values("optimizer", *OPTIMIZERS),
        values("learning_rate", *rates),
        [{name: value for name, value in args.items() if value}],
        seeds(3),
    )
