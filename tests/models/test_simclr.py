"""SimCLR and MoCo v3: the losses against float64 sums, the heads, the power step, the frozen patch embedding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from sigmarep.models import simclr
from sigmarep.models.vit import ViT
from sigmarep.nn import TransformerConfig
from sigmarep.training.mesh import create_mesh

AXIS = "devices"


def rows(count, width=6, seed=0):
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def nt_xent_by_hand(projections, temperature):
    """Equation 1 of the SimCLR paper, one anchor after the other; loss and gradient by central differences."""

    def total(x):
        z = unit(x)
        loss = 0.0
        for i in range(len(z)):
            positive = i + 1 if i % 2 == 0 else i - 1
            others = [np.exp(z[i] @ z[k] / temperature) for k in range(len(z)) if k != i]
            loss -= np.log(np.exp(z[i] @ z[positive] / temperature) / sum(others))
        return loss

    return total(projections.astype(np.float64)), central_differences(total, projections.astype(np.float64))


def momentum_contrast_by_hand(predictions, keys, temperature):
    """Algorithm 1 of the MoCo v3 paper: ctr(q1, k2) + ctr(q2, k1), each 2τ times the mean cross-entropy."""

    def total(x):
        q, k = unit(x), unit(keys.astype(np.float64))
        loss = 0.0
        for own, other in ((0, 1), (1, 0)):
            for i in range(len(q) // 2):
                logits = [q[2 * i + own] @ k[2 * j + other] / temperature for j in range(len(k) // 2)]
                loss += 2 * temperature * (np.log(np.sum(np.exp(logits))) - logits[i])
        return loss

    return total(predictions.astype(np.float64)), central_differences(total, predictions.astype(np.float64))


def central_differences(function, x, step=1e-6):
    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        moved = x.copy()
        moved[index] += step
        above = function(moved)
        moved[index] -= 2 * step
        gradient[index] = (above - function(moved)) / (2 * step)
    return gradient


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_nt_xent_and_its_gradient_are_the_papers(temperature):
    x = rows(12)
    loss, gradient = jax.value_and_grad(lambda x: simclr.nt_xent(x, temperature).loss)(x)
    expected, slope = nt_xent_by_hand(x, temperature)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, slope, rtol=1e-4, atol=1e-5)


def test_the_momentum_loss_and_its_gradient_are_the_papers():
    x, keys = rows(12), rows(12, seed=1)
    loss, gradient = jax.value_and_grad(lambda x: simclr.momentum_contrast(x, keys, 0.2).loss)(x)
    expected, slope = momentum_contrast_by_hand(x, keys, 0.2)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, slope, rtol=1e-4, atol=1e-5)
    assert np.all(jax.grad(lambda keys: simclr.momentum_contrast(x, keys, 0.2).loss)(keys) == 0)


def test_the_losses_count_what_they_sum():
    x = rows(12)
    assert float(simclr.nt_xent(x, 0.2).weight) == 12
    assert float(simclr.momentum_contrast(x, x, 0.2).weight) == 6
    same = np.repeat(rows(6), 2, axis=0)
    assert float(simclr.nt_xent(same, 0.2).correct) == 12
    assert float(simclr.momentum_contrast(same, same, 0.2).correct) == 6


def losses(x, keys, axis_name=None):
    return {
        "nt_xent": lambda x: simclr.nt_xent(x, 0.2, axis_name=axis_name).loss,
        "momentum": lambda x: simclr.momentum_contrast(x, keys, 0.2, axis_name=axis_name).loss,
    }


@pytest.mark.parametrize("name", ["nt_xent", "momentum"])
def test_eight_devices_under_jit_give_the_loss_and_gradient_of_one(name):
    x, keys = rows(32), rows(32, seed=1)
    mesh = create_mesh({"data": 8, "fsdp": 1, "tensor": 1})
    spread = NamedSharding(mesh, PartitionSpec("data"))
    loss, gradient = jax.value_and_grad(losses(x, keys)[name])(x)
    sharded = jax.jit(jax.value_and_grad(losses(x, jax.device_put(keys, spread))[name]), out_shardings=(None, spread))
    found, slope = sharded(jax.device_put(x, spread))
    assert len(slope.addressable_shards) == 8
    np.testing.assert_allclose(found, loss, rtol=1e-6)
    np.testing.assert_allclose(slope, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["nt_xent", "momentum"])
def test_eight_devices_under_pmap_give_the_loss_and_gradient_of_one(name):
    x, keys = rows(32), rows(32, seed=1)
    loss, gradient = jax.value_and_grad(losses(x, keys)[name])(x)
    mapped = jax.pmap(lambda x, keys: jax.value_and_grad(losses(x, keys, axis_name=AXIS)[name])(x), axis_name=AXIS)
    found, slope = mapped(x.reshape(8, 4, -1), keys.reshape(8, 4, -1))
    np.testing.assert_allclose(np.sum(found), loss, rtol=1e-6)
    np.testing.assert_allclose(np.reshape(slope, gradient.shape), gradient, rtol=1e-4, atol=1e-6)


def vit(**fields):
    transformer = TransformerConfig(depth=2, width=16, num_heads=2, mlp_dim=16, **{"reparam": "sigma", **fields})
    return ViT(transformer, patch_size=4, num_classes=0, pool="mean")


def model(**fields):
    return simclr.ContrastiveModel(vit(**fields), simclr.Head(2, 12, 8))


def pictures(count, seed=0):
    return np.random.default_rng(seed).normal(size=(count, 8, 8, 1)).astype(np.float32)


def test_the_projector_normalises_over_the_whole_batch_and_its_last_layer_has_no_scale():
    head, x = simclr.Head(3, 12, 8), rows(32)
    variables = head.init(jax.random.key(0), x, train=True)
    names = {name: sorted(tree) for name, tree in variables["params"].items()}
    assert names == {
        "dense_0": ["kernel"],
        "dense_1": ["kernel"],
        "dense_2": ["kernel"],
        "norm_0": ["bias", "scale"],
        "norm_1": ["bias", "scale"],
    }
    y, updates = head.apply(variables, x, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(np.mean(y, 0), 0, atol=1e-5)
    np.testing.assert_allclose(np.std(y, 0), 1, rtol=1e-3)
    first = x @ variables["params"]["dense_0"]["kernel"]
    np.testing.assert_allclose(updates["batch_stats"]["norm_0"]["mean"], 0.1 * first.mean(0), rtol=1e-4, atol=1e-6)


def test_a_projector_without_normalisation_has_biases():
    head = simclr.Head(2, 12, 8, norm="none", reparam="sigma")
    variables = head.init(jax.random.key(0), rows(4), train=True)
    assert sorted(variables) == ["params", "spectral"]
    assert sorted(variables["params"]["dense_1"]) == ["bias", "gamma", "kernel"]


@pytest.mark.parametrize("fields", [{"norm": "group"}, {"layers": 0}])
def test_an_impossible_head_is_refused(fields):
    head = simclr.Head(**{"layers": 2, "hidden": 4, "width": 4, **fields})
    with pytest.raises(ValueError, match=r"norm = 'group': expected one of|layers = 0: expected at least 1"):
        head.init(jax.random.key(0), rows(4), train=True)


def assert_trees_equal(first, second, **options):
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_allclose(a, b, **{"rtol": 1e-6, "atol": 1e-6, **options})


@pytest.mark.parametrize("scan", [False, True])
def test_two_views_cost_one_power_step(scan):
    """One apply to both views stores the same u as an apply to one; so do, unrolled, two calls in one apply."""
    both, one = pictures(8), pictures(8)[::2]
    net = model(scan=scan)
    variables = net.init(jax.random.key(0), both)
    # Away from the exact start, where every number of steps gives the same vectors.
    moved = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(1), x.shape), variables["params"])
    variables = {**variables, "params": moved}
    mutable = ["spectral", "batch_stats"]

    def after(images):
        return net.apply(variables, images, train=True, mutable=mutable)[1]["spectral"]

    def called_twice(module, images):
        module(images[::2], train=True)
        return module(images[1::2], train=True)

    expected = after(one)
    for found in (after(both), after(both[1::2])):
        assert_trees_equal(found, expected)
    if not scan:
        twice = net.apply(variables, both, method=called_twice, mutable=mutable)[1]["spectral"]
        assert_trees_equal(twice, expected)
    start = variables["spectral"]["vit"]["patch_embedding"]["u"]
    second = net.apply({**variables, "spectral": expected}, one, train=True, mutable=mutable)[1]["spectral"]
    first_u, second_u = (tree["vit"]["patch_embedding"]["u"] for tree in (expected, second))
    assert np.abs(first_u - start).max() > 1e-3
    assert np.abs(second_u - first_u).max() > 1e-4


def test_a_frozen_patch_embedding_gets_no_gradient_and_changes_nothing_else():
    images = pictures(4)
    plain, frozen = (vit().clone(frozen_patches=each) for each in (False, True))
    variables = plain.init(jax.random.key(0), images)

    @functools.partial(jax.grad, argnums=1)
    def slope(net, params):
        return jnp.sum(net.apply({**variables, "params": params}, images) ** 2)

    free, kept = (slope(net, variables["params"]) for net in (plain, frozen))
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(kept.pop("patch_embedding")))
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(free.pop("patch_embedding")["kernel"]))
    assert_trees_equal(free, kept, rtol=1e-5)
    np.testing.assert_array_equal(plain.apply(variables, images), frozen.apply(variables, images))
