"""Behaviour cloning of a Transformer policy: eight learners under σReparam at once, and an actor on folded weights.

    python examples/actor_learner/policy.py

The expert sees a cue in the first observation, which nobody repeats, and answers every observation by (cue + observation)
modulo `SYMBOLS`: who acts needs the memory that attention is. Learners take one power step an update; the actor has plain
weights, a key-value cache, and costs what the plain model costs.
"""

import functools
import time
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from sigmarep.nn import TransformerConfig, TransformerStack, check, fold
from sigmarep.nn.visibility import CAUSAL

SYMBOLS = 4
STEPS = 12
WIDTH = 24
AGENTS = 8
# Two kinds of observations: cues, then symbols.
OBSERVATIONS = 2 * SYMBOLS


class Policy(nn.Module):
    """Logits (B, T, SYMBOLS) of the actions after observations (B, T)."""

    reparam: str

    @nn.compact
    def __call__(
        self, observations: jax.Array, *, positions: jax.Array | None = None, cache_length: int = 0
    ) -> jax.Array:
        positions = jnp.arange(observations.shape[1]) if positions is None else positions
        x = nn.Embed(OBSERVATIONS, WIDTH, name="observation")(observations) + nn.Embed(STEPS, WIDTH, name="time")(
            positions
        )
        config = TransformerConfig(
            depth=2, width=WIDTH, num_heads=2, mlp_dim=2 * WIDTH, norm="pre", reparam=self.reparam, scan=True
        )
        x = TransformerStack(config, name="memory")(x, visibility=CAUSAL, cache_length=cache_length)
        return nn.Dense(SYMBOLS, name="action")(x)


LEARNER, ACTOR = Policy("sigma"), Policy("none")


def demonstrations(key: jax.Array, episodes: int) -> tuple[jax.Array, jax.Array]:
    """Observations and the expert's actions, both (episodes, STEPS)."""
    symbols = jax.random.randint(key, (episodes, STEPS), 0, SYMBOLS)
    cue = symbols[:, :1]
    observations = jnp.concatenate([cue + SYMBOLS, symbols[:, 1:]], axis=1)
    return observations, (cue + symbols) % SYMBOLS


class Agent(NamedTuple):
    """A learner: {"params", "spectral"} and the optimizer's state."""

    variables: dict
    moments: optax.OptState


OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(5e-3, 200)))


def create(key: jax.Array) -> Agent:
    variables = LEARNER.init(key, jnp.zeros((1, STEPS), jnp.int32))
    return Agent(variables, OPTIMIZER.init(variables["params"]))


def update(agent: Agent, key: jax.Array) -> tuple[Agent, jax.Array]:
    """One update on 16 episodes: one power step of every layer."""
    observations, actions = demonstrations(key, 16)

    def loss(params):
        variables = {**agent.variables, "params": params}
        logits, updates = LEARNER.apply(variables, observations, mutable=["spectral"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, actions).mean(), updates

    (value, updates), gradients = jax.value_and_grad(loss, has_aux=True)(agent.variables["params"])
    changes, moments = OPTIMIZER.update(gradients, agent.moments)
    params = optax.apply_updates(agent.variables["params"], changes)
    return Agent({"params": params, **updates}, moments), value


def learn(key: jax.Array, updates: int) -> tuple[Agent, jax.Array]:
    """Eight agents side by side, from seeds of their own; their last losses, (AGENTS,)."""
    agents = jax.jit(jax.vmap(create))(jax.random.split(key, AGENTS))
    together = jax.jit(jax.vmap(update), donate_argnums=0)
    for number in range(updates):
        agents, losses = together(agents, jax.random.split(jax.random.fold_in(key, number), AGENTS))
    return agents, losses


def act(params: dict, observations: jax.Array) -> jax.Array:
    """Actions (B, STEPS) of a plain policy, one observation (B,) at a time, by a scan over time with a cache."""
    return _acting(ACTOR, {"params": params}, observations)


def _acting(policy: Policy, variables: dict, observations: jax.Array) -> jax.Array:
    def step(cache, now):
        number, observation = now
        logits, cache = policy.apply(
            {**variables, **cache}, observation[:, None], positions=number[None], cache_length=STEPS, mutable=["cache"]
        )
        return cache, jnp.argmax(logits[:, 0], -1)

    # Shapes alone: the first observation makes an empty cache.
    shapes = jax.eval_shape(
        lambda: policy.apply(
            variables, observations[:, :1], positions=jnp.zeros(1, int), cache_length=STEPS, mutable=["cache"]
        )
    )[1]
    empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(step, empty, (jnp.arange(STEPS), observations.T))[1].T


def cost(function, *args) -> tuple[float, float]:
    """Operations and bytes of the compiled function."""
    analysis = jax.jit(function).lower(*args).compile().cost_analysis()
    return analysis["flops"], analysis["bytes accessed"]


def main(updates: int = 200) -> dict[str, object]:
    """Trains, acts, and prints what both cost."""
    began = time.perf_counter()
    agents, losses = learn(jax.random.key(0), updates)
    jax.block_until_ready(losses)
    print(f"{AGENTS} agents, {updates} updates each: {time.perf_counter() - began:.1f} s, losses {losses}")
    first = jax.tree.map(lambda x: x[0], agents.variables)
    for sentence in check(first):
        print(sentence)

    # Acting: stacked weights fold as one tree under vmap.
    folded = jax.jit(jax.vmap(fold))(agents.variables)
    observations, actions = demonstrations(jax.random.key(1), 64)
    chosen = jax.jit(jax.vmap(act, (0, None)))(folded, observations)
    share = jnp.mean(chosen == actions, (1, 2))
    print(f"share of the expert's actions: {share}")

    plain = ACTOR.init(jax.random.key(2), observations[:, :1])["params"]
    one = jax.tree.map(lambda x: x[0], folded)
    costs = {
        "plain": cost(act, plain, observations[:1]),
        "folded": cost(act, one, observations[:1]),
        "not folded": cost(functools.partial(_acting, LEARNER), first, observations[:1]),
    }
    for name, (operations, traffic) in costs.items():
        print(f"an episode of one actor, {name}: {operations:,.0f} operations, {traffic:,.0f} bytes")
    return {"agents": agents, "folded": folded, "share": share, "costs": costs, "losses": losses}


if __name__ == "__main__":
    main()
