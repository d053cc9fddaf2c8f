"""Times a training step of a ViT beside the same ViT in Flax and optax alone, interleaved, and the tracing of both.

    python scripts/benchmark_bare.py [--width 192] [--depth 4] [--depth 12] [--rounds 15]

The bare model has Flax's own layers and attention in a loop over the blocks, and its step is a jitted value_and_grad and
optax.adam: no metrics but the loss, no collections, no random numbers. This project's models have the same shapes,
activation and optimizer and are trained by the trainer's own step, scanned and unrolled. Printed are medians, and medians
and quartiles of the ratios within rounds; tracing is that of a step, with its lowering, from a model that was not traced
before.
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

from absl import flags

from sigmarep import command

WIDTH = flags.DEFINE_integer("width", 192, "Width; heads have 64 dimensions, the MLP four times the width.")
DEPTH = flags.DEFINE_multi_integer("depth", [], "Number of blocks, by default 4 and 12.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Examples per step.")
IMAGE_SIZE = flags.DEFINE_integer("image_size", 64, "Side of an image, in pixels.")
PATCH_SIZE = flags.DEFINE_integer("patch_size", 8, "Side of a patch, in pixels.")
ROUNDS = flags.DEFINE_integer("rounds", 15, "Number of turns of each model.", lower_bound=2)
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


class BareRun:
    """A bare model that trains."""

    def __init__(self, batch: Any, depth: int, *, norm: bool) -> None:
        import jax
        import optax

        model, optimizer = bare(depth, norm=norm), optax.adam(1e-3)
        self.batch = {"image": batch["image"].astype("float32") / 255, "label": batch["label"]}

        def start():
            params = model.init(jax.random.key(0), self.batch["image"])
            return params, optimizer.init(params)

        def step(state, batch):
            params, moments = state

            def loss(params):
                logits = model.apply(params, batch["image"])
                return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

            value, gradients = jax.value_and_grad(loss)(params)
            updates, moments = optimizer.update(gradients, moments, params)
            return (optax.apply_updates(params, updates), moments), value

        self.state = jax.jit(start)()
        self._step = jax.jit(step, donate_argnums=0)

    def lower(self) -> None:
        self._step.lower(self.state, self.batch)

    def step(self) -> None:
        import jax

        self.state, value = self._step(self.state, self.batch)
        jax.block_until_ready((self.state, value))


class OurRun:
    """A model of this project under the trainer's step."""

    def __init__(self, depth: int, **model: Any) -> None:
        from sigmarep.training.config import default_config, validate
        from sigmarep.training.experiment import build

        config = default_config("image_classification")
        config.total_steps, config.batch_size = 100, BATCH_SIZE.value
        config.optimizer.name, config.data.image_size = "adam", IMAGE_SIZE.value
        config.model.update(
            {
                "depth": depth,
                "width": WIDTH.value,
                "num_heads": max(WIDTH.value // 64, 1),
                "mlp_dim": 4 * WIDTH.value,
                "patch_size": PATCH_SIZE.value,
                **model,
            }
        )
        self._experiment = build(validate(config))
        self.batch = next(self._experiment.data.train_stream(start=0, process_index=0, process_count=1))
        self.state = self._experiment.create_state()

    def lower(self) -> None:
        self._experiment.runner.lower(self.state, self.batch, panel=False)

    def step(self) -> None:
        import jax

        self.state, output = self._experiment.runner.step(self.state, self.batch, panel=False)
        jax.block_until_ready((self.state, output))


def timed(call: Any) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def ratio(ours: list[float], base: list[float]) -> str:
    """Median and quartiles of the ratios of rounds."""
    ratios = [a / b for a, b in zip(ours, base, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return f"{statistics.median(ratios):.3f} ({low:.3f} to {high:.3f})"


def compare(depth: int) -> None:
    """Prints the comparison at one depth."""
    batch = OurRun(depth).batch
    makes: dict[str, Callable[[], BareRun | OurRun]] = {}
    for name, normed in BARE.items():
        makes[f"bare {name}"] = functools.partial(BareRun, batch, depth, norm=normed)
    bases = {}
    for name, (norm, reparam, base) in OURS.items():
        for form, scan in (("scanned", True), ("unrolled", False)):
            full = f"{name}, {form}"
            fields = {"norm": norm, "reparam": reparam, "scan": scan}
            makes[full], bases[full] = functools.partial(OurRun, depth, **fields), base

    traces: dict[str, list[float]] = {name: [] for name in makes}
    for _ in range(TRACES.value):
        runs = {name: make() for name, make in makes.items()}
        for name, run in runs.items():
            traces[name].append(timed(run.lower))
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run.step()
    for _ in range(ROUNDS.value):
        for name, run in runs.items():
            seconds[name].append(timed(run.step))
    print(f"\ndepth {depth}:\n\n| model | step | against bare | tracing | against bare |\n|---|---|---|---|---|")
    for name in runs:
        step, trace = statistics.median(seconds[name]), statistics.median(traces[name])
        against = (
            ("", "")
            if name not in bases
            else (ratio(seconds[name], seconds[bases[name]]), f"{trace / statistics.median(traces[bases[name]]):.2f}")
        )
        print(f"| {name} | {1000 * step:.1f} ms | {against[0]} | {trace:.2f} s | {against[1]} |", flush=True)


def main() -> None:
    import jax

    print(
        f"ViT, width {WIDTH.value}, {(IMAGE_SIZE.value // PATCH_SIZE.value) ** 2 + 1} tokens, batch {BATCH_SIZE.value}, "
        f"float32, on {jax.devices()[0].device_kind}, jax {jax.__version__}, {ROUNDS.value} rounds"
    )
    for depth in DEPTH.value or [4, 12]:
        compare(depth)


if __name__ == "__main__":
    command.run(main)
