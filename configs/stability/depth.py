"""Encoder-decoders of 36 + 36 and of 100 + 100 blocks: σReparam beside the remedies for depth, by held-out loss.

    python scripts/train.py --config configs/stability/depth.py:arm=deepnorm,depth=36 --workdir runs/one
    python scripts/sweep.py --config configs/stability/depth.py --workdir runs/depth             # two cores
    python scripts/sweep.py --config configs/stability/depth.py:size=gpu --workdir runs/depth    # one GPU
    python scripts/best_rates.py --workdir runs/depth --metric eval/test/loss

Arguments: arm (sigma, plain, rezero, layer_scale or deepnorm), depth (100; of the encoder and of the decoder),
learning_rate (0.003), steps (200), width (32), batch_size (512, tokens).

The recipe is that of configs/mt/deep.py: packaged interface strings, narrow blocks without biases, Adam. The arms:
`sigma`, post-LN with σReparam and γ starting at 0.1; `plain`, post-LN with kernels of standard deviation 0.007; `rezero`,
without norms, as its paper has it; `layer_scale`, with pre-LN, branches starting at 10⁻⁴; `deepnorm`, with its α and β for
these depths. All kernels but those of `plain` start as xavier_uniform. Translations are cut after one token, because the
question is the loss.

`sweep()` has two forms, each with both depths, all arms, three rates and three seeds: width 32 and 512 tokens for two
cores; with size=gpu width 256 and 8,192 tokens. docs/experiments.md has the definitions and the prediction.
"""

from sigmarep.sweeps import product, seeds, values
from sigmarep.training.config import arguments, choice, default_config

ARMS = {
    "sigma": {"norm": "post", "reparam": "sigma", "gamma_init": "0.1"},
    "plain": {"norm": "post", "kernel_init": "normal", "init_std": 0.007},
    "rezero": {"norm": "none", "branch_scale": "rezero"},
    "layer_scale": {"norm": "pre", "branch_scale": "layer_scale"},
    "deepnorm": {"norm": "deepnorm"},
}
DEPTHS = (36, 100)
RATES = (1e-3, 3e-3, 1e-2)
SIZES = {"cpu": {"width": 32, "batch_size": 512}, "gpu": {"width": 256, "batch_size": 8192}}
HEAD = 16


def get_config(text=""):
    args = arguments(text, arm="sigma", depth=100, learning_rate=3e-3, steps=200, width=32, batch_size=512)
    config = default_config("translation")
    config.batch_size = args["batch_size"]
    config.total_steps = args["steps"]
    config.log_every_steps = 10
    # Every run reaches its end unless its loss is no number.
    config.divergence_factor = 0.0
    # The weights of some hundred runs, of which the question needs none.
    config.keep_checkpoints = 0

    model = config.model
    model.depth, model.width, model.mlp_dim = args["depth"], args["width"], 4 * args["width"]
    model.num_heads = args["width"] // HEAD
    model.use_bias = model.norm_bias = False
    model.kernel_init = "xavier_uniform"
    model.update(choice("arm", args["arm"], ARMS))

    config.optimizer.name = "adam"
    config.optimizer.learning_rate = args["learning_rate"]
    config.optimizer.beta2 = 0.98
    config.optimizer.warmup_steps = 20
    config.optimizer.schedule = "constant"

    config.data.max_source_length = config.data.max_target_length = 16
    config.data.buckets = (16,)
    config.data.vocabulary.size = 2000
    config.data.eval_splits = ("test",)
    config.decoding.beam_size, config.decoding.length_factor, config.decoding.length_extra = 1, 0.0, 1
    return config


def sweep(text=""):
    common = choice("size", arguments(text, size="cpu")["size"], SIZES)
    return product(values("depth", *DEPTHS), values("arm", *ARMS), values("learning_rate", *RATES), [common], seeds(3))
