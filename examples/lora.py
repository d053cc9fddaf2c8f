"""Low-rank adapters (LoRA, Hu et al., 2022) on a σReparam classifier of the digits, which learns them turned by 90°.

    python examples/lora.py runs/quickstart [more runs]

Trains, for each run, all parameters; adapters over the folded kernels; and adapters inside σ, Ŵ = γ·(W + AB)/σ(W + AB).
Prints held-out accuracy and loss (one run, or lowest to highest), and the largest ratio of the spectral norm of a block's
effective kernel to what it was before.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from sigmarep.inference import open_run
from sigmarep.nn import fold
from sigmarep.nn.layers import describe

STEPS, BATCH, RATE, RANK = 100, 64, 3e-3, 4


def adapters(params, layers, rank, key):
    """A pair (A, B) for each kernel of `layers`, B = 0."""
    pairs = {}
    for path, kernel in flatten_dict(params, sep="/").items():
        if path in layers:
            *stack, inputs, outputs = layers[path].matrices(kernel).shape
            a = jax.random.normal(jax.random.fold_in(key, len(pairs)), (*stack, inputs, rank)) / inputs**0.5
            pairs[path] = a, jnp.zeros((*stack, rank, outputs))
    return pairs


def adapted(params, layers, pairs):
    """The parameters with W + AB in the place of W."""
    flat = flatten_dict(params, sep="/")
    return unflatten_dict(flat | {p: flat[p] + layers[p].restored(a @ b) for p, (a, b) in pairs.items()}, sep="/")


def turned_digits():
    """Training and held-out pictures, (N, 8, 8, 1) from -1 to 1, and labels, split as the data set `digits` is."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rot90(digits.images, axes=(1, 2))[..., None].astype(np.float32) / 8 - 1
    return (images[:1437], digits.target[:1437]), (images[1437:], digits.target[1437:])


def trained(apply, weights, spectral, data):
    """Adam for `STEPS` steps; `apply(weights, spectral, images)` gives logits and the next `spectral`."""
    optimizer = optax.adam(RATE)
    moments = optimizer.init(weights)

    @jax.jit
    def step(weights, spectral, moments, images, labels):
        def loss(weights):
            logits, after = apply(weights, spectral, images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), after

        (_, spectral), gradient = jax.value_and_grad(loss, has_aux=True)(weights)
        change, moments = optimizer.update(gradient, moments, weights)
        return optax.apply_updates(weights, change), spectral, moments

    order = np.random.default_rng(0)
    for _ in range(STEPS):
        rows = order.integers(len(data[0]), size=BATCH)
        weights, spectral, moments = step(weights, spectral, moments, data[0][rows], data[1][rows])
    return weights, spectral


def growth(before, after, layers):
    """The largest ‖Ŵ‖₂ after over ‖Ŵ‖₂ before, of folded parameters."""
    flat = [flatten_dict(each, sep="/") for each in (before, after)]
    norms = [
        {path: jnp.linalg.norm(layers[path].matrices(each[path]), 2, (-2, -1)) for path in layers} for each in flat
    ]
    return max(float(jnp.max(norms[1][path] / norms[0][path])) for path in layers)


def compare(folder):
    """Rows of `folder`'s run by name: number of trained parameters, accuracy, loss, growth of the norms."""
    run, (train, test) = open_run(folder), turned_digits()
    model, plain = run.task.model, run.plain()
    params, spectral, folded = run.variables["params"], run.variables["spectral"], plain.variables["params"]
    described = describe(plain.module.init, jax.random.key(0), train[0][:1])
    layers = {path: layer for path, layer in described.items() if layer.role == "hidden"}
    pairs = adapters(folded, layers, RANK, jax.random.key(0))

    def everything(params, spectral, x):
        logits, updates = model.apply({"params": params, "spectral": spectral}, x, mutable=["spectral"])
        return logits, updates["spectral"]

    def over_folded(pairs, spectral, x):
        return plain.module.apply({"params": adapted(folded, layers, pairs)}, x), spectral

    def inside_sigma(pairs, spectral, x):
        return everything(adapted(params, layers, pairs), spectral, x)

    @jax.jit
    def logits_of(weights):
        return plain.module.apply({"params": weights}, test[0])

    def row(count, weights):
        logits = logits_of(weights)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, test[1]).mean()
        return count, float(jnp.mean(jnp.argmax(logits, -1) == test[1])), float(loss), growth(folded, weights, layers)

    def size(tree):
        return sum(x.size for x in jax.tree.leaves(tree))

    rows = {"before": row(0, folded)}
    weights, state = trained(everything, params, spectral, train)
    rows["all parameters, σReparam"] = row(size(params), fold({"params": weights, "spectral": state}))
    weights, _ = trained(over_folded, pairs, {}, train)
    rows["adapters over folded kernels"] = row(size(pairs), adapted(folded, layers, weights))
    weights, state = trained(inside_sigma, pairs, spectral, train)
    inside = {"params": adapted(params, layers, weights), "spectral": state}
    rows["adapters inside σ"] = row(size(pairs), fold(inside))
    return rows


def main(folders):
    results = [compare(folder) for folder in folders]
    print("| what is trained | parameters | accuracy | loss | ‖Ŵ‖ against before |\n|---|---|---|---|---|")
    for name in results[0]:
        count, *columns = zip(*(each[name] for each in results), strict=True)
        accuracy, loss, ratio = ((min(each), max(each)) for each in columns)
        print(
            f"| {name} | {count[0]:,} | {accuracy[0]:.1%} to {accuracy[1]:.1%} | {loss[0]:.3f} to {loss[1]:.3f} "
            f"| {ratio[0]:.2f} to {ratio[1]:.2f} |"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
