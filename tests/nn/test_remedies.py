"""Norms and branch scales against their formulas, and QK-clip against the logits of the next pass."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sigmarep.nn import TransformerConfig, TransformerStack
from sigmarep.nn.norms import BranchScale, DynamicTanh
from sigmarep.nn.qk_clip import qk_clipped

CONFIG = TransformerConfig(depth=2, width=8, num_heads=2, mlp_dim=8, init_std=0.5)
X = jax.random.normal(jax.random.key(0), (3, 5, 8))


def test_dynamic_tanh_is_its_formula_and_starts_with_alpha_one_half():
    layer = DynamicTanh()
    variables = layer.init(jax.random.key(0), X)
    assert float(variables["params"]["alpha"]) == 0.5
    params = {"alpha": jnp.float32(1.7), "scale": jnp.arange(8.0), "bias": jnp.arange(8.0)[::-1]}
    expected = np.arange(8) * np.tanh(1.7 * np.asarray(X, np.float64)) + np.arange(8)[::-1]
    np.testing.assert_allclose(layer.apply({"params": params}, X), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "shape", "start"), [("layer_scale", (8,), 1e-4), ("rezero", (), 0.0)])
def test_a_branch_scale_starts_small(kind, shape, start):
    layer = BranchScale(kind)
    variables = layer.init(jax.random.key(0), X)
    assert variables["params"]["scale"].shape == shape
    np.testing.assert_allclose(layer.apply(variables, X), start * np.asarray(X), rtol=1e-6)


@pytest.mark.parametrize("norm", ["none", "pre", "post"])
def test_rezero_makes_a_stack_the_identity_or_its_norms_at_the_start(norm):
    config = dataclasses.replace(CONFIG, norm=norm, branch_scale="rezero", scan=norm == "pre")
    stack = TransformerStack(config)
    variables = stack.init(jax.random.key(1), X)
    x = np.asarray(X, np.float64)
    normal = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(stack.apply(variables, X), x if norm == "none" else normal, atol=1e-4)


@pytest.mark.parametrize(("norm_type", "leaves"), [("dyt", {"alpha", "scale", "bias"}), ("rms", {"scale"})])
def test_the_type_of_norm_is_that_of_every_norm(norm_type, leaves):
    config = dataclasses.replace(CONFIG, norm_type=norm_type, scan=False)
    params = TransformerStack(config).init(jax.random.key(1), X)["params"]
    norms = [params["norm"], *(params[f"block_{i}"][f"{kind}_norm"] for i in (0, 1) for kind in ("attention", "mlp"))]
    assert all(set(norm) == leaves for norm in norms)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("qkv", ["separate", "qk_v", "fused"])
def test_after_qk_clip_the_heads_that_were_above_the_threshold_are_at_it(qkv, scan):
    stack = TransformerStack(dataclasses.replace(CONFIG, depth=1, norm="none", qkv=qkv, scan=scan, reparam="none"))
    params = stack.init(jax.random.key(1), X)["params"]
    # Biases take part in the logits as well.
    params = jax.tree.map(lambda x: x + 0.3, params)

    def recorded(params):
        y, found = stack.apply({"params": params}, X, mutable=["attention"])
        block = found["attention"]["blocks" if scan else "block_0"]["attention"]
        return y, found["attention"], np.ravel(block["max_logit"])

    _, attention, before = recorded(params)
    threshold = float(before.mean())
    clipped = qk_clipped(params, attention, threshold)
    _, _, after = recorded(clipped)
    assert (before > threshold).tolist().count(True) == 1
    np.testing.assert_allclose(after, np.minimum(before, threshold), rtol=1e-5)

    def changed(old, new):
        return {path for path, x in leaves(old).items() if not np.array_equal(x, leaves(new)[path])}

    def leaves(tree):
        return {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}

    assert all("attention" in path and "out" not in path and "value" not in path for path in changed(params, clipped))
    # Values that share a kernel with queries and keys are left alone.
    if qkv == "fused":
        path = ("blocks",) if scan else ("block_0",)
        kernels = [tree[path[0]]["attention"]["qkv"]["kernel"] for tree in (params, clipped)]
        np.testing.assert_array_equal(*(kernel[..., 2, :, :] for kernel in kernels))
