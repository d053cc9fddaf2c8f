"""Beam search against enumeration and against a slow search without a cache; sampling."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sigmarep.models import decoding
from sigmarep.models.seq2seq import Seq2Seq
from sigmarep.nn import TransformerConfig, fold

PAD, BOS, EOS = 0, 1, 2
VOCABULARY = 6
SOURCE = np.array([[4, 5, 3, 2], [3, 3, 2, 0], [5, 2, 0, 0]], np.int32)


@pytest.fixture(scope="module", params=[True, False], ids=["scan", "unrolled"])
def translator(request):
    stack = TransformerConfig(
        depth=2, width=8, num_heads=2, mlp_dim=16, norm="post", init_std=1.0, kernel_init="normal", scan=request.param
    )
    model = Seq2Seq(stack, stack, VOCABULARY, 16)
    variables = model.init(jax.random.key(3), SOURCE, SOURCE, SOURCE, method="losses")
    # Sharper than at the start, so that hypotheses differ.
    variables = jax.tree.map(lambda x: 1.5 * x, variables)
    return model, variables


def search(translator, beam_size, max_length, alpha, limits=None):
    model, variables = translator

    @jax.jit
    def run(variables, source):
        memory = model.apply(variables, source, method="encode")
        memory, source = (jnp.repeat(x, beam_size, axis=0) for x in (memory, source))

        def step(tokens, position, cache):
            found, cache = model.apply(
                {**variables, **cache},
                tokens[:, None],
                memory,
                source,
                positions=jnp.full((1, 1), position),
                cache_length=max_length,
                mutable=["cache"],
                method="next_token",
            )
            return found[:, 0], cache

        return decoding.beam_search(
            step,
            decoding.empty_cache(step, len(source)),
            batch=len(SOURCE),
            beam_size=beam_size,
            max_length=max_length,
            limits=limits,
            alpha=alpha,
            bos=BOS,
            eos=EOS,
        )

    return jax.device_get(run(variables, SOURCE))


def score_table(translator, source, length):
    """ln p of every complete sentence of at most `length` tokens, by the model without a cache."""
    model, variables = translator
    words = [token for token in range(VOCABULARY) if token not in (PAD, BOS, EOS)]
    sentences = [(*body, EOS) for n in range(length) for body in itertools.product(words, repeat=n)]
    inputs = np.zeros((len(sentences), length), np.int32)
    for row, sentence in zip(inputs, sentences, strict=True):
        row[: len(sentence)] = (BOS, *sentence[:-1])
    log_p = np.asarray(jax.jit(model.apply)(variables, np.repeat(source[None], len(sentences), 0), inputs), np.float64)
    return {s: sum(log_p[i, j, token] for j, token in enumerate(s)) for i, s in enumerate(sentences)}


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.5])
def test_a_wide_beam_finds_what_enumeration_finds(translator, alpha):
    length = 4
    found = search(translator, 64, length, alpha)
    for row, source in enumerate(SOURCE):
        scores = score_table(translator, source, length)
        ranked = sorted(scores, key=lambda s: -scores[s] / ((5 + len(s)) / 6) ** alpha)
        for place in range(10):
            sentence = ranked[place]
            tokens = [t for t in found.tokens[row, place] if t != PAD]
            assert tokens == list(sentence)
            expected = scores[sentence] / ((5 + len(sentence)) / 6) ** alpha
            assert found.scores[row, place] == pytest.approx(expected, abs=2e-5)


def slow_beam(translator, source, beam_size, length, alpha):
    """Beam search written out: no cache, no batch, lists."""
    model, variables = translator
    apply = jax.jit(model.apply)
    alive, done = [((), 0.0)], []
    for n in range(1, length + 1):
        grown = []
        for tokens, log_p in alive:
            inputs = np.zeros((1, length), np.int32)
            inputs[0, :n] = (BOS, *tokens)
            following = np.asarray(apply(variables, source[None], inputs), np.float64)[0, n - 1]
            done.append(((*tokens, EOS), (log_p + following[EOS]) / ((5 + n) / 6) ** alpha))
            grown += [((*tokens, t), log_p + following[t]) for t in range(VOCABULARY) if t not in (PAD, BOS, EOS)]
        alive = sorted(grown, key=lambda pair: -pair[1])[:beam_size]
    return sorted(done, key=lambda pair: -pair[1])[:beam_size]


@pytest.mark.parametrize("beam_size", [1, 3])
def test_a_narrow_beam_equals_the_slow_search(translator, beam_size):
    found = search(translator, beam_size, 7, 0.6)
    for row, source in enumerate(SOURCE):
        for place, (sentence, score) in enumerate(slow_beam(translator, source, beam_size, 7, 0.6)):
            assert [t for t in found.tokens[row, place] if t != PAD] == list(sentence)
            assert found.scores[row, place] == pytest.approx(score, abs=2e-5)


def test_sentences_keep_their_own_limits(translator):
    found = search(translator, 4, 6, 0.6, limits=jnp.array([2, 6, 1]))
    lengths = np.sum(found.tokens[:, 0] != PAD, axis=-1)
    assert lengths[0] <= 2
    assert lengths[2] == 1
    alone = search(translator, 4, 6, 0.6)
    np.testing.assert_array_equal(found.tokens[1], alone.tokens[1])


def test_length_penalty_is_the_published_formula():
    assert float(decoding.length_penalty(7, 0.6)) == pytest.approx(2**0.6)
    assert float(decoding.length_penalty(1, 0.6)) == 1.0


def markov(table):
    """A step whose next token depends on the last one only."""
    log_table = jnp.log(jnp.asarray(table))
    return lambda tokens, position, cache: (log_table[tokens], cache)


TABLE = np.full((5, 5), 1e-9)
TABLE[3] = [1e-9, 1e-9, 0.1, 0.2, 0.7]
TABLE[4] = [1e-9, 1e-9, 0.2, 0.3, 0.5]


def test_greedy_takes_the_likeliest_and_keeps_prompts_of_any_length():
    prompt = np.array([[3, 3, 3], [3, 0, 0]], np.int32)
    found = decoding.sample(
        markov(TABLE), {}, prompt, jnp.array([3, 1]), jax.random.key(0), max_length=5, temperature=0, eos=EOS
    )
    np.testing.assert_array_equal(found, [[3, 3, 3, 4, 4], [3, 4, 4, 4, 4]])


def test_nothing_follows_the_end():
    table = np.full((5, 5), 1e-9)
    table[3, EOS] = 1.0
    found = decoding.sample(
        markov(table), {}, np.array([[3]], np.int32), jnp.array([1]), jax.random.key(0), max_length=4, eos=EOS
    )
    np.testing.assert_array_equal(found, [[3, EOS, PAD, PAD]])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.1, 0.2, 0.7]),
        ({"temperature": 0.5}, np.array([0.01, 0.04, 0.49]) / 0.54),
        ({"top_k": 2}, np.array([0, 0.2, 0.7]) / 0.9),
        ({"top_p": 0.7}, [0, 0, 1]),
        ({"top_p": 0.71}, np.array([0, 0.2, 0.7]) / 0.9),
    ],
)
def test_frequencies_of_draws(options, expected):
    count = 20_000
    draws = decoding.draw_token(
        jnp.log(jnp.asarray(TABLE[3]))[None].repeat(count, 0),
        jax.random.key(1),
        **{"temperature": 1.0, "top_k": 0, "top_p": 1.0, **options},
    )
    frequencies = np.bincount(draws, minlength=5)[2:] / count
    np.testing.assert_allclose(frequencies, expected, atol=0.02)


def test_decoding_with_folded_parameters_equals_the_reparametrised_model():
    sigma = TransformerConfig(depth=1, width=8, num_heads=2, mlp_dim=16, norm="post", reparam="sigma", init_std=0.5)
    plain = TransformerConfig(depth=1, width=8, num_heads=2, mlp_dim=16, norm="post", init_std=0.5)
    variables = Seq2Seq(sigma, sigma, VOCABULARY, 16).init(jax.random.key(0), SOURCE, SOURCE, SOURCE, method="losses")
    before = Seq2Seq(sigma, sigma, VOCABULARY, 16).apply(variables, SOURCE, SOURCE)
    after = Seq2Seq(plain, plain, VOCABULARY, 16).apply({"params": fold(variables)}, SOURCE, SOURCE)
    np.testing.assert_allclose(before, after, atol=1e-5)
