"""LibriSpeech's 960 hours, the paper's 36-block speech model; the arms of `librispeech_100h.py`.

    pip install "sigmarep[tf]" && python scripts/prepare_data.py --name librispeech
    python scripts/train.py --config configs/asr/librispeech_960h.py --workdir runs/ls960

Arguments: norm (post, pre, none), reparam (sigma or none), optimizer (lars or adagrad), learning_rate (0: the optimizer's).

With ten times the speech the rates of dropout and layer drop are 0.1 (from memory of the paper's recipe). The paper's
error rates are not known here. Not run yet.
"""

import os

from sigmarep import command
from sigmarep.sweeps import product, values
from sigmarep.training.config import arguments

BASE = os.path.join(os.path.dirname(__file__), "librispeech_100h.py")


def get_config(text=""):
    args = arguments(text, norm="post", reparam="sigma", optimizer="lars", learning_rate=0.0)
    config = command.load_config_file(BASE).get_config(",".join(f"{name}={value}" for name, value in args.items()))
    config.model.dropout = config.model.attention_dropout = config.model.layer_drop = 0.1
    config.data.train_split = "train_clean100+train_clean360+train_other500"
    config.total_steps = 800_000
    return config


def sweep():
    return product(
        values("norm", "post", "pre", "none"),
        values("reparam", "none", "sigma"),
        values("optimizer", "adagrad", "lars"),
    )
