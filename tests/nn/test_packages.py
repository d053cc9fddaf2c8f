"""Models of other people's packages under σReparam."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sigmarep.nn import reparametrize

KEY = jax.random.key(0)


def test_an_encoder_of_antibodies_from_the_package_index_is_converted_trained_and_folded(monkeypatch):
    module = pytest.importorskip("ablang_jax.model")
    # The published size is one of module constants.
    monkeypatch.setattr(module, "HID", 8)
    monkeypatch.setattr(module, "N_HEAD", 2)
    monkeypatch.setattr(module, "HEAD_DIM", 4)
    monkeypatch.setattr(module, "N_BLOCK", 1)
    inputs = (jnp.arange(8).reshape(2, 4) % 26, jnp.ones((2, 4)))
    theirs = module.Ablanx()
    model = reparametrize(theirs, *inputs)
    assert len(model.chosen) == 6
    plain = jax.jit(theirs.init)(KEY, *inputs)
    variables = jax.jit(model.convert)(plain)
    evaluate = jax.jit(lambda variables: model.apply(variables, *inputs)[0])
    before = jax.jit(theirs.apply)(plain, *inputs)[0]
    np.testing.assert_allclose(evaluate(variables), before, rtol=1e-5, atol=1e-5)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.02))

    @jax.jit
    def update(variables, moments):
        value, gradients = jax.value_and_grad(lambda v: jnp.mean((model.apply(v, *inputs)[0] - 1) ** 2))(variables)
        changes, moments = tx.update(gradients, moments)
        return model.advance(optax.apply_updates(variables, changes)), moments, value

    moments, losses = tx.init(variables), []
    for _ in range(50):
        variables, moments, value = update(variables, moments)
        losses.append(float(value))
    assert losses[-1] < losses[0]
    folded = model.fold(variables)
    np.testing.assert_allclose(theirs.apply(folded, *inputs)[0], evaluate(variables), rtol=1e-5, atol=1e-5)
    for path in model.chosen:
        block, name, _ = path.split("/")
        norm = np.linalg.norm(folded["params"][block][name]["kernel"], 2)
        np.testing.assert_allclose(norm, abs(variables["params"][block][name]["gamma"]), rtol=1e-3)
