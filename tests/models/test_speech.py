"""The speech model against an independent float64 forward pass, and what padding must not change."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sigmarep.models import ctc
from sigmarep.models.speech import SpeechTransformer
from sigmarep.nn import TransformerConfig
from sigmarep.nn.norms import MaskedNorm
from sigmarep.nn.positions import ContinuousPositions
from tests.nn import reference
from tests.nn.test_reference import drifted, spectral_state

WIDTH, HEADS, HIDDEN, DEPTH, FILTERS, LABELS = 16, 4, 24, 2, 5, 6
LENGTH, FRAMES = 24, [24, 17]
LENGTHS = [8, 5]


def blocks(**fields):
    options = {"norm": "post", "reparam": "sigma", "qkv": "qk_v"} | fields
    return TransformerConfig(
        DEPTH,
        WIDTH,
        HEADS,
        HIDDEN,
        use_bias=False,
        activation="relu",
        norm_epsilon=1e-5,
        branch_dropout=False,
        attention_shift=True,
        kernel_init="normal",
        init_std=0.3,
        scan=False,
        **options,
    )


def model(conv=False, **fields):
    return SpeechTransformer(blocks(**fields), LABELS, conv_reparam=conv, freq_scale=3.0)


def utterances(rng, length=LENGTH, frames=FRAMES):
    features = rng.normal(1.0, 2.0, size=(len(frames), length, FILTERS)).astype(np.float32)
    return features, np.array(frames, np.int32)


def logits_of(expected, features, frames, *, norm, qkv, conv=False):
    return expected.speech(
        features,
        frames,
        width=WIDTH,
        labels=LABELS,
        freq_scale=3.0,
        conv=conv,
        depth=DEPTH,
        heads=HEADS,
        hidden=HIDDEN,
        norm=norm,
        qkv=qkv,
        activation="relu",
        epsilon=1e-5,
    )


@pytest.mark.parametrize("norm", ["post", "pre", "none"])
@pytest.mark.parametrize("qkv", ["fused", "qk_v", "separate"])
@pytest.mark.parametrize("reparam", ["none", "sigma"])
def test_it_equals_the_float64_forward_pass_with_padding(norm, qkv, reparam):
    features, frames = utterances(np.random.default_rng(1))
    found = model(norm=norm, qkv=qkv, reparam=reparam)
    variables = drifted(jax.jit(found.init)(jax.random.key(0), features, frames))
    expected = reference.Model(
        reference.flat(variables["params"]), spectral_state(variables), reparam=reparam, training=True
    )
    logits, recorded = logits_of(expected, features, FRAMES, norm=norm, qkv=qkv)
    output, changed = found.apply(variables, features, frames, mutable=["spectral", "attention"])
    assert output.frames.tolist() == LENGTHS
    for row, real in enumerate(LENGTHS):
        np.testing.assert_allclose(output.logits[row, :real], logits[row, :real], rtol=1e-5, atol=1e-5)
    for path, sigma in expected.sigma.items():
        np.testing.assert_allclose(reference.flat(changed["spectral"])[f"{path}/sigma"], sigma, rtol=1e-5)
    for i, weights in enumerate(recorded):
        rows = -np.where(weights > 0, weights * np.log(np.where(weights > 0, weights, 1)), 0).sum(-1)
        real = np.concatenate([rows[b, :, :length] for b, length in enumerate(LENGTHS)], axis=-1)
        entropy = changed["attention"]["encoder"][f"block_{i}"]["attention"]["entropy"]
        np.testing.assert_allclose(entropy, real.mean(-1), rtol=1e-4, atol=1e-5)


def test_the_reparametrised_front_end_equals_it_too():
    features, frames = utterances(np.random.default_rng(1))
    found = model(conv=True)
    variables = drifted(jax.jit(found.init)(jax.random.key(0), features, frames))
    expected = reference.Model(
        reference.flat(variables["params"]), spectral_state(variables), reparam="sigma", training=False
    )
    logits, _ = logits_of(expected, features, FRAMES, norm="post", qkv="qk_v", conv=True)
    np.testing.assert_allclose(
        found.apply(variables, features, frames).logits[0], logits[0].astype(np.float32), rtol=1e-5, atol=1e-5
    )


def test_the_papers_model_has_its_number_of_parameters():
    blocks = TransformerConfig(
        36, 768, 4, 3072, norm="post", reparam="sigma", qkv="qk_v", use_bias=False, attention_shift=True
    )
    abstract = jax.eval_shape(
        SpeechTransformer(blocks, 29).init, jax.random.key(0), jnp.zeros((1, 30, 80)), jnp.full(1, 30)
    )
    assert sum(int(np.prod(x.shape)) for x in jax.tree.leaves(abstract["params"])) == 255_798_776


def result_of(found, variables, batch):
    """Logits, loss, gradient and entropies of a batch."""

    def loss(params):
        output, changed = found.apply(
            {**variables, "params": params}, batch["features"], batch["frames"], mutable=["attention"]
        )
        losses = ctc.ctc_losses(output.logits, output.frames, batch["labels"], batch["label_lengths"])
        return jnp.sum(losses.nll), (output.logits, losses.nll, changed["attention"])

    (_, aux), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])
    return *aux, gradient


def batch_of(features, frames, labels, *, length, rows, most):
    """The utterances in a batch of another shape, filled with nonsense that no result may depend on."""
    rng = np.random.default_rng(9)
    batch = {
        "features": rng.normal(5.0, 9.0, size=(rows, length, FILTERS)).astype(np.float32),
        "frames": np.zeros(rows, np.int32),
        "labels": np.zeros((rows, most), np.int32),
        "label_lengths": np.zeros(rows, np.int32),
    }
    for row, (each, real, written) in enumerate(zip(features, frames, labels, strict=True)):
        batch["features"][row, :real] = each[:real]
        batch["frames"][row] = real
        batch["labels"][row, : len(written)] = written
        batch["label_lengths"][row] = len(written)
    return batch


@pytest.mark.parametrize("norm", ["post", "none"])
def test_neither_padding_nor_the_other_rows_nor_their_order_change_anything(norm):
    features, frames = utterances(np.random.default_rng(1))
    labels = [[1, 2, 2, 5], [3, 4]]
    found = model(norm=norm)
    variables = drifted(jax.jit(found.init)(jax.random.key(0), features, frames))
    one = result_of(found, variables, batch_of(features, frames, labels, length=24, rows=2, most=4))
    other = result_of(found, variables, batch_of(features[::-1], frames[::-1], labels[::-1], length=36, rows=4, most=7))
    for row, real in enumerate(LENGTHS):
        np.testing.assert_allclose(one[0][row, :real], other[0][1 - row, :real], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(one[1][row], other[1][1 - row], rtol=1e-5)
    assert np.all(np.asarray(other[1][2:]) == 0)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), (one[2], one[3]), (other[2], other[3])
    )


def test_the_norm_of_an_utterance_is_that_of_its_real_frames():
    x = np.random.default_rng(0).normal(3.0, 2.0, size=(2, 6, 4)).astype(np.float32)
    real = np.arange(6)[None] < np.array([[6], [2]])
    norm = MaskedNorm()
    y = norm.apply(norm.init(jax.random.key(0), x, real), x, real)
    np.testing.assert_allclose(y[1, :2].mean(), 0.0, atol=1e-6)
    np.testing.assert_allclose(y[1, :2].std(), 1.0, rtol=1e-5)
    assert np.all(np.asarray(y[1, 2:]) == 0)
    assert np.all(np.isfinite(norm.apply(norm.init(jax.random.key(0), x, real), x, np.zeros((2, 6), bool))))


def sinusoids(**fields):
    real = jnp.ones((2, 40), bool)
    positions = ContinuousPositions(freq_scale=1.0, **fields)
    x = jnp.zeros((2, 40, 4))

    def of(key):
        y = positions.apply({}, x, real, deterministic=False, rngs={"dropout": jax.random.key(key)})
        # The last pair of features is slow: its angle gives the position back.
        return np.asarray(jnp.arctan2(y[..., 2], y[..., 3])) * 100.0

    return of, np.asarray(jnp.arctan2(*(positions.apply({}, x, real)[..., i] for i in (2, 3))) * 100.0)


def test_a_global_shift_moves_a_whole_utterance():
    of, still = sinusoids(max_global_shift=5.0)
    moved = of(0) - still
    np.testing.assert_allclose(moved - moved[:, :1], 0.0, atol=1e-3)
    assert abs(moved[0, 0] - moved[1, 0]) > 1e-2
    assert np.abs(moved).max() <= 5.0


def test_a_local_shift_moves_each_step_by_parts_of_a_step():
    of, still = sinusoids(max_local_shift=0.5)
    moved = of(0) - still
    assert np.abs(moved).max() <= 0.5 * 0.03 + 1e-4
    assert moved.std() > 0.2 * 0.03


def test_a_stretch_multiplies_all_positions():
    of, still = sinusoids(max_scale=1.5)
    ratio = of(0)[:, 0] / still[:, 0]
    np.testing.assert_allclose(of(0), still * ratio[:, None], atol=1e-3)
    assert np.all((ratio > 1 / 1.5) & (ratio < 1.5))


def test_shift_and_stretch_are_drawn_apart():
    # Were both drawn from one key, the stretch would follow from the shift.
    of, still = sinusoids(max_global_shift=3.0, max_local_shift=1.0, max_scale=1.5)
    draws = []
    for key in range(12):
        for y, p in zip(of(key), still, strict=True):
            slope, offset = np.polyfit(p, y, 1)
            draws.append((np.log(slope), offset / slope))
    assert abs(np.corrcoef(np.array(draws).T)[0, 1]) < 0.8


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"conv_stride": 5, "conv_kernel": 3}, "conv_stride = 5, conv_kernel = 3"),
        ({"conv_stride": 7}, "conv_stride = 7: does not divide the 24 frames"),
        ({"max_scale": 0.5}, "max_scale = 0.5"),
    ],
)
def test_impossible_fields_are_named(fields, message):
    features, frames = utterances(np.random.default_rng(1))
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(model(), **fields).init(jax.random.key(0), features, frames)
