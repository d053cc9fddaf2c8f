"""The training state and the one training step, the same under `jit` and `pmap`."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from sigmarep.core.entropy import largest
from sigmarep.nn.layers import Layers
from sigmarep.nn.qk_clip import qk_clipped
from sigmarep.tasks.protocol import LossOutput, TaskModel
from sigmarep.training.mesh import spread_over_data
from sigmarep.training.panel import layer_statistics


@flax.struct.dataclass
class TrainState:
    """All that a checkpoint must hold of the devices' side.

    Attributes:
      step: () int32, updates made so far.
      rng: key data from which step i takes the key fold_in(rng, i).
      params: parameters. model_state: the other collections, `spectral` among them.
      opt_state: the optimizer's. ema: averaged parameters, or None.
    """

    step: jax.Array
    rng: jax.Array
    params: Any
    model_state: Any
    opt_state: Any
    ema: Any


class StepOutput(NamedTuple):
    """`scalars`: means over the step's global batch. `panel`: what `sigmarep.training.panel` reads, {} if not asked."""

    scalars: dict[str, jax.Array]
    panel: dict[str, Any]

    def on_host(self) -> "StepOutput":
        """The same in the memory of the host; waits for the step."""
        return jax.device_get(self)


def create_state(
    init: Callable[[jax.Array], Any], optimizer: optax.GradientTransformation, *, seed: int, ema: bool
) -> TrainState:
    """The state before the first step.

    Args:
      init: makes the variables from a random key.
      seed: of the variables and of the training's own random numbers.
      ema: keeps averaged parameters too.
    """
    init_key, train_key = jax.random.split(jax.random.key(seed))
    variables = dict(init(init_key))
    params = variables.pop("params")
    variables.pop("attention", None)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        rng=jax.random.key_data(train_key),
        params=params,
        model_state=variables,
        opt_state=optimizer.init(params),
        ema=jax.tree.map(jnp.copy, params) if ema else None,
    )


def evaluation_variables(state: TrainState) -> dict[str, Any]:
    """The variables that evaluation uses. Averaged weights get their own σ: a power step on them, from the stored u."""
    return {"params": state.params if state.ema is None else state.ema, **state.model_state}


