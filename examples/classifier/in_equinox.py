"""A classifier with a loop of one's own in Equinox. Three lines put it under σReparam: those that end in a comment."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from sigmarep.nn.trees import SigmaTree  # new

x = jax.random.normal(jax.random.key(0), (256, 8))
labels = jnp.argmax(x[:, :3] * x[:, 3:6], axis=-1)

model = eqx.nn.MLP(8, 3, 64, 2, key=jax.random.key(1))
model = SigmaTree.of(model)  # new
optimizer = optax.adam(3e-3)
opt_state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))


@eqx.filter_jit
def update(model, opt_state):
    def loss(model):
        return optax.softmax_cross_entropy_with_integer_labels(jax.vmap(model)(x), labels).mean()

    value, gradients = eqx.filter_value_and_grad(loss)(model)
    updates, opt_state = optimizer.update(gradients, opt_state)
    model = eqx.apply_updates(model, updates)
    model = model.advance()  # new
    return model, opt_state, value


for _ in range(300):
    model, opt_state, value = update(model, opt_state)
accuracy = jnp.mean(jnp.argmax(jax.vmap(model)(x), -1) == labels)
print(f"loss {value:.3f}, accuracy {accuracy:.3f}")
