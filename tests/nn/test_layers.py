"""Layers under random names, stacked along any axis or not at all: everyone who asks about axes agrees with NumPy."""

import doctest
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from sigmarep.nn import SigmaDense, SigmaDenseGeneral, TransformerConfig, TransformerStack, fold, layers
from sigmarep.nn.qk_clip import clipped_layers, qk_clipped
from sigmarep.training import mesh as meshes
from sigmarep.training.config import default_config
from sigmarep.training.optimizers import create_optimizer, hidden_matrices
from sigmarep.training.panel import layer_statistics, panel_metrics
from sigmarep.training.spectral_steps import bound_spectral_norm

KEY = jax.random.key(0)
WIDTH, HEADS, HEAD_DIM, HIDDEN = 6, 2, 3, 10
SIZES = {"data": 2, "fsdp": 2, "tensor": 2}
X = jax.random.normal(jax.random.key(1), (2, 4, WIDTH))

# Every layer of the block below: its kernel's shape, how many of these axes are inputs, and its place on the mesh.
TRUTH = {
    "query": ((WIDTH, HEADS, HEAD_DIM), 1, ("fsdp", "tensor", None)),
    "key_value": ((WIDTH, 2, HEADS, HEAD_DIM), 1, ("fsdp", None, "tensor", None)),
    "gate": ((WIDTH, HEADS * HEAD_DIM), 1, ("fsdp", "tensor")),
    "merge": ((HEADS, HEAD_DIM, WIDTH), 2, ("tensor", None, "fsdp")),
    "up": ((WIDTH, HIDDEN), 1, ("fsdp", "tensor")),
    "down": ((HIDDEN, WIDTH), 1, ("tensor", "fsdp")),
}


def random_names(seed):
    rng = np.random.default_rng(seed)
    return {part: "".join(rng.choice(list("abcdefghij"), 8)) for part in (*TRUTH, "stack", "head")}


class Block(nn.Module):
    """A block of attention and MLP whose layers are called anything."""

    names: Any
    reparam: str

    @nn.compact
    def __call__(self, x, _=None):
        def dense(part, features, **options):
            kind = SigmaDenseGeneral if isinstance(features, tuple) or "axis" in options else SigmaDense
            init = nn.initializers.normal(0.7)
            return kind(features, kernel_init=init, reparam=self.reparam, name=self.names[part], **options)

        heads = (HEADS, HEAD_DIM)
        query = dense("query", heads, makes=("query",))(x)
        key, value = jnp.moveaxis(dense("key_value", (2, *heads), makes=("key", "value"))(x), 2, 0)
        logits = jnp.einsum("btnh,bsnh->bnts", query, key)
        self.sow("attention", "max_logit", logits.max((0, 2, 3)), init_fn=lambda: None, reduce_fn=lambda _, new: new)
        mixed = jnp.einsum("bnts,bsnh->btnh", nn.softmax(logits), value)
        mixed = mixed * nn.sigmoid(dense("gate", HEADS * HEAD_DIM)(x)).reshape(mixed.shape)
        x = x + dense("merge", WIDTH, axis=(-2, -1))(mixed)
        return x + dense("down", WIDTH)(nn.relu(dense("up", HIDDEN)(x))), None


class Model(nn.Module):
    """Blocks that are unrolled (`axis` None), scanned, or side by side under vmap, stacked along `axis`; and a head."""

    names: Any
    reparam: str
    axis: int | None
    transform: str
    depth: int

    @nn.compact
    def __call__(self, x):
        head = SigmaDense(5, reparam=self.reparam, role="output", name=self.names["head"])
        if self.axis is None:
            for i in range(self.depth):
                x, _ = Block(self.names, self.reparam, name=f"{self.names['stack']}_{i}")(x)
            return head(x)
        options = {
            "variable_axes": {"params": self.axis, "spectral": 0, "attention": 0},
            "split_rngs": {"params": True},
        }
        if self.transform == "scan":
            x, _ = nn.scan(Block, length=self.depth, **options)(self.names, self.reparam, name=self.names["stack"])(
                x, None
            )
        else:
            several = nn.vmap(Block, in_axes=None, axis_size=self.depth, **options)
            x = several(self.names, self.reparam, name=self.names["stack"])(x)[0].sum(0)
        return head(x)


