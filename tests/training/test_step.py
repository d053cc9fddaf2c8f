"""The training step on one and on eight devices, under jit, pmap, FSDP and accumulation: the same numbers."""

import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from sigmarep.errors import BadInput
from sigmarep.models.vit import ViT
from sigmarep.nn import TransformerConfig
from sigmarep.nn.layers import describe
from sigmarep.tasks.protocol import LossOutput
from sigmarep.training import mesh as meshes
from sigmarep.training import parallel
from sigmarep.training.step import create_state, make_train_step


class TinyTask:
    """A two-block ViT on random pictures; no data set, so that only the step is under test."""

    def __init__(self, dropout=0.0, **fields):
        options = {"norm": "post", "reparam": "sigma", **fields}
        transformer = TransformerConfig(depth=2, width=32, num_heads=4, mlp_dim=64, dropout=dropout, **options)
        self.model = ViT(transformer, patch_size=4, num_classes=8)

    def init(self, rng):
        return self.model.init(rng, jnp.zeros((1, 8, 8, 1)))

    def loss(self, params, model_state, batch, rng, *, attention):
        logits, changed = self.model.apply(
            {"params": params, **model_state},
            batch["image"],
            deterministic=False,
            rngs={"dropout": rng},
            mutable=[*model_state, "attention"] if attention else list(model_state),
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        recorded = changed.pop("attention", {})
        total = (jnp.sum(losses), jnp.float32(losses.size))
        return LossOutput(total, {"twice": (2 * total[0], total[1])}, {**model_state, **changed}, recorded)


def batches(count, size=16):
    rng = np.random.default_rng(0)
    for _ in range(count):
        image = rng.normal(size=(size, 8, 8, 1)).astype(np.float32)
        yield {"image": image, "label": rng.integers(0, 8, size).astype(np.int32)}


@functools.cache
def run(mode="jit", data=1, fsdp=1, accumulation=1, steps=5, task=None, ema=0.0, dtype="float32", panel=False):
    """Losses of some steps, the final state on the host, and the last output.

    By SGD: the gradient of a key's bias is zero but for rounding, and Adam would make that rounding an update.
    """
    task = task or TinyTask(dtype=jnp.dtype(dtype))
    optimizer = optax.sgd(0.1, momentum=0.9)
    layers = describe(task.init, jax.random.key(0))
    make = functools.partial(
        make_train_step, task, optimizer, lambda _: 0.1, layers=layers, accumulation=accumulation, ema_decay=ema
    )
    create = functools.partial(create_state, layers.initialize, optimizer, seed=0, ema=ema > 0)
    mesh_config = ml_collections.ConfigDict({"data": data, "fsdp": fsdp, "tensor": 1})
    mesh = meshes.create_mesh(mesh_config, jax.devices()[: data * fsdp])
    runner = parallel.RUNNERS[mode](mesh, make, meshes.state_shardings(jax.eval_shape(create), mesh, layers))
    state = runner.put_state(jax.jit(create, out_shardings=runner.shardings)())
    losses = []
    for batch in batches(steps):
        state, output = runner.step(state, batch, panel=panel)
        losses.append(float(output.scalars["loss"]))
    return losses, jax.device_get(runner.get_state(state)), jax.device_get(output)


def assert_same(first, second, rtol=2e-4, atol=2e-5):
    np.testing.assert_allclose(first[0], second[0], rtol=rtol)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(first[1]), jax.tree.leaves(second[1]), strict=True):
        if "opt_state" not in str(path[0]):
            np.testing.assert_allclose(a, b, rtol=rtol, atol=atol, err_msg=str(path))


def test_the_loss_falls_and_metrics_are_means():
    losses, state, output = run()
    assert losses[-1] < losses[0] * 1.5
    assert state.step == 5
    np.testing.assert_allclose(output.scalars["twice"], 2 * output.scalars["loss"], rtol=1e-6)
    assert output.scalars["gradient_norm"] > 0


def test_eight_devices_equal_one():
    assert_same(run(), run(data=8))


def test_parameters_sharded_over_eight_devices_equal_replicated_ones():
    assert_same(run(), run(data=2, fsdp=4))


def test_sharded_kernels_are_really_sharded():
    task = TinyTask()
    mesh = meshes.create_mesh(ml_collections.ConfigDict({"data": 2, "fsdp": 4, "tensor": 1}))
    layers = describe(task.init, jax.random.key(0))
    create = functools.partial(create_state, layers.initialize, optax.adam(1e-3), seed=0, ema=False)
    state = jax.jit(create, out_shardings=meshes.state_shardings(jax.eval_shape(create), mesh, layers))()
    up = state.params["encoder"]["blocks"]["mlp"]["up"]["kernel"]
    assert up.addressable_shards[0].data.shape == (2, 8, 64)
    moment = state.opt_state[0].mu["encoder"]["blocks"]["mlp"]["up"]["kernel"]
    assert moment.sharding == up.sharding


def test_pmap_equals_jit():
    # pmap takes every device of the process.
    assert_same(run(), run("pmap", data=8))


