"""The highest stable learning rate against the width: causal language models on a dictionary, by bytes.

    python scripts/train.py --config configs/stability/width.py:arm=sigma,width=64 --workdir runs/one
    python scripts/sweep.py --config configs/stability/width.py --workdir runs/width            # two cores
    python scripts/sweep.py --config configs/stability/width.py:size=gpu --workdir runs/width   # widths to 1,024
    python scripts/stable_rates.py --workdir runs/width --plot width.svg

Arguments: arm (one of sigmarep.remedies.ARMS), width (64), learning_rate (0.003), steps (300), dtype (float32).

Adam for all parameters, one rate for everything, on a cosine without warmup; no weight decay, no dropout, no clipping.
Heads have 32 features and the MLP twice the width, at every width. Kernels start as lecun_normal, so that the plain arms
start alike at every width. Input table and output head are separate, and both are reparametrized in the arms that
reparametrize. The data are those of `gcide`, a package of Debian's that the first run names.

`sweep()` has two forms: widths 32 to 128, float32, three seeds, for two cores; with size=gpu widths 32 to 1,024 and
activations in bfloat16. docs/experiments.md has the question, the definitions and the prediction, written before the runs.
"""

from sigmarep.errors import BadInput
from sigmarep.remedies import set_arm
from sigmarep.sweeps import product, seeds, values
from sigmarep.training.config import arguments, choice, default_config

ARMS = ("pre_ln", "post_ln", "qk_norm", "weight_post_ln", "sigma_only", "sigma", "sigma_pre_ln")
# Five rates a decade would cost more than they tell: the edge between two is interpolated.
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
HEAD = 32
SIZES = {"cpu": ((32, 64, 128), "float32"), "gpu": ((32, 64, 128, 256, 512, 1024), "bfloat16")}


def get_config(text=""):
    args = arguments(text, arm="sigma", width=64, learning_rate=3e-3, steps=300, dtype="float32")
    width = args["width"]
    if width < HEAD or width % HEAD:
        raise BadInput(f"config argument width = {width}: expected a multiple of {HEAD}, the size of a head")
    config = default_config("language_modeling")
    config.batch_size = 16
    config.total_steps = args["steps"]
    config.log_every_steps = 25
    # Every run reaches its end unless its loss is no number: what a raised rate does to it is the question.
    config.divergence_factor = 0.0
    # The weights of some hundred runs, of which the question needs none.
    config.keep_checkpoints = 0
    config.compute_dtype = args["dtype"]

    model = config.model
    model.depth, model.width, model.num_heads, model.mlp_dim = 4, width, width // HEAD, 2 * width
    model.kernel_init = "lecun_normal"
    model.tie_embeddings = False
    # One kernel of attention in all types, under vmap too.
    model.attention_implementation = "xla"

    config.optimizer.name = "adam"
    config.optimizer.learning_rate = args["learning_rate"]

    data = config.data
    data.name = "gcide"
    # 2.6 million bytes, four times as many as a run reads.
    data.train_split = "train[:10%]"
    data.eval_splits = ("test[:8%]",)
    data.sequence_length = 128
    data.packing = "stream"
    data.vocabulary.kind = "byte"
    data.num_threads = 1
    set_arm(config, args["arm"])
    # All matrices or none: a plain table's updates would grow with the width in every arm.
    model.reparam_embedding = model.reparam != "none"
    return config


def sweep(text=""):
    widths, dtype = choice("size", arguments(text, size="cpu")["size"], SIZES)
    return product(
        values("width", *widths),
        values("arm", *ARMS),
        values("dtype", dtype),
        values("learning_rate", *RATES),
        seeds(3),
    )
