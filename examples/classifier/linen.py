"""A classifier with a loop of one's own in Flax Linen. Three lines put it under σReparam: those that end in a comment."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from sigmarep.nn import reparametrize  # new

x = jax.random.normal(jax.random.key(0), (256, 8))
labels = jnp.argmax(x[:, :3] * x[:, 3:6], axis=-1)

model = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(64), nn.relu, nn.Dense(3)])
model = reparametrize(model, x)  # new
params = model.init(jax.random.key(1), x)
optimizer = optax.adam(3e-3)
opt_state = optimizer.init(params)


@jax.jit
def update(params, opt_state):
    def loss(params):
        return optax.softmax_cross_entropy_with_integer_labels(model.apply(params, x), labels).mean()

    value, gradients = jax.value_and_grad(loss)(params)
    updates, opt_state = optimizer.update(gradients, opt_state)
    params = optax.apply_updates(params, updates)
    params = model.advance(params)  # new
    return params, opt_state, value


for _ in range(300):
    params, opt_state, value = update(params, opt_state)
accuracy = jnp.mean(jnp.argmax(model.apply(params, x), -1) == labels)
print(f"loss {value:.3f}, accuracy {accuracy:.3f}")
