"""The Vision Transformer: published sizes, positions, pooling, errors."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sigmarep.models.vit import ViT, variant
from sigmarep.nn import TransformerConfig, fold
from sigmarep.nn.positions import sincos_2d

KEY = jax.random.key(0)
IMAGES = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
SMALL = TransformerConfig(2, 16, 4, 24)


def parameters(name, classes=1000, **fields):
    sizes = variant(name)
    patch = sizes.pop("patch_size")
    model = ViT(TransformerConfig(**sizes, **fields), patch_size=patch, num_classes=classes)
    return jax.eval_shape(model.init, KEY, jnp.zeros((1, 224, 224, 3)))


# Published with the models (timm's tables).
@pytest.mark.parametrize(
    ("name", "count"),
    [("Ti/16", 5_717_416), ("S/16", 22_050_664), ("B/16", 86_567_656), ("L/16", 304_326_632), ("H/14", 632_045_800)],
)
def test_parameter_counts_are_the_published_ones(name, count):
    shapes = parameters(name)["params"]
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)) == count


def test_fifty_layers_of_vit_b_are_reparametrised():
    spectral = parameters("B/16", reparam="sigma", qkv="fused", norm="none", scan=False)["spectral"]
    assert len(jax.tree.leaves(spectral)) == 2 * 50
    headless = parameters("B/16", classes=0, reparam="sigma", qkv="fused", scan=False)["spectral"]
    assert len(jax.tree.leaves(headless)) == 2 * 49


def test_sine_cosine_positions_equal_their_loop():
    table = sincos_2d(3, 4, 8)
    for row in range(3):
        for column in range(4):
            expected = []
            for position in (column, row):
                angles = [position / 10_000 ** (i / 2) for i in range(2)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            np.testing.assert_allclose(table[row * 4 + column], expected, rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match="width = 6: sincos positions need a multiple of 4"):
        sincos_2d(2, 2, 6)


@pytest.mark.parametrize("pool", ["token", "mean"])
@pytest.mark.parametrize("positions", ["learned", "sincos", "none"])
def test_every_choice_of_positions_and_pooling_gives_logits(pool, positions):
    model = ViT(SMALL, patch_size=2, num_classes=5, pool=pool, positions=positions)
    output, variables = model.init_with_output(KEY, IMAGES)
    assert output.shape == (2, 5)
    assert ("class_token" in variables["params"]) == (pool == "token")
    assert ("positions" in variables["params"]) == (positions == "learned")


def test_without_classes_it_gives_features():
    assert ViT(SMALL, patch_size=2, num_classes=0).init_with_output(KEY, IMAGES)[0].shape == (2, 16)


def test_the_patch_gain_scales_the_first_kernel():
    wide = dataclasses.replace(SMALL, width=64, depth=1)
    found = [
        ViT(wide, patch_size=4, num_classes=0, patch_gain=gain).init(KEY, IMAGES)["params"]["patch_embedding"]["kernel"]
        for gain in (1.0, 0.125)
    ]
    np.testing.assert_allclose(np.std(found[0]), 0.02, rtol=0.05)
    np.testing.assert_allclose(np.std(found[1]), 0.0025, rtol=0.05)


def test_bfloat16_is_close_and_keeps_float32_state():
    c = dataclasses.replace(SMALL, reparam="sigma", norm="post")
    model = ViT(c, patch_size=2, num_classes=5)
    variables = model.init(KEY, IMAGES)
    half = ViT(dataclasses.replace(c, dtype=jnp.bfloat16), patch_size=2, num_classes=5)
    output, changed = half.apply(variables, IMAGES, mutable=["spectral"])
    full, exact = model.apply(variables, IMAGES, mutable=["spectral"])
    assert output.dtype == jnp.bfloat16
    np.testing.assert_allclose(output, full, atol=0.05)
    # σ and u depend on the float32 kernels alone.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), changed, exact)


def of_vit(params, variables, model):
    output, changed = model.apply({**variables, "params": params}, IMAGES, mutable=["spectral"])
    return jnp.sum(jnp.tanh(output[:, 0])), changed


@pytest.fixture(scope="module", params=[True, False], ids=["scan", "unrolled"])
def trained(request):
    """A ViT after five steps of gradient descent, and its gradient there."""
    c = dataclasses.replace(SMALL, reparam="sigma", gamma_init="sigma", norm="none", init_std=0.2, scan=request.param)
    model = ViT(c, patch_size=2, num_classes=5)
    variables = model.init(KEY, IMAGES)
    gradient = jax.jit(jax.grad(lambda params, variables: of_vit(params, variables, model), has_aux=True))
    for _ in range(5):
        slope, changed = gradient(variables["params"], variables)
        params = jax.tree.map(lambda x, g: x - 0.05 * g, variables["params"], slope)
        variables = {"params": params, **changed}
    return model, variables, gradient(variables["params"], variables)[0]


def kernels(tree, stacked=False):
    """Every reparametrised layer's variables by path, one entry a block."""
    if "kernel" not in tree:
        for name, part in tree.items():
            if hasattr(part, "items"):
                for path, layer in kernels(part, stacked or name == "blocks"):
                    yield f"{name}/{path}", layer
    elif stacked:
        for i in range(len(tree["kernel"])):
            yield str(i), {name: value[i] for name, value in tree.items()}
    else:
        yield "", tree