@pytest.mark.parametrize("accumulation", [2, 4])
def test_microbatches_equal_one_batch_and_take_one_power_step(accumulation):
    whole, split = run(), run(accumulation=accumulation)
    assert_same(whole, split)
    one, other = run(steps=1), run(steps=1, accumulation=accumulation)
    for a, b in zip(jax.tree.leaves(one[1].model_state), jax.tree.leaves(other[1].model_state), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_microbatches_on_eight_devices_equal_one_batch_on_one():
    assert_same(run(), run(data=8, accumulation=2))


def test_the_panel_combines_means_and_the_largest_logit():
    _, _, whole = run(steps=1, panel=True)
    for other in (run(steps=1, accumulation=4, panel=True)[2], run("pmap", data=8, steps=1, panel=True)[2]):
        for a, b in zip(jax.tree.leaves(whole.panel), jax.tree.leaves(other.panel), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reparam", ["none", "sigma", "weight"])
@pytest.mark.parametrize("mesh", [{"data": 8}, {"data": 2, "fsdp": 4}])
def test_a_panel_that_devices_share_is_that_of_one(reparam, mesh, monkeypatch):
    monkeypatch.setattr(meshes, "SMALL", 1)
    task = TinyTask(reparam=reparam)
    whole, parts = (run.__wrapped__(steps=1, panel=True, task=task, **each)[2].panel for each in ({}, mesh))
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5, err_msg=str(path))


def test_asking_for_the_panel_changes_nothing_else():
    task, optimizer = TinyTask(), optax.adam(1e-3)
    layers = describe(task.init, jax.random.key(0))
    step = jax.jit(make_train_step(task, optimizer, lambda _: 1e-3, layers=layers), static_argnums=2)
    state = create_state(task.init, optimizer, seed=0, ema=False)
    batch = next(batches(1))
    (with_panel, shown), (without, hidden) = step(state, batch, True), step(state, batch, False)
    assert shown.panel
    assert not hidden.panel
    for a, b in zip(jax.tree.leaves(with_panel), jax.tree.leaves(without), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_averaged_weights_follow_their_recursion():
    _, plain, _ = run(steps=1)
    _, state, _ = run(steps=1, ema=0.9)
    first = create_state(TinyTask().init, optax.sgd(0.1), seed=0, ema=False).params
    expected = jax.tree.map(lambda a, b: 0.9 * np.asarray(a) + 0.1 * b, first, plain.params)
    for a, b in zip(jax.tree.leaves(state.ema), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_bfloat16_keeps_parameters_and_spectral_vectors_in_float32():
    losses, state, _ = run(dtype="bfloat16")
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves((state.params, state.model_state)))
    np.testing.assert_allclose(losses, run()[0], rtol=0.05)


def test_dropout_differs_from_step_to_step_and_repeats_with_the_seed():
    noisy = TinyTask(dropout=0.5)
    first, again = run(task=noisy, steps=2), run.__wrapped__(task=noisy, steps=2)
    assert first[0] == again[0]
    assert first[0] != run(steps=2)[0]


def test_what_no_layer_describes_stays_whole_unless_a_rule_finds_it():
    mesh = meshes.create_mesh(ml_collections.ConfigDict({"data": 2, "fsdp": 2, "tensor": 2}))
    assert meshes.partition_spec("params/surprise", (3, 4), mesh, {}) == PartitionSpec(None, None)
    rules = meshes.read_rules(["surprise$=fsdp,tensor", "bias$="])
    # A dimension that its axis does not divide stays whole, and so do those in front.
    assert meshes.partition_spec("mu/surprise", (5, 3, 4), mesh, {}, rules) == PartitionSpec(None, None, "tensor")


def test_a_rule_that_finds_nothing_is_refused():
    state = {"params": {"up": {"kernel": 0}}}
    meshes.check_matches(state, meshes.read_rules(["up/kernel$=fsdp"]))
    with pytest.raises(BadInput, match=r"'upp' finds none of the arrays, which are named as params/up/kernel"):
        meshes.check_matches(state, meshes.read_rules(["upp=fsdp"]))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (("gate",), "'gate': expected a regular expression, = and for each of the last dimensions one of data, fsdp,"),
        (("(=fsdp",), "missing \\)"),
        (("gate=fsdp,model",), "'gate=fsdp,model': expected"),
        (("gate=fsdp,fsdp",), "'gate=fsdp,fsdp': expected .* .each once."),
    ],
)
def test_a_wrong_rule_is_refused(rules, message):
    with pytest.raises(BadInput, match=r"config\.mesh\.rules = .*" + message):
        meshes.read_rules(rules)


@pytest.mark.parametrize(
    "sizes",
    [{"data": 3, "fsdp": 1, "tensor": 1}, {"data": -1, "fsdp": -1, "tensor": 1}, {"data": 0, "fsdp": 1, "tensor": 1}],
)
def test_an_impossible_mesh_is_refused(sizes):
    with pytest.raises(BadInput, match=r"config\.mesh"):
        meshes.create_mesh(ml_collections.ConfigDict(sizes))