# A γ and the bias of a single output axis have no axis 1 to stack along before them.
CASES = [
    (None, "scan", "none"),
    (0, "scan", "sigma"),
    (1, "scan", "none"),
    (-1, "vmap", "sigma"),
    (0, "vmap", "weight"),
]


class Case:
    """A model with its variables, and what NumPy reads of them by knowing the model."""

    def __init__(self, axis, transform, reparam):
        # A stack is as deep as there are heads: the sizes alone do not tell the axes apart.
        self.axis, self.reparam, self.depth = axis, reparam, 1 if axis is None else HEADS
        self.names = random_names(sum(map(ord, f"{axis}{transform}{reparam}")))
        self.model = Model(self.names, reparam, axis, transform, self.depth)
        self.variables = jax.jit(self.model.init)(KEY, X)
        self.params, self.state = self.variables["params"], self.variables.get("spectral", {})
        self.layers = layers.describe(self.model.init, KEY, X)

    def of_layer(self, tree, part, i, leaf="kernel"):
        """The parameter of the layer `part` in block i."""
        stack = self.names["stack"]
        module = tree[f"{stack}_{i}" if self.axis is None else stack][self.names[part]]
        x = np.asarray(module[leaf], np.float64)
        return x if self.axis is None else np.take(x, i, axis=self.axis)

    def leaves(self):
        return ["kernel", "bias"] + ["gamma"] * (self.reparam != "none")

    def matrix(self, tree, part, i):
        shape, inputs, _ = TRUTH[part]
        kernel = self.of_layer(tree, part, i)
        assert kernel.shape == shape
        return kernel.reshape(int(np.prod(shape[:inputs])), -1)

    def each(self):
        return [(part, i) for part in TRUTH for i in range(self.depth)]


@functools.cache
def case(*arguments):
    return Case(*arguments)


@pytest.fixture(params=CASES, ids=str)
def made(request):
    return case(*request.param)


def like(tree, seed):
    """A tree of random numbers."""
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(structure, [jnp.asarray(rng.normal(size=x.shape), jnp.float32) for x in leaves])


def optimizer(**fields):
    config = default_config("image_classification").unlock().optimizer
    config.update(fields)
    return config


def test_every_layer_is_described_and_the_variables_are_those_of_init(made):
    assert made.layers.unknown == ()
    assert len(made.layers) == 1 + len(TRUTH)
    assert made.layers.stacks == ({} if made.axis is None else {made.names["stack"]: 1})
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), made.variables)
    assert made.layers.variables == {name: shapes[name] for name in made.layers.variables}
    assert {layer.reparam for layer in made.layers.values()} == {made.reparam}


def test_the_panel_agrees_with_numpy(made):
    updates, gradients = like(made.params, 1), like(made.params, 2)
    statistics = jax.jit(functools.partial(layer_statistics, layers=made.layers))
    panel = {"spectral": made.state, "layers": statistics(made.params, gradients, updates, made.state)}
    metrics = panel_metrics(jax.device_get(panel), made.layers.stacks)
    for part, i in made.each():
        name = f"{made.names['stack']}_{i}/{made.names[part]}"
        weights, update = made.matrix(made.params, part, i), made.matrix(updates, part, i)
        sigma = np.linalg.norm(weights, 2)
        np.testing.assert_allclose(metrics[f"spectral/sigma/{name}"], sigma, rtol=0.02)
        np.testing.assert_allclose(metrics[f"spectral/stable_rank/{name}"], (weights**2).sum() / sigma**2, rtol=0.04)
        ratio = np.linalg.norm(update) / np.linalg.norm(weights)
        np.testing.assert_allclose(metrics[f"update/ratio/{name}"], ratio, rtol=1e-4)
        norm = np.sqrt(sum((made.of_layer(gradients, part, i, leaf) ** 2).sum() for leaf in made.leaves()))
        np.testing.assert_allclose(metrics[f"gradient/norm/{name}"], norm, rtol=1e-4)


