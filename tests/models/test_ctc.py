"""CTC against sums over all alignments and a float64 forward–backward pass; prefix beam search against enumeration."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sigmarep.models import ctc


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def heard(path):
    """Labels of an alignment by the definition: first merge repeats, then remove blanks."""
    return tuple(label for label, _ in itertools.groupby(path) if label != 0)


def enumerated(logits, labels):
    """−ln p and its gradient by the logits (T, V): softmax − the share of each label at each frame in all alignments."""
    p, total, share = np.exp(log_softmax(logits)), 0.0, np.zeros(logits.shape)
    for path in itertools.product(range(logits.shape[1]), repeat=len(logits)):
        if heard(path) == tuple(labels):
            of_path = np.prod([p[t, label] for t, label in enumerate(path)])
            total += of_path
            for t, label in enumerate(path):
                share[t, label] += of_path
    return -np.log(total), p - share / total


def forward_backward(logits, labels):
    """The same by Graves et al. (2006), equations 6 to 16, in float64 logarithms."""
    log_p = log_softmax(logits)
    extended = [0]
    for label in labels:
        extended += [label, 0]
    frames, states = len(log_p), len(extended)
    alpha, beta = np.full((2, frames, states), -np.inf)

    def skips(s):
        return s >= 2 and extended[s] != 0 and extended[s] != extended[s - 2]

    alpha[0, :2] = log_p[0, extended[:2]]
    for t, s in itertools.product(range(1, frames), range(states)):
        before = [s, *([s - 1] if s else []), *([s - 2] if skips(s) else [])]
        alpha[t, s] = np.logaddexp.reduce(alpha[t - 1, before]) + log_p[t, extended[s]]
    beta[-1, -2:] = 0.0
    for t, s in itertools.product(reversed(range(frames - 1)), range(states)):
        after = [s, *([s + 1] if s + 1 < states else []), *([s + 2] if s + 2 < states and skips(s + 2) else [])]
        beta[t, s] = np.logaddexp.reduce([beta[t + 1, n] + log_p[t + 1, extended[n]] for n in after])
    log_total = np.logaddexp.reduce(alpha[-1, -2:])
    share = np.zeros(log_p.shape)
    for s, label in enumerate(extended):
        share[:, label] += np.exp(alpha[:, s] + beta[:, s] - log_total)
    return -log_total, np.exp(log_p) - share


def test_the_two_references_agree():
    rng = np.random.default_rng(0)
    for labels in ([], [1], [1, 1], [2, 1, 2]):
        logits = rng.normal(size=(5, 3))
        for one, other in zip(enumerated(logits, labels), forward_backward(logits, labels), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-12)


def batch_of(examples, *, length, most, vocabulary, filling):
    """Arguments of `ctc_losses` for pairs of logits and labels; what lies beyond them is `filling`."""
    logits = np.full((len(examples), length, vocabulary), filling, np.float32)
    logits[..., 1] *= -1
    labels = np.full((len(examples), most), vocabulary - 1, np.int32)
    for row, (each, written) in enumerate(examples):
        logits[row, : len(each)] = each
        labels[row, : len(written)] = written
    frames = np.array([len(each) for each, _ in examples], np.int32)
    return logits, frames, labels, np.array([len(written) for _, written in examples], np.int32)


@jax.jit
def losses_and_gradient(logits, *rest):
    def total(logits):
        found = ctc.ctc_losses(logits, *rest)
        return jnp.sum(found.nll), found

    (_, found), gradient = jax.value_and_grad(total, has_aux=True)(logits)
    return found, gradient


TRANSCRIPTS = [(5, []), (5, [1]), (5, [1, 2]), (5, [2, 2]), (5, [1, 1, 1]), (4, [3, 1, 3]), (3, [3, 2, 1]), (1, [2])]


@pytest.mark.parametrize("filling", [0.0, 1e4])
def test_loss_and_gradient_are_those_of_the_sum_over_all_alignments(filling):
    rng = np.random.default_rng(1)
    examples = [(rng.normal(0, 2, (frames, 4)), labels) for frames, labels in TRANSCRIPTS]
    batch = batch_of(examples, length=7, most=5, vocabulary=4, filling=filling)
    found, gradient = losses_and_gradient(*batch)
    assert np.all(found.possible)
    for row, (logits, labels) in enumerate(examples):
        nll, slope = enumerated(logits, labels)
        assert found.nll[row] == pytest.approx(nll, rel=1e-5, abs=1e-6)
        np.testing.assert_allclose(gradient[row, : len(logits)], slope, atol=1e-5)
        assert np.all(gradient[row, len(logits) :] == 0)


def test_loss_and_gradient_are_those_of_forward_backward_on_real_sizes():
    rng = np.random.default_rng(2)
    sizes = [(150, 40), (150, 0), (97, 40), (120, 17)]
    examples = [(rng.normal(0, 3, (t, 29)), rng.integers(1, 29, u).tolist()) for t, u in sizes]
    found, gradient = losses_and_gradient(*batch_of(examples, length=150, most=40, vocabulary=29, filling=3.0))
    for row, (logits, labels) in enumerate(examples):
        nll, slope = forward_backward(logits, labels)
        assert found.nll[row] == pytest.approx(nll, rel=1e-5)
        # Sums of ln p near -600 have a spacing of 6e-5 in float32, and the gradient is made of their differences.
        np.testing.assert_allclose(gradient[row, : len(logits)], slope, atol=2e-4)


def test_impossible_transcripts_are_named_and_have_neither_loss_nor_gradient():
    rng = np.random.default_rng(3)
    cases = [(2, [1, 2, 3]), (2, [1, 1]), (4, [2, 2, 2]), (0, []), (0, [1]), (3, [1, 1])]
    examples = [(rng.normal(0, 50, (frames, 4)), labels) for frames, labels in cases]
    found, gradient = losses_and_gradient(*batch_of(examples, length=5, most=4, vocabulary=4, filling=0.0))
    assert found.possible.tolist() == [False, False, False, False, False, True]
    assert np.all(found.nll[:5] == 0)
    assert np.all(gradient[:5] == 0)
    assert found.nll[5] == pytest.approx(enumerated(*examples[5])[0], rel=1e-5)


def test_required_frames_count_a_blank_between_equal_labels_only():
    labels = np.array([[1, 1, 1, 2], [1, 2, 1, 1], [3, 3, 3, 3], [3, 3, 3, 3]], np.int32)
    assert ctc.required_frames(labels, np.array([4, 3, 1, 0])).tolist() == [6, 3, 1, 0]


def test_neither_padding_nor_its_contents_matter():
    rng = np.random.default_rng(4)
    examples = [(rng.normal(size=(frames, 5)), labels) for frames, labels in [(6, [1, 2, 2]), (9, [4]), (4, [])]]
    one, _ = losses_and_gradient(*batch_of(examples, length=9, most=3, vocabulary=5, filling=0.0))
    other, _ = losses_and_gradient(*batch_of(examples, length=17, most=8, vocabulary=5, filling=-700.0))
    np.testing.assert_allclose(one.nll, other.nll, rtol=1e-6)


@pytest.mark.parametrize("scale", [3.0, 8.0, 12.0, 15.0, 18.0, 60.0, 1e4])
def test_a_confident_model_has_no_negative_loss_and_keeps_its_gradient(scale):
    rng = np.random.default_rng(5)
    paths = rng.integers(0, 6, (32, 60))
    written = [heard(path) for path in paths]
    logits = scale * np.eye(6)[paths] + rng.normal(0, 0.1, (32, 60, 6))
    examples = list(zip(logits, written, strict=True))
    found, gradient = losses_and_gradient(*batch_of(examples, length=60, most=60, vocabulary=6, filling=0.0))
    assert np.all(found.nll >= 0)
    assert np.all(np.isfinite(gradient))
    for row in range(2):
        nll, slope = forward_backward(*examples[row])
        assert found.nll[row] == pytest.approx(nll, rel=1e-5, abs=1e-4)
        np.testing.assert_allclose(gradient[row], slope, atol=1e-5)


def test_logits_of_half_precision_give_losses_of_single_precision():
    rng = np.random.default_rng(6)
    logits = jnp.asarray(rng.normal(size=(2, 8, 4)), jnp.bfloat16)
    rest = jnp.array([8, 5]), jnp.array([[1, 1, 3], [2, 0, 0]]), jnp.array([3, 1])
    found = ctc.ctc_losses(logits, *rest)
    assert found.nll.dtype == jnp.float32
    np.testing.assert_allclose(found.nll, ctc.ctc_losses(logits.astype(jnp.float32), *rest).nll, rtol=1e-6)


def test_greedy_takes_the_likeliest_label_of_each_real_frame():
    logits = np.zeros((2, 4, 3), np.float32)
    logits[0, [0, 1, 2, 3], [2, 2, 0, 1]] = 1.0
    logits[1, :, 1] = 1.0
    np.testing.assert_array_equal(ctc.greedy(logits, np.array([4, 2])), [[2, 2, 0, 1], [1, 1, 0, 0]])


@pytest.mark.parametrize(
    ("path", "labels"),
    [([], []), ([0, 0], []), ([1, 1, 1], [1]), ([1, 0, 1], [1, 1]), ([0, 2, 2, 0, 0, 2, 1, 1, 0], [2, 2, 1])],
)
def test_collapse(path, labels):
    assert ctc.collapse(np.array(path, np.int32)) == labels


def random_log_p(seed, frames, vocabulary, scale=1.0):
    return log_softmax(np.random.default_rng(seed).normal(0, scale, (frames, vocabulary)))


@functools.cache
def language(prefix):
    """ln p of three labels and a blank that never follows; what is likely depends on all of the prefix."""
    drawn = np.random.default_rng([7, *prefix]).normal(size=3)
    return np.append(-np.inf, log_softmax(drawn))


def marginals(log_p):
    """ln p of every transcript, by enumeration."""
    found = {}
    for path in itertools.product(range(log_p.shape[1]), repeat=len(log_p)):
        value = sum(log_p[t, label] for t, label in enumerate(path))
        found[heard(path)] = np.logaddexp(found.get(heard(path), -np.inf), value)
    return found


@pytest.mark.parametrize(("weight", "bonus"), [(0.0, 0.0), (0.0, 1.5), (0.7, 0.0), (2.0, 0.9)])
def test_a_beam_of_all_prefixes_finds_what_enumeration_finds(weight, bonus):
    log_p = random_log_p(8, 5, 4)
    exact = marginals(log_p)
    scores = {
        labels: value + sum(weight * language(labels[:n])[labels[n]] + bonus for n in range(len(labels)))
        for labels, value in exact.items()
    }
    found = ctc.prefix_beam_search(
        log_p, beam_size=10_000, label_log_probability=language, language_weight=weight, insertion_bonus=bonus
    )
    assert [each.labels for each in found] == sorted(scores, key=lambda labels: -scores[labels])
    for each in found:
        assert each.log_probability == pytest.approx(exact[each.labels], abs=1e-9)
        assert each.score == pytest.approx(scores[each.labels], abs=1e-9)


def textbook_search(log_p, beam_size, weight, bonus):
    """Prefix beam search written out with probabilities instead of their logarithms."""
    beam = {(): (1.0, 0.0)}

    def prior(prefix):
        steps = (weight * language(prefix[:n])[prefix[n]] + bonus for n in range(len(prefix)))
        return np.exp(sum(steps))

    for row in np.exp(log_p):
        grown = {}
        for prefix, (blank, label) in beam.items():
            additions = [(prefix, (blank + label) * row[0], 0.0)]
            for symbol in range(1, len(row)):
                if prefix and symbol == prefix[-1]:
                    additions.append((prefix, 0.0, label * row[symbol]))
                    additions.append(((*prefix, symbol), 0.0, blank * row[symbol]))
                else:
                    additions.append(((*prefix, symbol), 0.0, (blank + label) * row[symbol]))
            for name, more_blank, more_label in additions:
                old = grown.get(name, (0.0, 0.0))
                grown[name] = (old[0] + more_blank, old[1] + more_label)
        beam = dict(sorted(grown.items(), key=lambda item: -sum(item[1]) * prior(item[0]))[:beam_size])
    return [(prefix, np.log(sum(ends)), np.log(sum(ends) * prior(prefix))) for prefix, ends in beam.items()]


@pytest.mark.parametrize("beam_size", [1, 2, 5, 16])
@pytest.mark.parametrize(("weight", "bonus"), [(0.0, 0.0), (0.8, 0.4)])
def test_a_narrow_beam_equals_the_textbook(beam_size, weight, bonus):
    for seed in range(3):
        log_p = random_log_p(seed, 20, 4, scale=2.0)
        found = ctc.prefix_beam_search(
            log_p, beam_size=beam_size, label_log_probability=language, language_weight=weight, insertion_bonus=bonus
        )
        expected = textbook_search(log_p, beam_size, weight, bonus)
        assert [each.labels for each in found] == [labels for labels, _, _ in expected]
        for each, (_, log_probability, score) in zip(found, expected, strict=True):
            assert each.log_probability == pytest.approx(log_probability, abs=1e-8)
            assert each.score == pytest.approx(score, abs=1e-8)


@pytest.mark.parametrize("beam_size", [1, 4])
def test_the_search_agrees_with_greedy_where_the_model_is_sure(beam_size):
    path = np.random.default_rng(9).integers(0, 6, 80)
    log_p = log_softmax(25.0 * np.eye(6)[path])
    best = ctc.prefix_beam_search(log_p, beam_size=beam_size)[0]
    assert list(best.labels) == ctc.collapse(path) == list(heard(path))
    assert best.log_probability == pytest.approx(-forward_backward(log_p, best.labels)[0], abs=1e-4)


def test_labels_below_the_threshold_are_passed_over():
    log_p = np.log([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2]])
    transcripts = {each.labels for each in ctc.prefix_beam_search(log_p, beam_size=100, prune=0.25)}
    assert transcripts == {(), (1,)}
    assert [each.labels for each in ctc.prefix_beam_search(log_p, beam_size=100, prune=0.4)] == [()]


def test_the_search_of_no_frames_hears_nothing():
    assert ctc.prefix_beam_search(np.zeros((0, 5)), beam_size=3) == [ctc.Hypothesis((), 0.0, 0.0)]
