"""Whole models against an independent float64 implementation of the paper's reference code."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sigmarep.models.vit import ViT
from sigmarep.nn import TransformerConfig, TransformerStack
from sigmarep.nn.visibility import Visibility
from tests.nn import reference

DEPTH, WIDTH, HEADS, HIDDEN = 2, 16, 4, 24


def config(**fields):
    return TransformerConfig(DEPTH, WIDTH, HEADS, HIDDEN, scan=False, init_std=0.3, **fields)


def drifted(variables):
    """Parameters moved away from their start, so that the stored u is no longer the SVD's and γ is not γ₀."""
    leaves, treedef = jax.tree.flatten(variables["params"])
    rng = np.random.default_rng(0)
    moved = [x + 0.05 * rng.normal(size=x.shape).astype(np.float32) for x in leaves]
    return {**variables, "params": jax.tree.unflatten(treedef, moved)}


def spectral_state(variables):
    state = reference.flat(variables.get("spectral", {}))
    return {name.removesuffix("/u"): value.astype(np.float64) for name, value in state.items() if name.endswith("/u")}


def compare(model, inputs, c, compute, **options):
    """Two training applies, the second from the state of the first, then an evaluation."""
    variables = drifted(model.init(jax.random.key(0), inputs, **options))
    u = spectral_state(variables)
    params = reference.flat(variables["params"])
    for _ in range(2):
        expected = reference.Model(params, u, reparam=c.reparam, training=True)
        output, recorded = compute(expected)
        found, changed = model.apply(variables, inputs, mutable=["spectral", "attention"], **options)
        np.testing.assert_allclose(found, output, rtol=1e-5, atol=1e-5)
        attention = reference.flat(changed.pop("attention"))
        for i, weights in enumerate(recorded):
            rows = -np.where(weights > 0, weights * np.log(np.where(weights > 0, weights, 1)), 0).sum(-1)
            lengths = getattr(compute, "lengths", [weights.shape[2]] * len(weights))
            real = np.concatenate([rows[b, :, : lengths[b]] for b in range(len(rows))], axis=-1)
            name = next(name for name in attention if f"block_{i}/" in name and name.endswith("/entropy"))
            np.testing.assert_allclose(attention[name], real.mean(-1), rtol=1e-4, atol=1e-5)
        variables = {**variables, **changed}
        u = expected.u
        state = reference.flat(variables.get("spectral", {}))
        for path, sigma in expected.sigma.items():
            np.testing.assert_allclose(state[f"{path}/u"], u[path], rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(state[f"{path}/sigma"], sigma, rtol=1e-5)
    output, _ = compute(reference.Model(params, u, reparam=c.reparam, training=False))
    np.testing.assert_allclose(model.apply(variables, inputs, **options), output, rtol=1e-5, atol=1e-5)


VISION = [
    {"reparam": "none"},
    {"reparam": "sigma", "gamma_init": "sigma"},
    {"reparam": "sigma", "gamma_init": "one"},
    {"reparam": "spectral"},
    {"reparam": "weight", "gamma_init": "sigma"},
]


@pytest.mark.parametrize("norm", ["pre", "none"])
@pytest.mark.parametrize("fields", VISION, ids=lambda f: "-".join(f.values()))
def test_vision_models_equal_the_reference(norm, fields):
    c = config(norm=norm, qkv="fused", **fields)
    pool = "token" if norm == "pre" else "mean"
    model = ViT(c, patch_size=2, num_classes=5, pool=pool)
    images = np.random.default_rng(1).normal(size=(2, 8, 8, 3)).astype(np.float32)

    def compute(expected):
        return expected.vit(
            images.astype(np.float64),
            patch=2,
            width=WIDTH,
            classes=5,
            pool=pool,
            depth=DEPTH,
            heads=HEADS,
            hidden=HIDDEN,
            norm=norm,
            qkv="fused",
            activation="gelu",
            epsilon=c.norm_epsilon,
        )

    compare(model, images, c, compute)


@pytest.mark.parametrize("norm", ["post", "pre", "none", "deepnorm"])
@pytest.mark.parametrize("qkv", ["fused", "qk_v", "separate"])
@pytest.mark.parametrize("reparam", ["none", "sigma"])
def test_speech_blocks_equal_the_reference_with_padding(norm, qkv, reparam):
    c = config(norm=norm, qkv=qkv, reparam=reparam, use_bias=False, activation="relu", norm_epsilon=1e-5)
    lengths = [7, 4]
    x = np.random.default_rng(1).normal(size=(2, 7, WIDTH)).astype(np.float32)

    def compute(expected):
        return expected.stack(
            x.astype(np.float64),
            "encoder",
            depth=DEPTH,
            heads=HEADS,
            hidden=HIDDEN,
            norm=norm,
            qkv=qkv,
            activation="relu",
            epsilon=1e-5,
            lengths=lengths,
        )

    compute.lengths = lengths

    class Speech(nn.Module):
        @nn.compact
        def __call__(self, x, key_mask):
            return TransformerStack(c, name="encoder")(x, visibility=Visibility(key_mask=key_mask))

    padding = jnp.arange(7)[None] < jnp.asarray(lengths)[:, None]
    compare(Speech(), x, c, compute, key_mask=padding)


def test_gamma_starts_as_asked_and_sigma_is_right_at_the_first_step():
    c = config(reparam="sigma", gamma_init="sigma", qkv="fused")
    images = jnp.zeros((1, 8, 8, 3))
    with_sigma = ViT(c, patch_size=2, num_classes=5).init(jax.random.key(0), images)
    with_one = ViT(dataclasses.replace(c, gamma_init="one"), patch_size=2, num_classes=5).init(
        jax.random.key(0), images
    )
    kernels = {n: x for n, x in reference.flat(with_sigma["params"]).items() if n.endswith("/kernel")}
    state = reference.flat(with_sigma["spectral"])
    gammas = reference.flat(with_sigma["params"])
    assert len(kernels) == 2 + 4 * DEPTH
    for name, kernel in kernels.items():
        path = name.removesuffix("/kernel")
        exact = np.linalg.norm(kernel.astype(np.float64).reshape(-1, state[f"{path}/u"].size), 2)
        np.testing.assert_allclose(state[f"{path}/sigma"], exact, rtol=1e-5)
        np.testing.assert_allclose(gammas[f"{path}/gamma"], exact, rtol=1e-5)
        assert reference.flat(with_one["params"])[f"{path}/gamma"] == 1.0
