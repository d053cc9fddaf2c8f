"""At which learning rates does a small translation model still train? On English and German strings of programs.

    python scripts/train.py --config configs/stability/translation.py:arm=sigma,learning_rate=0.03 --workdir runs/one
    python scripts/sweep.py --config configs/stability/translation.py --workdir runs/stability_translation

Arguments: arm (one of sigmarep.remedies.ARMS), learning_rate (0.01), steps (300).
Everything else is the same in all arms. sweep() has the arms of SWEPT at six learning rates over two and a half decades,
each with three seeds.
"""

from sigmarep.remedies import RATES, SWEPT, set_arm
from sigmarep.sweeps import product, seeds, values
from sigmarep.training.config import arguments, default_config


def get_config(text=""):
    args = arguments(text, arm="sigma", learning_rate=1e-2, steps=300)
    config = default_config("translation")
    config.batch_size = 512
    config.total_steps = args["steps"]
    # Every step: the program with the panel is then the only one to compile.
    config.log_every_steps = 1
    # Every run reaches its end unless its loss is no number: what a raised rate does to it is the question.
    config.divergence_factor = 0.0

    config.model.depth, config.model.width, config.model.num_heads, config.model.mlp_dim = 2, 64, 4, 128
    config.model.init_std = 0.1
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = args["learning_rate"]
    # What is no matrix of a block: one rate in all arms, whatever the matrices' is.
    config.optimizer.non_matrix_learning_rate = 0.01
    config.optimizer.warmup_steps = 10

    config.data.max_source_length = config.data.max_target_length = 16
    # One shape: one program to compile.
    config.data.buckets = (16,)
    config.data.vocabulary.size = 1000
    # The question is the training loss: nothing is translated.
    config.data.eval_splits = ()
    set_arm(config, args["arm"])
    return config


def sweep():
    return product(values("arm", *SWEPT), values("learning_rate", *RATES), seeds(3))
