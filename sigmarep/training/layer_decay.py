"""Distances of parameters from the output, in blocks: `config.optimizer.layer_decay` lowers the learning rate with them."""

import re
from typing import Any, NamedTuple

import jax
import numpy as np

from sigmarep.errors import BadInput
from sigmarep.nn.layers import Layers
from sigmarep.training.mesh import path_name


def distances(params: Any, layers: Layers) -> dict[str, Any]:
    """Blocks from every parameter to the output, by path (Bao et al., 2022, BEiT): 0 for output layers and the last norm,
    1 for the last block; one more than blocks for what comes before them. An array where blocks are stacked.

    Each stack of blocks counts by itself. Parameters outside of all of them come before the blocks, but for output layers,
    projectors, and what stands beside the blocks in their own module.
    """
    shapes = {path_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    depths: dict[str, int] = {}
    for name, shape in shapes.items():
        if place := _block(name, shape, layers):
            depths[place.stack] = max(depths.get(place.stack, 0), place.blocks)
    if not depths:
        raise BadInput("config.optimizer.layer_decay: the model has no stack of blocks (sigmarep.nn.TransformerStack)")
    after = {layer.module for layer in layers.values() if layer.role in ("output", "projector")}

    def distance(name, shape):
        if place := _block(name, shape, layers):
            distances = np.float32(depths[place.stack] - place.numbers)
            if place.axis is None:
                return distances
            return distances.reshape([-1 if axis == place.axis else 1 for axis in range(len(shape))])
        parent, _, _ = name.rpartition("/")
        if parent in after or parent.rpartition("/")[0] in depths:
            return 0.0
        return 1.0 + max(depths.values())

    return {name: distance(name, shape) for name, shape in shapes.items()}


class _Block(NamedTuple):
    """The block or blocks that a parameter is of: the module that holds them, their numbers, how many blocks are known by
    it, and the parameter's axis over them, if it has one."""

    stack: str
    numbers: Any
    blocks: int
    axis: int | None


def _block(name: str, shape: tuple[int, ...], layers: Layers) -> _Block | None:
    for stack in layers.stacks:
        if name.startswith(f"{stack}/"):
            axis = layers.stacked[name][0]
            return _Block(stack.rpartition("/")[0], np.arange(shape[axis]), shape[axis], axis)
    # The name of a block of `TransformerStack` without scan.
    if match := re.match(r"(?:(.*?)/)?block_(\d+)/", name):
        return _Block(match[1] or "", int(match[2]), int(match[2]) + 1, None)
    return None
