"""Fashion-MNIST from scratch on a laptop: the small ViT of a public PyTorch tutorial, to compare a plain baseline with.

    python scripts/train.py --config configs/vit/fashion_mnist.py:epochs=20 --workdir runs/fashion_mnist
    python scripts/train.py --config configs/vit/fashion_mnist.py:epochs=20,arm=sigma_pre_ln --workdir runs/fashion_sigma

Arguments: arm (pre_ln; one of sigmarep.remedies.ARMS), epochs (200), learning_rate (0.0005).

Model and recipe are those of github.com/s-chh/PyTorch-Scratch-Vision-Transformer-ViT at commit 026c5be, whose README of
commit 01a7c83 reports 92.3 % after 200 epochs: patches of 4 x 4, width 64, six pre-LN blocks of four heads, MLP of
twice the width, kernels of standard deviation 0.02, dropout 0.1, AdamW with weight decay 0.001, batch 128, warmup for a
twentieth of the epochs and a cosine to a fiftieth of the rate, pad-and-crop by two pixels and flips.

Deviations: the head is one layer on the class token instead of two with a tanh; the class token has a position;
biases, gains and positions are not decayed; the rate moves at every step instead of every epoch. Not run yet to its
end. The data are those of `fashion_mnist_package`, a package of Debian's that
the first run names.
"""

from sigmarep.remedies import set_arm
from sigmarep.training.config import arguments, default_config


def get_config(text=""):
    args = arguments(text, arm="pre_ln", epochs=200.0, learning_rate=5e-4)
    config = default_config("image_classification")
    config.batch_size = 128
    config.total_epochs = args["epochs"]
    config.log_every_steps = 100
    config.eval_every_epochs = 1
    config.checkpoint_every_epochs = 5

    model = config.model
    model.patch_size, model.depth, model.width, model.num_heads, model.mlp_dim = 4, 6, 64, 4, 128
    model.init_std, model.dropout, model.activation_dropout = 0.02, 0.1, 0.0

    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = args["learning_rate"]
    config.optimizer.end_factor = 0.02
    config.optimizer.warmup_epochs = args["epochs"] / 20
    config.optimizer.weight_decay = 1e-3

    data = config.data
    data.name = "fashion_mnist_package"
    data.image_size = 28
    data.mean, data.std = (0.5,), (0.5,)
    data.in_memory = True
    data.num_threads = 1
    data.augment.crop, data.augment.pad, data.augment.flip = "pad", 2, True
    set_arm(config, args["arm"])
    return config
