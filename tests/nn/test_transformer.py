"""Blocks and stacks: every way of computing them gives the same numbers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sigmarep.nn import TransformerBlock, TransformerConfig, TransformerStack, fold
from sigmarep.nn.layers import describe

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (2, 6, 16))
SMALL = TransformerConfig(3, 16, 4, 24, norm="post", reparam="sigma", init_std=0.3)


def unstacked(variables, depth):
    """Variables of the unrolled stack from those of the scanned one."""
    return {
        collection: {
            **{name: value for name, value in tree.items() if name != "blocks"},
            **{f"block_{i}": jax.tree.map(lambda x, i=i: x[i], tree["blocks"]) for i in range(depth)},
        }
        for collection, tree in variables.items()
    }


def close(a, b, rtol=1e-4, atol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


# Two of the scan's three blocks at once leave a remainder; eight are more than there are.
@pytest.mark.parametrize(("norm", "at_once"), [("pre", 1), ("deepnorm", 1), ("pre", 2), ("pre", 8)])
def test_scanned_equals_unrolled_in_output_state_and_gradient(norm, at_once):
    c = dataclasses.replace(SMALL, norm=norm, scan_unroll=at_once)
    scanned, unrolled = TransformerStack(c), TransformerStack(dataclasses.replace(c, scan=False))
    stacked = scanned.init(KEY, X)
    apart = unstacked(stacked, 3)

    def loss(model, variables):
        def of(params):
            output, changed = model.apply({**variables, "params": params}, X, mutable=["spectral", "attention"])
            return jnp.sum(jnp.sin(output)), (output, changed)

        (_, auxiliary), gradient = jax.jit(jax.value_and_grad(of, has_aux=True))(variables["params"])
        return *auxiliary, gradient

    output, changed, gradient = loss(scanned, stacked)
    expected, state, other = loss(unrolled, apart)
    close(output, expected)
    close(unstacked(dict(changed), 3), dict(state))
    close(unstacked({"params": gradient}, 3)["params"], other)


@pytest.mark.parametrize(("remat", "scan", "at_once"), [("full", True, 1), ("full", False, 1), ("dots", True, 2)])
def test_recomputing_changes_neither_gradient_nor_power_step(remat, scan, at_once):
    # Dropout too: what is recomputed must draw the same masks.
    c = dataclasses.replace(SMALL, depth=2, scan=scan, scan_unroll=at_once, dropout=0.3, layer_drop=0.3)
    options = {"deterministic": False, "rngs": {"dropout": KEY}, "mutable": ["spectral"]}
    variables = TransformerStack(c).init(KEY, X)
    results = []
    for word in ("none", remat):
        model = TransformerStack(dataclasses.replace(c, remat=word))

        def loss(params, model=model):
            output, changed = model.apply({**variables, "params": params}, X, **options)
            return jnp.sum(jnp.sin(output)), changed

        results.append(jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"]))
    close(*results)


@pytest.mark.parametrize(
    ("reparam", "qkv", "scan"),
    [
        ("sigma", "fused", True),
        ("sigma", "qk_v", True),
        ("sigma", "separate", True),
        ("sigma", "qk_v", False),
        ("spectral", "qk_v", True),
        ("spectral", "fused", False),
        ("weight", "fused", True),
        ("weight", "separate", False),
    ],
)
def test_folding_gives_the_plain_model_with_the_same_outputs(reparam, qkv, scan):
    c = dataclasses.replace(SMALL, depth=2, scan=scan, qkv=qkv, reparam=reparam)
    model = TransformerStack(c)
    plain = TransformerStack(dataclasses.replace(c, reparam="none"))
    variables = model.init(KEY, X)
    # Two updates' worth of drift, so that u is not exact and γ not 1.
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(KEY, x.shape), variables["params"])
    folded = fold({**variables, "params": params})
    shapes = jax.tree.map(jnp.shape, jax.eval_shape(plain.init, KEY, X)["params"])
    assert jax.tree.map(jnp.shape, folded) == shapes
    close(plain.apply({"params": folded}, X), model.apply({**variables, "params": params}, X), rtol=1e-5, atol=2e-6)


def test_deepnorm_constants_equal_the_papers():
    # DeepNet, encoder only: α⁴ = 2N and β⁴ = 1/(8N).
    for depth, alpha, beta in (
        (6, 1.861210, 0.379918),
        (18, 2.449490, 0.288675),
        (50, 3.162278, 0.223607),
        (100, 3.760603, 0.188030),
    ):
        c = dataclasses.replace(SMALL, norm="deepnorm", depth=depth)
        np.testing.assert_allclose([c.alpha, c.beta], [alpha, beta], rtol=1e-6)
    plain, scaled = (
        TransformerBlock(dataclasses.replace(SMALL, norm=norm, reparam="none", qkv="fused")).init(KEY, X)["params"]
        for norm in ("post", "deepnorm")
    )
    beta = dataclasses.replace(SMALL, norm="deepnorm").beta
    ratio = scaled["attention"]["qkv"]["kernel"] / plain["attention"]["qkv"]["kernel"]
    np.testing.assert_allclose(ratio[:, 0], 1.0, rtol=1e-5)
    np.testing.assert_allclose(ratio[:, 2], beta, rtol=1e-5)
    for path in (("attention", "out"), ("mlp", "up"), ("mlp", "down")):
        a, b = (tree[path[0]][path[1]]["kernel"] for tree in (scaled, plain))
        np.testing.assert_allclose(a / b, beta, rtol=1e-5)


def test_drop_path_drops_branches_of_single_examples_and_rescales_the_others():
    c = dataclasses.replace(SMALL, norm="none", drop_path=0.5, reparam="none")
    block = TransformerBlock(c)
    x = jnp.broadcast_to(X[:1], (400, 6, 16))
    variables = block.init(KEY, x)
    # A silent MLP leaves one branch to look at.
    variables["params"]["mlp"]["down"]["kernel"] *= 0
    branch = block.apply(variables, x, 0.0) - x
    dropped = block.apply(variables, x, 0.75, deterministic=False, rngs={"dropout": KEY})
    kept = np.any(np.abs(dropped - x) > 1e-6, axis=(1, 2))
    np.testing.assert_allclose(dropped - x, kept[:, None, None] * branch * 4, atol=1e-4)
    # 400 draws at 1/4: three standard deviations are 0.065.
    assert abs(kept.mean() - 0.25) < 0.065
    np.testing.assert_array_equal(block.apply(variables, x, 0.75) - x, branch)


def test_the_rate_of_drop_path_rises_from_none_in_the_first_block_to_the_last():
    c = dataclasses.replace(SMALL, depth=2, norm="none", drop_path=0.9, reparam="none")
    x = jnp.broadcast_to(X[:1], (200, 6, 16))
    stack = TransformerStack(c)
    variables = stack.init(KEY, x[:1])
    first = TransformerBlock(c).apply({"params": jax.tree.map(lambda a: a[0], variables["params"]["blocks"])}, x)
    dropped = stack.apply(variables, x, deterministic=False, rngs={"dropout": KEY})
    only_first = np.all(np.isclose(dropped, first, atol=1e-5), axis=(1, 2))
    # Both branches of the last block dropped: 0.81 of the examples, ± three standard deviations.
    assert abs(only_first.mean() - 0.81) < 0.085


def test_layer_drop_leaves_whole_blocks_out_without_rescaling():
    c = dataclasses.replace(SMALL, norm="none", layer_drop=0.5, reparam="none")
    block = TransformerBlock(c)
    variables = block.init(KEY, X)
    full = block.apply(variables, X)
    kept = []
    for seed in range(40):
        output = block.apply(variables, X, deterministic=False, rngs={"dropout": jax.random.key(seed)})
        is_kept, is_dropped = np.allclose(output, full, atol=1e-5), np.allclose(output, X, atol=1e-6)
        assert is_kept != is_dropped
        kept.append(is_kept)
    assert 8 < sum(kept) < 32


@pytest.mark.parametrize("scan", [True, False])
def test_layer_drop_draws_for_every_block_anew(scan):
    stack = TransformerStack(
        dataclasses.replace(SMALL, depth=2, norm="none", layer_drop=0.5, reparam="none", scan=scan)
    )
    variables = stack.init(KEY, X)
    run = jax.jit(lambda key: stack.apply(variables, X, deterministic=False, rngs={"dropout": key}))
    outputs = {round(float(jnp.sum(jnp.abs(run(jax.random.key(seed))))), 2) for seed in range(40)}
    # Each of two blocks kept or left out.
    assert len(outputs) == 4


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("norm", "prenorm", "expected one of none, pre, peri, post, deepnorm"),
        ("reparam", "sigmoid", "expected one of none, sigma, spectral, weight"),
        ("qkv", "joint", "expected one of separate, fused, qk_v"),
        ("activation", "gelo", "expected one of gelu"),
        ("remat", "some", "expected one of none, full, dots"),
        ("num_heads", 5, "does not divide width = 16"),
        ("depth", 0, "at least 1"),
        ("mlp_dim", -4, "at least 1"),
        ("qk_norm", "l2", "expected one of none, layer, rms"),
        ("attention_implementation", "flush", "expected one of auto, xla, cudnn, flash"),
        ("kernel_init", "zeros", "expected one of trunc_normal, normal"),
        ("drop_path", -0.1, "a number of at least 0 and below 1"),
        ("dropout", 1.0, "a number of at least 0 and below 1"),
        ("gamma_init", "two", "expected one of one, sigma, or a number"),
        ("gamma_init", float("nan"), "or a number"),
        ("init_std", 0.0, "a number above 0"),
        ("norm_epsilon", -1.0, "a number above 0"),
        ("entropy_target", 1.5, "at most 1"),
        ("rotary_base", -1.0, "at least 0"),
        ("activation", "jax.nn.gelo", "jax.nn has no module or attribute gelo"),
        ("norm_type", "no_such_package.Norm", "there is no module no_such_package"),
    ],
)
def test_impossible_configurations_are_refused_by_name(field, value, message):
    with pytest.raises(ValueError, match=f"{field} = .*{message}"):
        dataclasses.replace(SMALL, **{field: value})


def test_rotary_positions_refuse_an_odd_number_of_features_a_head():
    with pytest.raises(
        ValueError, match="num_heads = 16: rotary positions need an even number of features a head, not 1"
    ):
        dataclasses.replace(SMALL, num_heads=16, rotary_base=100.0)


@pytest.mark.parametrize("qkv", ["fused", "separate"])
def test_under_the_scope_of_attention_all_other_kernels_are_plain(qkv):
    c = dataclasses.replace(SMALL, depth=1, qkv=qkv, scan=False, reparam_scope="attention")
    variables = TransformerStack(c).init(KEY, X)
    scaled = {path[-2].key for path, _ in jax.tree.leaves_with_path(variables["params"]) if path[-1].key == "gamma"}
    assert scaled == {"out", *(("qkv",) if qkv == "fused" else ("query", "key", "value"))}
    described = describe(TransformerStack(c).init, KEY, X)
    assert {layer.reparam for path, layer in described.items() if "/mlp/" in path} == {"none"}
    assert {layer.reparam for path, layer in described.items() if "/attention/" in path} == {"sigma"}


def test_further_power_steps_reach_the_norm_in_one_application():
    c = dataclasses.replace(SMALL, depth=1, scan=False, power_steps=60, sigma_gradient=False)
    variables = TransformerStack(c).init(KEY, X)
    lost = jax.tree.map_with_path(
        lambda path, x: jnp.ones_like(x) / x.size**0.5 if path[-1].key == "u" else x, variables["spectral"]
    )
    _, changed = TransformerStack(c).apply({**variables, "spectral": lost}, X, mutable=["spectral"])
    for path, sigma in jax.tree.leaves_with_path(changed["spectral"]):
        if path[-1].key == "sigma":
            kernel = functools.reduce(lambda tree, key: tree[key.key], path[:-1], variables["params"])["kernel"]
            outputs = functools.reduce(lambda tree, key: tree[key.key], path[:-1], changed["spectral"])["u"].size
            norm = np.linalg.norm(np.asarray(kernel, np.float64).reshape(-1, outputs), 2)
            assert float(sigma) == pytest.approx(norm, rel=1e-3)


def test_a_block_of_power_vectors_is_the_same_scanned_unrolled_and_folded():
    c = dataclasses.replace(SMALL, power_vectors=3)
    scanned, unrolled = TransformerStack(c), TransformerStack(dataclasses.replace(c, scan=False))
    stacked = scanned.init(KEY, X)
    stacked["params"] = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(KEY, x.shape), stacked["params"])
    output, changed = scanned.apply(stacked, X, mutable=["spectral"])
    expected, state = unrolled.apply(unstacked(stacked, 3), X, mutable=["spectral"])
    close(output, expected)
    # The sign of a vector of the basis is nobody's choice.
    close(jax.tree.map(jnp.abs, unstacked(dict(changed), 3)), jax.tree.map(jnp.abs, dict(state)), atol=1e-3)
    plain = TransformerStack(dataclasses.replace(c, reparam="none"))
    close(plain.apply({"params": fold(stacked)}, X), scanned.apply(stacked, X))


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_dropout_after_the_activation_has_a_rate_of_its_own(rate):
    """With branch_dropout off it is the only one: at 0 a pass in training mode is that of evaluation."""
    c = dataclasses.replace(SMALL, depth=1, scan=False, dropout=0.5, activation_dropout=rate, branch_dropout=False)
    model = TransformerStack(c)
    variables = model.init(KEY, X)
    options = {"rngs": {"dropout": KEY}, "mutable": ["spectral"]}
    trained, _ = model.apply(variables, X, deterministic=False, **options)
    evaluated, _ = model.apply(variables, X, deterministic=True, **options)
    assert bool(jnp.array_equal(trained, evaluated)) == (rate == 0)
