"""Learning rates that fall from block to block, against the rule written out."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sigmarep.errors import BadInput
from sigmarep.nn.layers import describe
from sigmarep.training.config import default_config
from sigmarep.training.mesh import path_name
from sigmarep.training.optimizers import create_optimizer
from tests.weights.vits import described, vit

# Shares of the learning rate in a ViT of two blocks, layer_decay = 0.5.
SHARES = {
    "head/": 1.0,
    "encoder/norm/": 1.0,
    "encoder/block_1/": 0.5,
    "encoder/block_0/": 0.25,
    "positions/": 0.125,
    "patch_embedding/": 0.125,
    "class_token": 0.125,
}


def steps(layers):
    """The absolute step of every parameter under sgd with rate 1 and gradients of 1."""
    config = default_config("image_classification").optimizer
    config.name, config.momentum, config.learning_rate, config.layer_decay = "sgd", 0.0, 1.0, 0.5
    params = jax.tree.map(lambda x: jnp.zeros(x.shape), layers.variables["params"])
    optimizer = create_optimizer(config, schedule=optax.constant_schedule(1.0), params=params, layers=layers)
    ones = jax.tree.map(jnp.ones_like, params)
    updates, _ = optimizer.update(ones, optimizer.init(params), params)
    return {path_name(path): -np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(updates)}


@pytest.mark.parametrize("scan", [True, False])
def test_every_parameter_has_its_share(scan):
    for name, step in steps(described(vit(reparam="sigma", scan=scan))).items():
        blocks = [name.replace("/blocks/", f"/block_{i}/") for i in range(2)] if "/blocks/" in name else [name]
        parts = step if "/blocks/" in name else [step]
        for block, part in zip(blocks, parts, strict=True):
            (share,) = [share for beginning, share in SHARES.items() if block.startswith(beginning)]
            np.testing.assert_array_equal(part, np.full(part.shape, share))


def test_a_model_without_blocks_is_refused():
    import flax.linen as nn

    with pytest.raises(BadInput, match=r"config.optimizer.layer_decay: the model has no stack of blocks"):
        steps(describe(nn.Dense(3).init, jax.random.key(0), jnp.zeros((1, 2))))
