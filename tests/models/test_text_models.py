"""Language model and encoder-decoder against independent float64 sums, and against themselves in other layouts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sigmarep.models.lm import LanguageModel
from sigmarep.models.seq2seq import Seq2Seq, deepnorm_constants
from sigmarep.nn import TransformerConfig
from sigmarep.nn.positions import rotated, sincos_1d
from sigmarep.nn.tokens import TokenEmbedding
from tests.nn import reference
from tests.nn.test_reference import drifted, spectral_state

DEPTH, WIDTH, HEADS, HIDDEN, VOCABULARY = 2, 16, 4, 24, 11
STACK = TransformerConfig(DEPTH, WIDTH, HEADS, HIDDEN, scan=False, init_std=0.3)
RNG = np.random.default_rng(0)
SOURCE = np.array([[3, 4, 5, 6, 7, 2], [8, 9, 2, 0, 0, 0], [10, 2, 0, 0, 0, 0]], np.int32)
INPUTS = np.array([[1, 4, 4, 8, 9], [1, 10, 3, 0, 0], [1, 0, 0, 0, 0]], np.int32)
TARGETS = np.array([[4, 4, 8, 9, 2], [10, 3, 2, 0, 0], [2, 0, 0, 0, 0]], np.int32)


def losses_init(model, *arguments):
    return model.init(jax.random.key(0), *arguments, method="losses")


@pytest.mark.parametrize("reparam", ["none", "sigma"])
@pytest.mark.parametrize("norm", ["none", "pre", "post", "deepnorm"])
def test_translation_equals_float64(norm, reparam):
    constants = deepnorm_constants(DEPTH, DEPTH)
    stack = dataclasses.replace(STACK, norm=norm, reparam=reparam)
    encoder, decoder = (dataclasses.replace(stack, **constants[name]) for name in ("encoder", "decoder"))
    model = Seq2Seq(encoder, decoder, VOCABULARY, 16)
    variables = drifted(losses_init(model, SOURCE, INPUTS, TARGETS))
    expected = reference.Model(
        reference.flat(variables["params"]), spectral_state(variables), reparam=reparam, training=True
    )
    alphas = [constants[name]["residual_scale"] if norm == "deepnorm" else None for name in ("encoder", "decoder")]
    log_p, _, written = expected.translate(
        SOURCE,
        INPUTS,
        width=WIDTH,
        alphas=alphas,
        depth=DEPTH,
        heads=HEADS,
        hidden=HIDDEN,
        norm=norm,
        qkv="separate",
        activation="gelu",
        epsilon=1e-6,
    )
    found, changed = jax.jit(lambda v: model.apply(v, SOURCE, INPUTS, mutable=["spectral", "attention"]))(variables)
    np.testing.assert_allclose(found, log_p, rtol=2e-5, atol=3e-5)
    for path, sigma in expected.sigma.items():
        np.testing.assert_allclose(reference.flat(changed["spectral"])[f"{path}/sigma"], sigma, rtol=1e-5)
    # Entropy over real queries: of the decoder's own attention, then of that to the source.
    attention = reference.flat(changed["attention"])
    for i in range(DEPTH):
        for name, weights in zip(("attention", "cross_attention"), written[2 * i : 2 * i + 2], strict=True):
            rows = -np.where(weights > 0, weights * np.log(np.where(weights > 0, weights, 1)), 0).sum(-1)
            mean = np.moveaxis(rows, 1, -1)[INPUTS != 0].mean(0)
            np.testing.assert_allclose(attention[f"decoder/block_{i}/{name}/entropy"], mean, atol=2e-5)


def test_deepnorm_constants_equal_the_published_ones():
    expected = {6: (1.418, 0.497, 2.060, 0.343), 18: (1.999, 0.353, 2.711, 0.261), 100: (3.416, 0.206, 4.162, 0.170)}
    for depth, values in expected.items():
        constants = deepnorm_constants(depth, depth)
        found = [*constants["encoder"].values(), *constants["decoder"].values()]
        np.testing.assert_allclose(found, values, atol=1e-3)


def total_loss(model, params, state, source, inputs, targets):
    losses = model.apply({"params": params, **state}, source, inputs, targets, method="losses")
    return jnp.sum(losses.nll * (targets != 0))


def test_padding_changes_neither_loss_nor_gradient():
    model = Seq2Seq(*[dataclasses.replace(STACK, norm="post", reparam="sigma")] * 2, VOCABULARY, 16)
    variables = losses_init(model, SOURCE, INPUTS, TARGETS)
    params, state = variables["params"], {"spectral": variables["spectral"]}
    longer = [np.pad(x, ((0, 2), (0, 5))) for x in (SOURCE, INPUTS, TARGETS)]
    compute = jax.jit(jax.value_and_grad(total_loss, argnums=1), static_argnums=0)
    loss, gradient = compute(model, params, state, SOURCE, INPUTS, TARGETS)
    padded_loss, padded_gradient = compute(model, params, state, *longer)
    assert float(loss) == pytest.approx(float(padded_loss), rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), gradient, padded_gradient)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_scanned_stacks_equal_unrolled_ones(remat):
    stack = dataclasses.replace(STACK, norm="post", reparam="sigma")
    unrolled = Seq2Seq(stack, stack, VOCABULARY, 16)
    scanned_stack = dataclasses.replace(stack, scan=True, remat=remat)
    scanned = Seq2Seq(scanned_stack, scanned_stack, VOCABULARY, 16)
    variables = losses_init(unrolled, SOURCE, INPUTS, TARGETS)

    def stacked(tree):
        return {
            name: {"blocks": jax.tree.map(lambda *x: jnp.stack(x), *(part[f"block_{i}"] for i in range(DEPTH)))}
            if name in ("encoder", "decoder")
            else part
            for name, part in tree.items()
        }

    params, state = variables["params"], variables["spectral"]
    compute = jax.jit(jax.value_and_grad(total_loss, argnums=1), static_argnums=0)
    loss, gradient = compute(unrolled, params, {"spectral": state}, SOURCE, INPUTS, TARGETS)
    other_loss, other = compute(scanned, stacked(params), {"spectral": stacked(state)}, SOURCE, INPUTS, TARGETS)
    assert float(loss) == pytest.approx(float(other_loss), rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), stacked(gradient), other)


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "rotary"])
def test_packed_documents_do_not_see_each_other(positions):
    stack = dataclasses.replace(STACK, norm="post", rotary_base=1e4 if positions == "rotary" else 0.0)
    model = LanguageModel(stack, VOCABULARY, 16, positions="none" if positions == "rotary" else positions)
    first, second = RNG.integers(1, VOCABULARY, (1, 5)), RNG.integers(1, VOCABULARY, (1, 3))
    packed = np.concatenate([first, second, np.zeros((1, 2), int)], axis=1)
    variables = model.init(jax.random.key(0), packed)
    segments = np.array([[1] * 5 + [2] * 3 + [0] * 2])
    place = np.array([[0, 1, 2, 3, 4, 0, 1, 2, 0, 1]])
    found = model.apply(variables, packed, segments=segments, positions=place)
    np.testing.assert_allclose(found[:, :5], model.apply(variables, first), atol=1e-5)
    np.testing.assert_allclose(found[:, 5:8], model.apply(variables, second), atol=1e-5)
    unseparated = model.apply(variables, packed, positions=place)
    assert np.abs(found - unseparated)[:, 5:8].max() > 1e-3


def test_entropy_of_packed_documents_is_that_of_the_documents():
    stack = dataclasses.replace(STACK, depth=1)
    model = LanguageModel(stack, VOCABULARY, 16)
    tokens = RNG.integers(1, VOCABULARY, (1, 8))
    variables = model.init(jax.random.key(0), tokens)

    def entropy(tokens, segments=None):
        _, changed = model.apply(variables, tokens, segments=segments, mutable=["attention"])
        return np.asarray(changed["attention"]["decoder"]["block_0"]["attention"]["entropy"])

    apart = (5 * entropy(tokens[:, :5]) + 3 * entropy(tokens[:, 5:])) / 8
    packed = np.pad(tokens, ((0, 0), (0, 4)))
    segments = np.array([[1] * 5 + [2] * 3 + [0] * 4])
    np.testing.assert_allclose(entropy(packed, segments), apart, atol=1e-5)


def test_the_future_is_not_seen():
    model = LanguageModel(dataclasses.replace(STACK, rotary_base=1e4), VOCABULARY, 16)
    tokens = RNG.integers(1, VOCABULARY, (2, 8))
    variables = model.init(jax.random.key(0), tokens)
    other = tokens.copy()
    other[:, 5:] = (other[:, 5:] % (VOCABULARY - 1)) + 1
    before, after = model.apply(variables, tokens), model.apply(variables, other)
    np.testing.assert_allclose(before[:, :5], after[:, :5], atol=1e-6)
    assert np.abs(before - after)[:, 5:].max() > 1e-3


def test_rotary_products_depend_on_the_distance_only():
    query, key = (RNG.normal(size=(1, 1, 1, 8)) for _ in range(2))

    def product(i, j):
        q = rotated(jnp.asarray(query), jnp.array([[i]]))
        return float(jnp.sum(q * rotated(jnp.asarray(key), jnp.array([[j]]))))

    assert product(3, 1) == pytest.approx(product(12, 10), rel=1e-4)
    assert product(3, 1) != pytest.approx(product(3, 2), rel=1e-2)
    # A plane turned by its angle: feature 0 is paired with feature 4, at frequency 1.
    turned = np.asarray(rotated(jnp.asarray(query), jnp.array([[2]])))[0, 0, 0]
    x, y = query[0, 0, 0, [0, 4]]
    np.testing.assert_allclose(
        turned[[0, 4]], [x * np.cos(2) - y * np.sin(2), x * np.sin(2) + y * np.cos(2)], rtol=1e-5
    )


def test_sinusoids_are_the_published_ones():
    found = sincos_1d(jnp.arange(7), 6)
    for position in range(7):
        angles = [position / 10_000 ** (i / 3) for i in range(3)]
        np.testing.assert_allclose(found[position], [*np.sin(angles), *np.cos(angles)], atol=1e-6)


CUTOFFS = (4, 7)


def adaptive(size=VOCABULARY, cutoffs=CUTOFFS, reparam="none", **options):
    return TokenEmbedding(size, WIDTH, cutoffs=cutoffs, reparametrization={"reparam": reparam}, **options)


def test_an_adaptive_table_equals_float64():
    table = adaptive()
    tokens = np.arange(VOCABULARY)[None]
    hidden = RNG.normal(size=(1, VOCABULARY, WIDTH)).astype(np.float32)
    variables = table.init(jax.random.key(0), hidden, tokens, method="losses")
    p = {name: value.astype(np.float64) for name, value in reference.flat(variables["params"]).items()}
    edges = [0, *CUTOFFS, VOCABULARY]
    vectors = np.concatenate([p[f"tables_{i}/embedding"] @ p[f"projections_{i}/kernel"] for i in range(3)])
    np.testing.assert_allclose(
        table.apply(variables, tokens, method="encode")[0], vectors * np.sqrt(WIDTH), rtol=1e-5, atol=1e-6
    )
    head = reference.log_softmax(hidden[0] @ np.concatenate([vectors[:4].T, p["classes/kernel"]], axis=1))
    expected = head[:, :4]
    for i in (1, 2):
        band = reference.log_softmax(hidden[0] @ vectors[edges[i] : edges[i + 1]].T)
        expected = np.concatenate([expected, head[:, 3 + i, None] + band], axis=1)
    np.testing.assert_allclose(np.exp(expected).sum(-1), 1, rtol=1e-9)
    found = table.apply(variables, hidden, method="log_probabilities")
    np.testing.assert_allclose(found[0], expected, atol=1e-5)
    losses = table.apply(variables, hidden, tokens, method="losses")
    np.testing.assert_allclose(losses.nll[0], -np.diagonal(expected), atol=1e-5)


def test_the_wikitext_103_recipe_has_the_published_number_of_parameters():
    stack = TransformerConfig(16, 1024, 8, 4096, norm="pre")
    model = LanguageModel(stack, 267_744, 3072, positions="sinusoidal", adaptive_cutoffs=(20_000, 60_000))
    tokens = jnp.zeros((1, 4), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    count = sum(x.size for x in jax.tree.leaves(shapes))
    assert round(count / 1e6) == 247


def test_a_reparametrised_table_has_unit_projections():
    table = adaptive(reparam="sigma")
    tokens = np.arange(VOCABULARY)[None]
    variables = table.init(jax.random.key(0), tokens, method="encode")
    variables = table.init(jax.random.key(0), np.zeros((1, VOCABULARY, WIDTH), np.float32), tokens, method="losses")
    kernels = table.apply(variables, method=lambda module: [each.kernel for each in module.projections])
    for kernel in kernels:
        assert np.linalg.norm(kernel, 2) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("cutoffs", [(), CUTOFFS])
def test_losses_by_chunks_equal_losses_at_once(cutoffs):
    table = adaptive(cutoffs=cutoffs)
    hidden = RNG.normal(size=(2, 12, WIDTH)).astype(np.float32)
    targets = RNG.integers(0, VOCABULARY, (2, 12))
    variables = table.init(jax.random.key(0), hidden, targets, method="losses")

    def total(hidden, params, chunk):
        losses = table.apply({"params": params}, hidden, targets, chunk=chunk, method="losses")
        return jnp.sum(losses.nll * (targets + 1)) + jnp.sum(losses.log_normalizer**2) + jnp.sum(losses.uniform)

    compute = jax.value_and_grad(total, argnums=(0, 1))
    whole, parts = compute(hidden, variables["params"], 0), compute(hidden, variables["params"], 4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), whole, parts)


def test_smoothing_terms_equal_a_smoothed_target():
    table = TokenEmbedding(VOCABULARY, WIDTH, tied=False, reparametrization={"reparam": "sigma"})
    hidden = RNG.normal(size=(1, 3, WIDTH)).astype(np.float32)
    targets = np.array([[4, 0, 10]])
    variables = table.init(jax.random.key(0), hidden, targets, method="losses")
    log_p = np.asarray(table.apply(variables, hidden, method="log_probabilities"), np.float64)
    losses = table.apply(variables, hidden, targets, method="losses")
    smoothed = 0.9 * np.eye(VOCABULARY)[targets] + 0.1 / VOCABULARY
    np.testing.assert_allclose(0.9 * losses.nll + 0.1 * losses.uniform, -(smoothed * log_p).sum(-1), rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cutoffs": (7, 4)}, "adaptive_cutoffs = (7, 4): expected rising numbers below 11"),
        ({"cutoffs": (4, 11)}, "below 11"),
        ({"tied": False}, "adaptive embeddings are tied"),
    ],
)
def test_impossible_tables_are_refused(options, message):
    with pytest.raises(ValueError) as error:
        adaptive(**options).init(jax.random.key(0), np.zeros((1, 2), int), method="encode")
    assert message in str(error.value)