def make_train_step(
    task: TaskModel,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    layers: Layers,
    accumulation: int = 1,
    ema_decay: float = 0.0,
    qk_clip: float = 0.0,
    total_steps: int = 1,
    axis_name: str | None = None,
    placed: Any = None,
) -> Callable[..., tuple[TrainState, StepOutput]]:
    """Returns `step(state, batch, panel=False) -> (state, StepOutput)`.

    Every microbatch starts from the state's own spectral vectors and weights, so all of them make the same power step
    and the new state takes it once.

    Args:
      layers: of the task's model.
      accumulation: microbatches a step.
      ema_decay: of the averaged weights.
      qk_clip: the threshold of `sigmarep.nn.qk_clip`, off at 0.
      total_steps: of the run, for a task whose loss takes its progress.
      axis_name: of the devices under pmap; None under jit, where sums over the batch are global already.
      placed: shardings of the parameters, by which the devices share the panel's reading of them; None if each reads all.
    """

    def summed(tree):
        return tree if axis_name is None else jax.lax.psum(tree, axis_name)

    def shared(tree):
        """Parameters or what is like them, of which each device reads its part for the panel."""
        return tree if placed is None else jax.tree.map(spread_over_data, tree, placed)

    def gradients(state: TrainState, batch, rng, attention: bool) -> tuple[Any, LossOutput]:
        own = {"progress": state.step / total_steps} if getattr(task, "takes_progress", False) else {}

        def loss_sum(params):
            output = task.loss(params, state.model_state, batch, rng, attention=attention, **own)
            # What modules sow in the collection `losses` is a mean already; the reported loss is the task's alone.
            sown = sum(map(jnp.sum, jax.tree.leaves(output.model_state.get("losses", {}))))
            return output.loss[0] + output.loss[1] * sown, output

        grads, output = jax.grad(loss_sum, has_aux=True)(state.params)
        return grads, output

    def accumulated(state, batch, rng, attention):
        if accumulation == 1:
            return gradients(state, batch, rng, attention)

        # Row i goes to microbatch i mod n: every device's rows stay on it.
        def split(x):
            return jnp.swapaxes(x.reshape(-1, accumulation, *x.shape[1:]), 0, 1)

        def body(total, indexed):
            index, micro = indexed
            grads, output = gradients(state, micro, jax.random.fold_in(rng, index), attention)
            new = (grads, output.loss, output.metrics)
            return jax.tree.map(jnp.add, total, new), (output.model_state, output.attention)

        def zeros():
            first = jax.tree.map(lambda x: split(x)[0], batch)
            grads, output = jax.eval_shape(lambda: gradients(state, first, rng, attention))
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (grads, output.loss, output.metrics))

        indexed = (jnp.arange(accumulation), jax.tree.map(split, batch))
        (grads, loss, metrics), (model_states, recorded) = jax.lax.scan(body, zeros(), indexed)
        last = jax.tree.map(lambda x: x[-1], model_states)
        return grads, LossOutput(loss, metrics, last, _over_shards(recorded, jnp.mean, largest))

    def step(state: TrainState, batch, panel: bool = False) -> tuple[TrainState, StepOutput]:
        rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        if axis_name is not None:
            rng = jax.random.fold_in(rng, jax.lax.axis_index(axis_name))
        grads, output = accumulated(state, batch, rng, panel or qk_clip > 0)
        grads, loss, metrics = summed((grads, output.loss, output.metrics))
        weight = jnp.maximum(loss[1], 1.0)
        total, grads = grads, jax.tree.map(lambda g: g / weight, grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        attention = output.attention
        if attention and axis_name is not None:
            attention = _over_shards(
                attention, lambda x, axis: jax.lax.pmean(x, axis_name), lambda x, axis: _largest(x, axis_name)
            )
        if qk_clip:
            params = qk_clipped(params, attention, layers, qk_clip)
        ema = state.ema
        if ema is not None:
            ema = jax.tree.map(lambda old, new: ema_decay * old + (1 - ema_decay) * new, ema, params)
        scalars = {
            "loss": loss[0] / weight,
            **{name: value / jnp.maximum(count, 1.0) for name, (value, count) in metrics.items()},
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            "gradient_norm": optax.global_norm(grads),
        }
        recorded = {}
        if panel:
            spectral = output.model_state.get("spectral", {})
            # Parts of the sum are divided: for parts of the quotient the whole of it would be written.
            parts = (shared(state.params), jax.tree.map(lambda g: g / weight, shared(total)), shared(updates))
            recorded = {
                "attention": attention,
                "spectral": spectral,
                "gamma": _gammas(state.params),
                "layers": layer_statistics(*parts, spectral, layers),
                "nonfinite": summed(_nonfinite(batch)),
            }
        new_state = dataclasses.replace(
            state,
            step=state.step + 1,
            params=params,
            model_state=output.model_state,
            opt_state=opt_state,
            ema=ema,
        )
        return new_state, StepOutput(scalars, recorded)

    return step


def _over_shards(attention, mean, maximum):
    """Combines attention statistics over microbatches or devices: the largest of max_logit, the mean of the others."""

    def combine(path, x):
        is_maximum = path[-1].key == "max_logit"
        return (maximum if is_maximum else mean)(x, axis=0)

    return jax.tree_util.tree_map_with_path(combine, attention)


def _largest(x, axis_name):
    """`entropy.largest` over the devices of pmap: sums of all devices keep a NaN, a maximum may lose it."""
    missing = jax.lax.psum(jnp.isnan(x).astype(jnp.float32), axis_name)
    return jnp.where(missing > 0, jnp.nan, jax.lax.pmax(x, axis_name))


def _nonfinite(batch):
    """Number of values that are NaN or infinite, by the name of the array, of those of floating point."""
    return {
        name: jnp.sum(~jnp.isfinite(x), dtype=jnp.int32)
        for name, x in batch.items()
        if jnp.issubdtype(x.dtype, jnp.floating)
    }


def _gammas(params):
    """The parameters named gamma, in a tree like the spectral collection's."""
    if not isinstance(params, dict):
        return {}
    below = {name: _gammas(value) for name, value in params.items() if isinstance(value, dict)}
    below = {name: value for name, value in below.items() if value}
    return below | ({"gamma": params["gamma"]} if "gamma" in params else {})
