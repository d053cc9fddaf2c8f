"""Times a training step of a ViT beside the same ViT in Flax and optax alone, interleaved, and the tracing of both.

    python scripts/benchmark_bare.py [--width 192] [--depths 4] [--depths 12] [--rounds 15]

The bare model has Flax's own layers and attention in a loop over the blocks, and its step is a jitted value_and_grad and
optax.adam: no metrics but the loss, no collections, no random numbers. This project's models have the same shapes,
activation and optimizer and are trained by the trainer's own step: scanned, with all iterations of the scan unrolled by
XLA (`config.model.scan_unroll`), and as separate blocks. Printed are medians, and medians and quartiles of the ratios
within rounds; tracing is that of a step, with its lowering, from a model that was not traced before. Other flags are
those of benchmark_step.py.
"""

import functools
import statistics
import time
import types
from collections.abc import Callable
from typing import Any

from absl import flags
from benchmark_step import PATCH_SIZE, WIDTH, alternated, built, described, ratio, stepped, with_fields

from sigmarep import command

DEPTHS = flags.DEFINE_multi_integer("depths", [4, 12], "Numbers of blocks, in place of --depth.", lower_bound=1)
TRACES = flags.DEFINE_integer("traces", 3, "Times that each model is traced.", lower_bound=1)

# The bare models: True for those with norms.
BARE = {"pre-LN": True, "without norm": False}
# Norm, reparametrization, and the bare model that it is compared with.
OURS = {"pre-LN": ("pre", "none", "bare pre-LN"), "σReparam without norm": ("none", "sigma", "bare without norm")}


def bare(depth: int, *, norm: bool) -> Any:
    """The model in Flax's own layers, from images (B, height, width, channels) to logits (B, 10)."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp

    width, patch = WIDTH.value, (PATCH_SIZE.value, PATCH_SIZE.value)

    class Bare(nn.Module):
        @nn.compact
        def __call__(self, images):
            x = nn.Conv(width, patch, strides=patch, padding="VALID")(images)
            x = x.reshape(len(x), -1, width)
            token = self.param("token", nn.initializers.normal(0.02), (1, 1, width))
            x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, width)), x], axis=1)
            x = x + self.param("positions", nn.initializers.normal(0.02), (1, *x.shape[1:]))
            for _ in range(depth):
                y = nn.LayerNorm()(x) if norm else x
                x = x + nn.MultiHeadDotProductAttention(num_heads=max(width // 64, 1))(y)
                y = nn.LayerNorm()(x) if norm else x
                y = jax.nn.gelu(nn.Dense(4 * width)(y), approximate=False)
                x = x + nn.Dense(width)(y)
            x = nn.LayerNorm()(x) if norm else x
            return nn.Dense(10)(x[:, 0])

    return Bare()


class BareRunner:
    """The step of a bare model, with the methods of the trainer's runner that are timed."""

    def __init__(self, model: Any, optimizer: Any) -> None:
        import jax
        import optax

        def step(state, batch):
            params, moments = state

            def loss(params):
                logits = model.apply(params, batch["image"])
                return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

            value, gradients = jax.value_and_grad(loss)(params)
            updates, moments = optimizer.update(gradients, moments, params)
            return (optax.apply_updates(params, updates), moments), value

        self._step = jax.jit(step, donate_argnums=0)

    def lower(self, state: Any, batch: Any, *, panel: bool) -> Any:
        return self._step.lower(state, batch)

    def step(self, state: Any, batch: Any, *, panel: bool) -> Any:
        return self._step(state, batch)


def bare_built(batch: Any, depth: int, *, norm: bool) -> Any:
    """A bare model as `built` returns one of this project's."""
    import jax
    import optax

    model, optimizer = bare(depth, norm=norm), optax.adam(1e-3)

    def start():
        params = model.init(jax.random.key(0), batch["image"])
        return params, optimizer.init(params)

    return types.SimpleNamespace(runner=BareRunner(model, optimizer)), jax.jit(start)(), batch


def tracing(run: Any) -> float:
    """Seconds in which the step of a model that was not traced before is traced and lowered."""
    experiment, state, batch = run
    start = time.perf_counter()
    experiment.runner.lower(state, batch, panel=False)
    return time.perf_counter() - start


def compare(depth: int) -> None:
    """Prints the comparison at one depth."""
    batch = built(with_fields(depth=depth))[2]
    makes: dict[str, Callable[[], Any]] = {}
    for name, normed in BARE.items():
        makes[f"bare {name}"] = functools.partial(bare_built, batch, depth, norm=normed)
    bases = {}
    for name, (norm, reparam, base) in OURS.items():
        forms = {"scanned": (True, 1), "scanned, unrolled by XLA": (True, depth), "unrolled": (False, 1)}
        for form, (scan, unroll) in forms.items():
            full = f"{name}, {form}"
            fields = with_fields(depth=depth, norm=norm, reparam=reparam, scan=scan, scan_unroll=unroll)
            makes[full], bases[full] = functools.partial(built, fields), base

    traces: dict[str, list[float]] = {name: [] for name in makes}
    for _ in range(TRACES.value):
        runs = {name: make() for name, make in makes.items()}
        for name, run in runs.items():
            traces[name].append(tracing(run))
    seconds = alternated({name: stepped(run) for name, run in runs.items()})
    print(f"\ndepth {depth}:\n\n| model | step | against bare | tracing | against bare |\n|---|---|---|---|---|")
    for name in makes:
        step, trace, against, traced = statistics.median(seconds[name]), statistics.median(traces[name]), "", ""
        if name in bases:
            base = bases[name]
            against, traced = ratio(seconds[name], seconds[base]), f"{trace / statistics.median(traces[base]):.2f}"
        print(f"| {name} | {1000 * step:.1f} ms | {against} | {trace:.2f} s | {traced} |", flush=True)


def main() -> None:
    print(f"{described()}; the depths are those below")
    for depth in DEPTHS.value:
        compare(depth)


if __name__ == "__main__":
    command.run(main)
