"""Layer statistics of the panel against NumPy, for every kind of layer, stacked and not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sigmarep.nn import TransformerConfig, TransformerStack, fold
from sigmarep.nn.layers import describe
from sigmarep.training.panel import layer_statistics, panel_metrics

X = jax.random.normal(jax.random.key(0), (2, 5, 8))


def trees(reparam, scan, qkv="separate"):
    config = TransformerConfig(
        depth=2, width=8, num_heads=2, mlp_dim=12, reparam=reparam, scan=scan, qkv=qkv, init_std=0.5, gamma_init=-3.0
    )
    stack = TransformerStack(config)
    variables = stack.init(jax.random.key(1), X)
    params, state = variables["params"], variables.get("spectral", {})
    gradients = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape), params)
    updates = jax.tree.map(lambda g: -0.01 * g, gradients)
    return params, gradients, updates, state, describe(stack.init, jax.random.key(1), X)


def metrics(params, gradients, updates, state, layers):
    found = jax.jit(functools.partial(layer_statistics, layers=layers))(params, gradients, updates, state)
    return panel_metrics(jax.device_get({"spectral": state, "layers": found}), layers.stacks)


def at(tree, path, scan):
    """The layer `path` of a tree, the second of a stack."""
    tree = tree["blocks" if scan else "block_1"]
    for name in path.split("/"):
        tree = tree[name]
    return {name: np.asarray(x, np.float64)[1] if scan else np.asarray(x, np.float64) for name, x in tree.items()}


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("reparam", ["none", "sigma", "spectral", "weight", "scale"])
@pytest.mark.parametrize("path", ["attention/query", "attention/out", "mlp/up"])
def test_every_layer_against_numpy(reparam, scan, path):
    params, gradients, updates, state, layers = trees(reparam, scan)
    found = metrics(params, gradients, updates, state, layers)
    layer, gradient, update = (at(tree, path, scan) for tree in (params, gradients, updates))

    def matrix(x):
        return x.reshape(8, -1) if path == "attention/query" else x.reshape(-1, x.shape[-1])

    weights = matrix(layer["kernel"])
    name = f"block_1/{path}"
    sigma = np.linalg.norm(weights, 2)
    # Random matrices without a gap: five Lanczos iterations may be a little low.
    tolerance = 1e-4 if reparam in ("sigma", "spectral") else 0.02
    np.testing.assert_allclose(found[f"spectral/sigma/{name}"], sigma, rtol=tolerance)
    np.testing.assert_allclose(found[f"spectral/stable_rank/{name}"], (weights**2).sum() / sigma**2, rtol=2 * tolerance)
    of_layer = np.sqrt(sum((x**2).sum() for x in gradient.values()))
    np.testing.assert_allclose(found[f"gradient/norm/{name}"], of_layer, rtol=1e-5)
    ratio = np.linalg.norm(update["kernel"]) / np.linalg.norm(layer["kernel"])
    np.testing.assert_allclose(found[f"update/ratio/{name}"], ratio, rtol=1e-5)
    effective = matrix(at(fold({"params": params, "spectral": state}), path, scan)["kernel"])
    if reparam == "none":
        assert f"spectral/norm/{name}" not in found
    else:
        np.testing.assert_allclose(found[f"spectral/norm/{name}"], np.linalg.norm(effective, 2), rtol=tolerance)


def test_norms_of_layers_that_have_no_kernel_are_left_out():
    found = metrics(*trees("none", True, "fused"))
    assert {
        name.removeprefix("update/ratio/block_0/") for name in found if name.startswith("update/ratio/block_0/")
    } == {
        "attention/qkv",
        "attention/out",
        "mlp/up",
        "mlp/down",
    }


def test_a_nan_in_a_kernel_stays_in_its_own_layers_metrics():
    for reparam in ("none", "sigma", "weight"):
        params, gradients, updates, state, layers = trees(reparam, False)
        kernel = params["block_0"]["mlp"]["up"]["kernel"]
        params["block_0"]["mlp"]["up"]["kernel"] = kernel.at[0, 0].set(jnp.nan)
        values = metrics(params, gradients, updates, state, layers)
        broken = {name for name, value in values.items() if np.isnan(value)}
        # A stored σ is the step's own, computed before this kernel broke; the norm is |γ| then.
        of_the_kernel = {"none": ["spectral/sigma"], "weight": ["spectral/sigma", "spectral/norm"], "sigma": []}[
            reparam
        ]
        names = ["spectral/stable_rank", "update/ratio", *of_the_kernel]
        assert broken == {f"{name}/block_0/mlp/up" for name in names}


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_the_lowest_entropy_is_nan_where_any_layers_is(order):
    def layer(*heads):
        names = ("entropy", "entropy_normalised", "max_logit", "qk_norm", "bound", "logit_variance")
        return {"attention": {name: np.asarray(heads, np.float32) for name in names}}

    layers = {order[0]: layer(1.0, 2.0), order[1]: layer(0.5, np.nan)}
    values = panel_metrics({"attention": layers, "nonfinite": {"image": np.int32(2), "mask": np.int32(0)}}, {})
    assert np.isnan(values["attention/entropy_min"])
    assert np.isnan(values["attention/entropy_head_min"])
    assert np.isnan(values[f"attention/max_logit/{order[1]}"])
    assert values[f"attention/entropy/{order[0]}"] == 1.5
    assert {name: value for name, value in values.items() if name.startswith("data/")} == {"data/nonfinite/image": 2.0}