def test_muon_makes_every_hidden_matrix_orthogonal_and_no_other(made):
    config = optimizer(name="muon", weight_decay=0.0, epsilon=1e-8)
    muon = create_optimizer(config, schedule=lambda _: 1.0, params=made.params, layers=made.layers)
    gradients = like(made.params, 3)
    updates, _ = jax.jit(muon.update)(gradients, muon.init(made.params), made.params)
    for part, i in made.each():
        change = made.matrix(updates, part, i)
        values = np.linalg.svd(change, compute_uv=False) / (0.2 * np.sqrt(max(change.shape)))
        # Five Newton-Schulz steps bring the singular values near 1, not to it.
        assert np.all((values > 0.5) & (values < 1.4)), (part, values)
    # Adam's first step is as long for every element.
    head, gradient = (tree[made.names["head"]]["kernel"] for tree in (updates, gradients))
    np.testing.assert_allclose(head, -np.sign(gradient) * abs(head[0, 0]), rtol=1e-3)


def test_an_expression_takes_a_matrix_from_muon(made):
    config = optimizer(non_matrices=(made.names["gate"],))
    taken = set(hidden_matrices(optimizer(), made.layers)) - set(hidden_matrices(config, made.layers))
    assert {layers.module.split("/")[-1] for layers in map(made.layers.get, taken)} == {made.names["gate"]}


@pytest.mark.parametrize("arguments", [CASES[1], CASES[2]], ids=str)
def test_updates_are_bounded_by_the_norm_of_their_own_matrix(arguments):
    made = case(*arguments)
    # Steps enough for random matrices, whose first singular values lie close together.
    bound = bound_spectral_norm(0.1, hidden_matrices(optimizer(), made.layers), iterations=8)
    update, state = jax.jit(bound.update), bound.init(made.params)
    for _ in range(4):
        updates, state = update(like(made.params, 4), state, made.params)
    for part, i in made.each():
        norms = [np.linalg.norm(made.matrix(tree, part, i), 2) for tree in (updates, made.params)]
        np.testing.assert_allclose(norms[0], 0.1 * norms[1], rtol=0.1)
    # The head is no hidden matrix.
    np.testing.assert_array_equal(*(tree[made.names["head"]]["kernel"] for tree in (updates, like(made.params, 4))))


def test_heads_and_hidden_units_are_spread_over_tensor_and_what_meets_them_over_fsdp(made):
    mesh = meshes.create_mesh(SIZES)
    placed = meshes.state_shardings({"mu": made.params}, mesh, made.layers)["mu"]
    for part, (_, _, axes) in TRUTH.items():
        stack = made.names["stack"]
        spec = placed[f"{stack}_0" if made.axis is None else stack][made.names[part]]["kernel"].spec
        expected = list(axes)
        if made.axis is not None:
            expected.insert(made.axis % (len(axes) + 1), None)
        assert spec == PartitionSpec(*expected), part
    assert placed[made.names["head"]]["kernel"].spec == PartitionSpec("fsdp", None)


def test_folding_divides_every_matrix_by_its_own_norm(made):
    folded = fold(made.variables, layers=made.layers)
    for part, i in made.each():
        weights = made.matrix(made.params, part, i)
        # γ starts at 1.
        norm = {"none": 1.0, "sigma": np.linalg.norm(weights, 2), "weight": np.linalg.norm(weights, axis=0)}[
            made.reparam
        ]
        np.testing.assert_allclose(made.matrix(folded, part, i), weights / norm, rtol=1e-4, atol=1e-6)
    plain = jax.jit(made.model.clone(reparam="none").apply)({"params": folded}, X)
    np.testing.assert_allclose(plain, jax.jit(made.model.apply)(made.variables, X), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("arguments", [each for each in CASES if each[2] == "none"], ids=str)
def test_qk_clip_scales_the_heads_of_queries_and_keys_and_nothing_else(arguments):
    made = case(*arguments)
    _, recorded = jax.jit(functools.partial(made.model.apply, mutable=["attention"]))(made.variables, X)
    largest = [np.asarray(x).reshape(-1, HEADS) for x in jax.tree.leaves(recorded["attention"])]
    largest = np.concatenate(largest)
    threshold = float(np.sort(largest.ravel())[1])
    clipped = qk_clipped(made.params, recorded["attention"], made.layers, threshold)
    assert {layer.module.split("/")[-1] for layer in clipped_layers(made.layers)} == {
        made.names["query"],
        made.names["key_value"],
    }
    for part, i in made.each():
        factor = np.ones(TRUTH[part][0])
        root = np.sqrt(np.minimum(1, threshold / largest[i]))
        if part == "query":
            factor = factor * root[:, None]
        if part == "key_value":
            factor[:, 0] *= root[:, None]
        before, after = (made.of_layer(tree, part, i) for tree in (made.params, clipped))
        np.testing.assert_allclose(after, before * factor, rtol=1e-5)
        biases = [made.of_layer(tree, part, i, "bias") for tree in (made.params, clipped)]
        np.testing.assert_allclose(biases[1], biases[0] * factor[0] if part in ("query", "key_value") else biases[0])


def times(x, kernel, layer):
    """x, its contracted axes last, times the layer's matrix."""
    flat = np.asarray(x, np.float64).reshape(*x.shape[: x.ndim - len(layer.inputs) + len(layer.window)], -1)
    return flat @ np.asarray(layer.matrices(kernel), np.float64)


NUMBERS = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)


