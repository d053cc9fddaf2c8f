"""At which learning rates does a small ViT still train? One arm for each remedy, on the digits.

    python scripts/train.py --config configs/stability/vit.py:arm=sigma,learning_rate=0.03 --workdir runs/one
    python scripts/sweep.py --config configs/stability/vit.py --workdir runs/stability_vit      # four arms, three seeds
    python scripts/sweep.py --config configs/stability/vit.py:arm=sigma --workdir runs/search --search optuna --trials 30

Arguments: arm (one of sigmarep.remedies.ARMS), learning_rate (0.01), steps (150).
Everything else is the same in all arms. The learning rate is that of the blocks' matrices, which Muon trains; Adam trains
all else at 0.01. sweep() has the arms of SWEPT at six learning rates over two and a half decades; search() looks for the
best rate and weight decay of one arm between these rates.
"""

from sigmarep.remedies import RATES, SWEPT, set_arm
from sigmarep.searches import Search
from sigmarep.sweeps import product, seeds, values
from sigmarep.training.config import arguments, default_config


def get_config(text=""):
    args = arguments(text, arm="sigma", learning_rate=1e-2, steps=150)
    config = default_config("image_classification")
    config.batch_size = 64
    config.total_steps = args["steps"]
    # Every step: the program with the panel is then the only one to compile.
    config.log_every_steps = 1
    # Every run reaches its end unless its loss is no number: what a raised rate does to it is the question.
    config.divergence_factor = 0.0

    config.label_smoothing = 0.1
    config.model.depth, config.model.init_std = 4, 0.1
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = args["learning_rate"]
    # What is no matrix of a block: one rate in all arms, whatever the matrices' is.
    config.optimizer.non_matrix_learning_rate = 0.01
    config.optimizer.warmup_steps = 10

    config.data.in_memory = True
    config.data.num_threads = 1
    config.data.augment.crop = "resized"
    config.data.augment.crop_scale = (0.6, 1.0)
    set_arm(config, args["arm"])
    return config


def sweep():
    return product(values("arm", *SWEPT), values("learning_rate", *RATES), seeds(3))


def search(text=""):
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    space = {
        "arm": CategoricalDistribution([arguments(text, arm="sigma")["arm"]]),
        "learning_rate": FloatDistribution(min(RATES), max(RATES), log=True),
        "config.optimizer.weight_decay": CategoricalDistribution([0.0, 0.01, 0.1]),
        # Between the steps at which a run may be ended early.
        "config.eval_every_steps": CategoricalDistribution([50]),
    }
    return Search(space, metric="eval/test/accuracy", direction="maximize")
