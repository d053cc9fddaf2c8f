"""Weights of other projects enter every layout of a ViT, and the function is theirs.

The golden files are made by timm and transformers themselves (tests/interop/make_golden.py).
"""

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np
import pytest

from sigmarep.errors import BadInput
from sigmarep.models.vit import variant
from sigmarep.weights import load, names
from tests.weights.vits import begun, described, numpy_vit, started, vit

GOLDEN = Path(__file__).parent / "golden"
# Norms of transformers have another epsilon.
EPSILON = {"timm": 1e-6, "huggingface": 1e-12}
LAYOUTS = {
    "plain": {"reparam": "none"},
    "sigma, fused, unrolled": {"reparam": "sigma", "qkv": "fused", "scan": False},
    "sigma, qk_v, three vectors": {"reparam": "sigma", "qkv": "qk_v", "power_vectors": 3},
    "weight": {"reparam": "weight"},
    "scale": {"reparam": "scale"},
}


@pytest.fixture(scope="module")
def golden():
    def read(word):
        with np.load(GOLDEN / f"{word}.npz") as archive:
            arrays = dict(archive)
        return arrays, arrays.pop("images"), arrays.pop("logits")

    return {word: read(word) for word in EPSILON}


@pytest.mark.parametrize(("word", "layout"), [*(("timm", layout) for layout in LAYOUTS), ("huggingface", "sigma")])
def test_first_logits_are_those_of_the_package(golden, word, layout):
    arrays, images, logits = golden[word]
    model = vit(norm_epsilon=EPSILON[word], **LAYOUTS.get(layout, {"reparam": "sigma"}))
    variables, weights = begun(model, arrays, word=word)
    assert not weights.at_start
    assert not weights.unused
    got = jax.jit(model.apply)(variables, images)
    np.testing.assert_allclose(got, logits, rtol=1e-5, atol=1e-5 * np.abs(logits).max())


def test_gamma_is_the_norm_and_u_the_leading_vector(golden):
    arrays, _, _ = golden["timm"]
    variables, _ = begun(vit(reparam="sigma"), arrays)
    up = variables["params"]["encoder"]["blocks"]["mlp"]["up"]
    state = variables["spectral"]["encoder"]["blocks"]["mlp"]["up"]
    for i in range(2):
        _, s, vh = np.linalg.svd(arrays[f"blocks.{i}.mlp.fc1.weight"].T.astype(np.float64))
        np.testing.assert_allclose(up["gamma"][i], s[0], rtol=1e-5)
        np.testing.assert_allclose(state["sigma"][i], s[0], rtol=1e-5)
        assert abs(vh[0] @ np.asarray(state["u"][i])) > 1 - 1e-5


@pytest.mark.parametrize("word", EPSILON)
def test_names_and_shapes_of_a_whole_vit_b16(word):
    lines = (line.split() for line in (GOLDEN / f"{word}.txt").read_text().splitlines())
    arrays = {name: np.broadcast_to(np.float32(0), [int(x) for x in shape]) for name, *shape in lines}
    assert names.detected(arrays) == word
    sizes = variant("B/16")
    model = vit(num_classes=1000, patch_size=sizes.pop("patch_size"), reparam="none", **sizes)
    weights = load.fit(arrays, described(model, 224), word=word, path="w")
    assert not weights.at_start
    assert not weights.unused


def test_positions_are_resampled_as_timm_does():
    with np.load(GOLDEN / "positions.npz") as archive:
        stored = dict(archive)
    for new in (7, 3):
        got = load.resample_positions(stored["positions"], new * new + 1)
        np.testing.assert_allclose(got, stored[f"to_{new}"], atol=2e-6)
    np.testing.assert_array_equal(load.resample_positions(stored["positions"], 17), stored["positions"])
    # Without a class token there, and without one here.
    np.testing.assert_array_equal(load.resample_positions(stored["positions"], 16), stored["positions"][:, 1:])
    assert not load.resample_positions(stored["positions"][:, 1:], 17)[0, 0].any()


def test_another_size_another_head_and_what_is_told_of_them(golden):
    arrays, _, _ = golden["timm"]
    model = vit(num_classes=5, reparam="sigma")
    variables, weights = begun(model, {**arrays, "head_dist.weight": arrays["head.weight"]}, size=16)
    assert variables["params"]["positions"]["embedding"].shape == (1, 17, 8)
    first, *lines = weights.table()
    assert first == f"  {len(weights.params)} of {len(weights.params) + 2} parameters loaded"
    assert sorted(lines) == [
        "  at their start: head/bias, head/kernel",
        "  head: 3 outputs there and 5 here; begins anew",
        "  pos_embed: 2 x 2 positions resampled to 4 x 4",
        "  unused: head.weight, head.bias, head_dist.weight",
    ]
    start = started(described(model, 16), dataclasses.replace(weights, params={}), 16)
    for name in ("kernel", "bias", "gamma"):
        np.testing.assert_array_equal(variables["params"]["head"][name], start["params"]["head"][name])