@pytest.mark.parametrize(
    ("module", "kernel", "moved"),
    [
        (nn.Dense(7), "kernel", (0, 1, 2, 3)),
        (nn.DenseGeneral((7, 2), axis=(1, 3)), "kernel", (0, 2, 1, 3)),
        (nn.DenseGeneral(7, axis=(-2, -1)), "kernel", (0, 1, 2, 3)),
        (nn.Einsum((5, 3, 7), "btcd,dtk->bck"), "kernel", (0, 2, 3, 1)),
        (nn.Einsum((7, 4, 5), "btcd,kcd->btk"), "kernel", (0, 1, 2, 3)),
    ],
    ids=str,
)
def test_flax_layers_are_products_with_the_matrices_of_their_description(module, kernel, moved):
    module = module.clone(use_bias=False)
    layer = layers.describe(module.init, KEY, NUMBERS)[kernel]
    variables = module.init(KEY, NUMBERS)
    found = module.apply(variables, NUMBERS)
    expected = times(np.transpose(NUMBERS, moved), variables["params"][kernel], layer)
    np.testing.assert_allclose(np.ravel(found), np.ravel(expected), rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(
        layer.restored(layer.matrices(variables["params"][kernel])), variables["params"][kernel]
    )


def test_matrices_within_a_layer_are_apart():
    for module in (nn.DenseGeneral(7, axis=-1, batch_dims=(0,)), nn.Einsum((2, 5, 7), "btcd,bdk->btck")):
        layer = layers.describe(module.init, KEY, NUMBERS)["kernel"]
        assert (layer.batch, layer.inputs, layer.outputs) == ((0,), (1,), (2,))
        params = module.init(KEY, NUMBERS)["params"]
        zeros = jax.tree.map(jnp.zeros_like, params)
        described = layers.describe(module.init, KEY, NUMBERS)
        statistics = layer_statistics(params, zeros, zeros, {}, described)
        expected = max(np.linalg.norm(np.asarray(x), 2) for x in params["kernel"])
        np.testing.assert_allclose(statistics["sigma"], expected, rtol=0.02)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_over_its_own_window_is_a_product(groups):
    pictures = np.random.default_rng(1).normal(size=(2, 2, 3, 4)).astype(np.float32)
    module = nn.Conv(6, (2, 3), padding="VALID", use_bias=False, feature_group_count=groups)
    layer = layers.describe(module.init, KEY, pictures)["kernel"]
    assert (layer.window, layer.inputs, layer.outputs, layer.groups) == ((0, 1), (0, 1, 2), (3,), groups)
    variables = module.init(KEY, pictures)
    matrix = np.asarray(layer.matrices(variables["params"]["kernel"]))
    parts = [
        pictures[..., group * 4 // groups : (group + 1) * 4 // groups].reshape(2, -1)
        @ matrix[:, group * 6 // groups : (group + 1) * 6 // groups]
        for group in range(groups)
    ]
    found = module.apply(variables, pictures)[:, 0, 0]
    np.testing.assert_allclose(found, np.concatenate(parts, axis=-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
def test_other_convolutions(transposed):
    module = nn.ConvTranspose(6, (3,), transpose_kernel=transposed)
    layer = layers.describe(module.init, KEY, NUMBERS[0])["kernel"]
    assert layer.shape == ((3, 6, 5) if transposed else (3, 5, 6))
    assert (layer.inputs, layer.outputs) == (((0, 2), (1,)) if transposed else ((0, 1), (2,)))
    local = layers.describe(nn.ConvLocal(6, (3,), padding="VALID").init, KEY, NUMBERS[0])["kernel"]
    assert (local.shape, local.batch, local.inputs, local.outputs) == ((2, 15, 6), (0,), (1,), (2,))


def test_flax_attention_and_tables():
    described = layers.describe(nn.MultiHeadDotProductAttention(num_heads=2).init, KEY, X)
    assert {name: len(layer.inputs) for name, layer in described.items()} == {
        "query/kernel": 1,
        "key/kernel": 1,
        "value/kernel": 1,
        "out/kernel": 2,
    }
    table = layers.describe(nn.Embed(9, 4).init, KEY, jnp.zeros((1,), jnp.int32))["embedding"]
    assert (table.inputs, table.outputs, table.role) == ((0,), (1,), "input")


class Custom(nn.Module):
    """A module with kernels of its own: one states its axes, the others do not."""

    linear_axes = {"stated": layers.Axes(inputs=(1,), outputs=(0,))}  # noqa: RUF012

    @nn.compact
    def __call__(self, x):
        normal = nn.initializers.normal(1.0)
        for name, shape in {"stated": (3, 6), "kernel": (6, 3), "token": (1, 1, 6)}.items():
            self.param(name, normal, shape)
        return nn.Dense(2, name="dense")(x)


def test_what_states_no_axes_is_unknown_and_left_alone():
    described = layers.describe(Custom().init, KEY, X)
    assert described.unknown == ("kernel",)
    assert set(described) == {"stated", "dense/kernel"}
    assert (described["stated"].inputs, described["stated"].outputs) == ((1,), (0,))
    mesh = meshes.create_mesh(SIZES)
    assert meshes.partition_spec("params/kernel", (6, 3), mesh, described) == PartitionSpec(None, None)
    with pytest.raises(ValueError, match="role = 'last': expected one of hidden, input, output"):
        layers.describe(SigmaDense(3, role="last").init, KEY, X)


def test_sharing_several_stacks_and_sizes_that_all_agree():
    class Shared(nn.Module):
        @nn.compact
        def __call__(self, x):
            inner = nn.vmap(nn.Dense, variable_axes={"params": 2}, split_rngs={"params": True}, axis_size=4)
            outer = nn.vmap(inner, variable_axes={"params": 1}, split_rngs={"params": True}, in_axes=None, axis_size=4)
            several = outer(4, use_bias=False, name="several")
            return several(x) + several(x)

    described = layers.describe(Shared().init, KEY, jnp.zeros((4, 1, 4)))
    layer = described["several/kernel"]
    assert layer.shape == (4, 4, 4, 4)
    # The inner transformation has made (in, out, inner) of it, the outer one (in, outer, out, inner).
    assert (layer.stacked, layer.inputs, layer.outputs) == ((1, 3), (0,), (2,))
    assert described.stacks == {"several": 2}


def test_describing_leaves_nothing_behind():
    class Jitted(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.jit(nn.Dense)(3, name="dense")(x)

    init = jax.jit(Jitted().init)
    described = [layers.describe(init, KEY, X)["dense/kernel"] for _ in "ab"]
    assert described[0] == described[1]
    assert set(init(KEY, X)["params"]["dense"]) == {"kernel", "bias"}


@pytest.mark.parametrize("scan", [False, True])
def test_the_projects_own_stack(scan):
    stack = TransformerStack(TransformerConfig(depth=2, width=8, num_heads=2, mlp_dim=12, qkv="fused", scan=scan))
    described = layers.describe(stack.init, KEY, jnp.zeros((1, 3, 8)))
    block = "blocks" if scan else "block_1"
    layer = described[f"{block}/attention/qkv/kernel"]
    assert layer.makes == ("query", "key", "value")
    assert layer.matrices(jnp.zeros(layer.shape)).shape == ((2, 8, 24) if scan else (8, 24))
    assert described.stacked[f"{block}/mlp_norm/scale"] == ((0,) if scan else ())
    assert described.stacked["norm/scale"] == ()


def test_the_examples_in_the_docstring():
    assert doctest.testmod(layers).failed == 0