def test_no_gradient_of_a_whole_model_points_along_its_kernel(trained):
    _, variables, gradient = trained
    pairs = list(zip(kernels(variables["params"]), kernels(gradient), strict=True))
    assert len(pairs) == 2 + 6 * 2
    for (path, layer), (_, slope) in pairs:
        w, g = (np.asarray(x["kernel"], np.float64) for x in (layer, slope))
        assert abs(np.sum(w * g)) < 1e-5 * np.linalg.norm(w) * np.linalg.norm(g), path


def test_every_effective_norm_of_a_resting_model_is_its_gamma(trained):
    model, variables, _ = trained
    # The last updates have just moved the kernels: let the power iteration settle on them.
    settle = jax.jit(lambda v: {**v, **model.apply(v, IMAGES, mutable=["spectral"])[1]})
    for _ in range(200):
        variables = settle(variables)
    layers = kernels(variables["params"])
    for (path, layer), (_, folded) in zip(layers, kernels(fold(variables)), strict=True):
        name = path.split("/")[-2]
        inputs = {"out": 2, "patch_embedding": 3}.get(name, 1)
        effective = np.asarray(folded["kernel"], np.float64)
        matrix = effective.reshape(int(np.prod(effective.shape[:inputs])), -1)
        np.testing.assert_allclose(np.linalg.norm(matrix, 2), abs(layer["gamma"]), rtol=1e-4, err_msg=path)


def test_a_trained_model_folds_to_the_plain_one_with_the_same_logits(trained):
    model, variables, _ = trained
    plain = ViT(dataclasses.replace(model.transformer, reparam="none"), patch_size=2, num_classes=5)
    folded = fold(variables)
    expected = jax.eval_shape(plain.init, KEY, IMAGES)["params"]
    assert jax.tree.map(jnp.shape, folded) == jax.tree.map(jnp.shape, expected)
    np.testing.assert_allclose(
        plain.apply({"params": folded}, IMAGES), model.apply(variables, IMAGES), rtol=1e-5, atol=2e-6
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patch_size": 3}, "patch_size = 3: does not divide the image of 8 x 8 pixels"),
        ({"positions": "rotary"}, "positions = 'rotary': expected one of learned, sincos, none"),
        ({"pool": "max"}, "pool = 'max': expected one of token, mean"),
    ],
)
def test_what_cannot_be_is_refused(fields, message):
    model = ViT(SMALL, **{"patch_size": 2, "num_classes": 5, **fields})
    with pytest.raises(ValueError, match=message):
        model.init(KEY, IMAGES)


@pytest.mark.parametrize("name", ["XL/16", "B", "B16", "B/0"])
def test_unknown_variants_are_refused(name):
    with pytest.raises(ValueError, match="expected one of Ti, S, B, L, H"):
        variant(name)
