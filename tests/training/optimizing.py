"""Parameters of a small model without the model, and optimizers of given fields on them."""

import jax
import jax.numpy as jnp
import numpy as np

from sigmarep.nn.layers import Layer, Layers
from sigmarep.training.config import default_config
from sigmarep.training.mesh import path_name
from sigmarep.training.optimizers import create_optimizer

RATE = 0.03


def config(name, **fields):
    made = default_config("image_classification").unlock().optimizer
    made.name, made.weight_decay, made.epsilon = name, 0.1, 1e-6
    made.update(fields)
    return made


def tree(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "block_0": {
            "mlp": {"up": {"kernel": rng.normal(size=(4, 6)), "gamma": rng.normal(), "bias": rng.normal(size=6)}}
        },
        "head": {"kernel": rng.normal(size=(6, 3))},
    }


def float32(x):
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), x)


def described(params):
    """The layers of these parameters: hidden ones within blocks, an input or an output outside."""
    made, stacked = {}, {}
    paths = {path_name(path): jnp.shape(x) for path, x in jax.tree_util.tree_leaves_with_path(params)}
    for name, shape in paths.items():
        *module, parameter = name.split("/")
        stacked[name] = (0,) if "blocks" in module else ()
        if parameter == "kernel":
            axes = tuple(range(len(stacked[name]), len(shape)))
            outputs = {"query": 2, "qkv": 3}.get(module[-1], 1)
            made[name] = Layer(
                name=name,
                shape=shape,
                stacked=stacked[name],
                inputs=axes[:-outputs],
                outputs=axes[-outputs:],
                role="hidden" if "block" in name else "output" if "head" in name else "input",
                reparam="sigma" if "/".join((*module, "gamma")) in paths else "none",
            )
    return Layers(made, stacked=stacked)


def train(made, params, gradients, schedule=lambda _: RATE):
    params = float32(params)
    optimizer = create_optimizer(made, schedule=schedule, params=params, layers=described(params))
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = optimizer.update(float32(gradient), state, params)
        params = jax.tree.map(jnp.add, params, updates)
    return params