def test_a_parameter_that_is_skipped_keeps_its_start(golden):
    arrays, _, _ = golden["timm"]
    _, weights = begun(vit(), arrays, skip=("^head/",))
    assert sorted(weights.at_start) == ["head/bias", "head/kernel"]
    with pytest.raises(BadInput, match=r"config.init_from.skip = \('haed',\): 'haed' finds none"):
        begun(vit(), arrays, skip=("haed",))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 16}, r"cls_token|patch_embed.proj.* has shape .* where the model's"),
        ({"depth": 3}, "has 2 blocks in encoder, and the model 3; set config.model.depth"),
        ({"depth": 1}, "has 2 blocks in encoder, and the model 1; set config.model.depth"),
        ({"mlp_dim": 12}, r"blocks.0.mlp.fc..\w+ has shape \(.*\) where the model's encoder/block_0/mlp/\w+/\w+ has"),
        (
            {"patch_size": 2},
            r"patch_embed.proj.weight has shape \(4, 4, 3, 8\) where the model's .* has \(2, 2, 3, 8\)",
        ),
    ],
)
def test_another_model_is_one_line(golden, fields, message):
    arrays, _, _ = golden["timm"]
    with pytest.raises(BadInput, match=message) as raised:
        begun(vit(**fields), arrays)
    assert str(raised.value).startswith("config.init_from.path = 'weights.npz': ")
    assert "\n" not in str(raised.value)


def test_weights_of_no_such_model():
    with pytest.raises(BadInput, match=r"none of its arrays is of this model under the names 'sigmarep'; it has a.b"):
        begun(vit(), {"a.b": np.zeros(3, np.float32)}, word="sigmarep")


def test_a_function_of_ones_own_names_the_arrays(golden):
    arrays, images, logits = golden["timm"]
    model = vit(scan=False)
    own = {f"my_{name}": x for name, x in names.TIMM.load(arrays, _shapes(model)).items()}
    variables, weights = begun(
        model,
        {name: x for name, (_, x) in own.items()},
        word="sigmarep",
        renamed=lambda theirs: {name.removeprefix("my_"): x for name, x in theirs.items()},
    )
    assert not weights.at_start
    np.testing.assert_allclose(jax.jit(model.apply)(variables, images), logits, rtol=1e-5, atol=1e-5)


def _shapes(model):
    params = described(model).variables["params"]
    flat = jax.tree_util.tree_leaves_with_path(params)
    return {load.path_name(path): leaf.shape for path, leaf in flat}


