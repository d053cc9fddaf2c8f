"""A classifier with a loop of one's own in Flax NNX. Three lines put it under σReparam: those that end in a comment."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from sigmarep.nnx import reparametrize  # new

x = jax.random.normal(jax.random.key(0), (256, 8))
labels = jnp.argmax(x[:, :3] * x[:, 3:6], axis=-1)

rngs = nnx.Rngs(1)
layers = [nnx.Linear(8, 64, rngs=rngs), nnx.relu, nnx.Linear(64, 64, rngs=rngs), nnx.relu, nnx.Linear(64, 3, rngs=rngs)]
model = nnx.Sequential(*layers)
reparametrize(model)  # new
optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)


@nnx.jit
def update(model, optimizer):
    def loss(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(x), labels).mean()

    value, gradients = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradients)
    return value


for _ in range(300):
    value = update(model, optimizer)
model.eval()  # new
accuracy = jnp.mean(jnp.argmax(model(x), -1) == labels)
print(f"loss {value:.3f}, accuracy {accuracy:.3f}")