def big_vision_arrays(rng):
    d, n, h, m = 8, 2, 4, 16
    shapes = {"cls": (1, 1, d), "pos_embedding": (1, 4, d)}
    shapes |= {"embedding/kernel": (4, 4, 3, d), "embedding/bias": (d,), "head/kernel": (d, 3), "head/bias": (3,)}
    for i in range(2):
        block = f"Transformer/encoderblock_{i}"
        for each in ("query", "key", "value"):
            shapes[f"{block}/MultiHeadDotProductAttention_0/{each}/kernel"] = (d, n, h)
            shapes[f"{block}/MultiHeadDotProductAttention_0/{each}/bias"] = (n, h)
        shapes[f"{block}/MultiHeadDotProductAttention_0/out/kernel"] = (n, h, d)
        shapes[f"{block}/MultiHeadDotProductAttention_0/out/bias"] = (d,)
        shapes |= {f"{block}/MlpBlock_0/Dense_0/kernel": (d, m), f"{block}/MlpBlock_0/Dense_0/bias": (m,)}
        shapes |= {f"{block}/MlpBlock_0/Dense_1/kernel": (m, d), f"{block}/MlpBlock_0/Dense_1/bias": (d,)}
        shapes |= {f"{block}/LayerNorm_{j}/{leaf}": (d,) for j in (0, 1) for leaf in ("scale", "bias")}
    shapes |= {f"Transformer/encoder_norm/{leaf}": (d,) for leaf in ("scale", "bias")}
    return {name: 0.4 * rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def earlier(arrays):
    """The names of vision_transformer, whose positions have the class token's among them."""
    renamed = {}
    for name, x in arrays.items():
        for new, old in names.RENAMED.items():
            name = name.replace(old, new)
        renamed[name.replace("LayerNorm_1", "LayerNorm_2") if "encoderblock" in name else name] = x
    positions = renamed.pop("pos_embedding", None)
    if positions is None:
        positions = renamed.pop("Transformer/posembed_input/pos_embedding")
    renamed["Transformer/posembed_input/pos_embedding"] = np.pad(positions, ((0, 0), (1, 0), (0, 0)))
    return renamed


def stacked(arrays):
    """Blocks in one array each, as big_vision stores them under scan, below params/."""
    whole = {}
    for name, x in arrays.items():
        if "encoderblock_0/" in name:
            whole[name.replace("encoderblock_0", "encoderblock")] = np.stack(
                [x, arrays[name.replace("encoderblock_0", "encoderblock_1")]]
            )
        elif "encoderblock" not in name:
            whole[name] = x
    return {f"params/{name}": x for name, x in whole.items()}


@pytest.mark.parametrize("form", [dict, earlier, stacked])
def test_npz_of_big_vision(form):
    rng = np.random.default_rng(2)
    arrays, images = big_vision_arrays(rng), rng.standard_normal((2, 8, 8, 3)).astype(np.float32)
    model = vit(activation="gelu_tanh", reparam="sigma")
    variables, weights = begun(model, form(arrays), word="big_vision")
    assert names.detected(form(arrays)) == "big_vision"
    assert not weights.at_start
    assert not weights.unused
    expected = numpy_vit(arrays, images)
    np.testing.assert_allclose(jax.jit(model.apply)(variables, images), expected, rtol=1e-4, atol=1e-5)


def test_old_checkpoints_of_the_papers_vision_code(golden):
    """Its layers keep γ as `sigma` and u and σ in a module of their own; kernels of convolutions are matrices."""
    arrays, images, _ = golden["timm"]
    rng = np.random.default_rng(3)
    stored, plain = {}, dict(arrays)
    for name, x in arrays.items():
        stored[name] = x
        layer = name.removesuffix(".weight")
        if layer == name or x.ndim < 2:
            continue
        matrix = x.reshape(len(x), -1)
        _, s, vh = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
        gamma = rng.uniform(0.5, 2)
        plain[name] = (gamma / s[0] * matrix).reshape(x.shape).astype(np.float32)
        stored[name] = stored[f"{layer}.spectral_normed_weight.weight"] = matrix
        stored[f"{layer}.sigma"] = stored[f"{layer}.effective_spectral_norm"] = np.array([gamma], np.float32)
        stored[f"{layer}.spectral_normed_weight.u"] = vh[0].astype(np.float32)
        stored[f"{layer}.spectral_normed_weight.spectral_norm"] = np.array([s[0]], np.float32)
    model = vit(reparam="sigma", qkv="fused")
    variables, weights = begun(model, stored)
    assert not weights.at_start
    assert not weights.unused
    expected, _ = begun(vit(reparam="none"), plain)
    np.testing.assert_allclose(
        jax.jit(model.apply)(variables, images),
        jax.jit(vit(reparam="none").apply)(expected, images),
        rtol=1e-4,
        atol=1e-5,
    )
    assert variables["params"]["patch_embedding"]["gamma"] == pytest.approx(
        float(stored["patch_embed.proj.sigma"][0]), rel=1e-5
    )


def test_old_checkpoints_of_the_papers_speech_layers():
    """Flax layers with γ in params as `sigma` (1,), u and `norm` in spectral, here in a module of somebody's own."""
    import flax.linen as nn

    from sigmarep.nn import SigmaDense
    from sigmarep.nn.layers import describe

    class Torso(nn.Module):
        @nn.compact
        def __call__(self, x):
            return SigmaDense(3, name="out")(nn.relu(SigmaDense(5, name="in")(x)))

    rng = np.random.default_rng(4)
    stored, plain = {}, {}
    for layer, shape in (("in", (4, 5)), ("out", (5, 3))):
        kernel = rng.standard_normal(shape).astype(np.float32)
        _, s, vh = np.linalg.svd(kernel.astype(np.float64))
        stored[f"params/{layer}/kernel"], stored[f"params/{layer}/sigma"] = kernel, np.array([1.7], np.float32)
        stored[f"params/{layer}/bias"] = rng.standard_normal(shape[1]).astype(np.float32)
        stored[f"spectral/{layer}/u"], stored[f"spectral/{layer}/norm"] = vh[0].astype(np.float32), np.float32(s[0])
        plain[layer] = kernel / s[0] * 1.7, stored[f"params/{layer}/bias"]
    x = rng.standard_normal((2, 4)).astype(np.float32)
    layers = describe(Torso().init, jax.random.key(0), x)
    weights = load.fit(stored, layers, word="sigmarep", path="agent.npz")
    assert not weights.at_start
    start = functools.partial(layers.initialize, jax.random.key(0), x)
    variables = jax.jit(lambda params: load.begin(start(), params, layers))(weights.params)
    hidden = np.maximum(x @ plain["in"][0] + plain["in"][1], 0)
    np.testing.assert_allclose(Torso().apply(variables, x), hidden @ plain["out"][0] + plain["out"][1], rtol=1e-5)
    assert variables["params"]["in"]["gamma"] == pytest.approx(1.7, rel=1e-5)
