"""Times what the panel adds to a training step: at every step, and at the interval at which it is logged by default.

    python scripts/benchmark_panel.py [--width 384] [--depth 4] [--batch_size 32] [--rounds 15]

Steps with and without the panel alternate in one process, so that a machine that slows down slows both. What is printed is
the median over rounds, and the median and quartiles of the ratios within each round. On a CPU the seconds are those that
its cores worked for the process, which others on the machine change less than the clock; on accelerators the clock's. The
pictures are the digits, enlarged.
"""

import statistics
import time

from absl import flags

from sigmarep import command

WIDTH = flags.DEFINE_integer("width", 384, "Width; heads have 64 dimensions, the MLP four times the width.")
DEPTH = flags.DEFINE_integer("depth", 4, "Blocks.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Examples a step.")
IMAGE_SIZE = flags.DEFINE_integer("image_size", 64, "Pixels a side.")
PATCH_SIZE = flags.DEFINE_integer("patch_size", 8, "Pixels a side of a patch.")
ATTENTION = flags.DEFINE_string("attention", "auto", "config.model.attention_implementation.")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Type of the computation.")
ROUNDS = flags.DEFINE_integer("rounds", 15, "Steps of each.", lower_bound=2)

# Norm and reparametrisation.
ARMS = {"pre-LN, plain": ("pre", "none"), "post-LN, σReparam": ("post", "sigma")}


def prepare(norm: str, reparam: str):
    """The runner, the state after one step of each kind, the batch, and the steps between logs."""
    import jax

    from sigmarep.training.config import default_config, validate
    from sigmarep.training.experiment import build

    config = default_config("image_classification")
    config.total_steps = 100
    config.batch_size = BATCH_SIZE.value
    config.optimizer.name = "adam"
    config.data.image_size = IMAGE_SIZE.value
    model = config.model
    model.norm, model.reparam, model.patch_size = norm, reparam, PATCH_SIZE.value
    model.attention_implementation, config.compute_dtype = ATTENTION.value, DTYPE.value
    model.depth, model.width, model.num_heads = DEPTH.value, WIDTH.value, max(WIDTH.value // 64, 1)
    model.mlp_dim = 4 * WIDTH.value
    experiment = build(validate(config))
    batch = next(experiment.task.train_stream(start=0, process_index=0, process_count=1))
    state = experiment.create_state()
    for panel in (False, True):
        state, output = experiment.runner.step(state, batch, panel=panel)
        jax.block_until_ready((state, output))
    return experiment.runner, state, batch, experiment.intervals["log"]


def main() -> None:
    import jax

    device = jax.devices()[0]
    now = time.process_time if device.platform == "cpu" else time.perf_counter
    print(
        f"ViT, depth {DEPTH.value}, width {WIDTH.value}, {(IMAGE_SIZE.value // PATCH_SIZE.value) ** 2 + 1} tokens, batch "
        f"{BATCH_SIZE.value}, {DTYPE.value}, attention {ATTENTION.value}, on {device.device_kind}, {ROUNDS.value} "
        "interleaved rounds"
    )
    for name, words in ARMS.items():
        runner, state, batch, interval = prepare(*words)
        seconds: dict[bool, list[float]] = {False: [], True: []}
        for i in range(ROUNDS.value):
            # Which goes first changes from round to round.
            for panel in (False, True) if i % 2 else (True, False):
                start = now()
                state, output = runner.step(state, batch, panel=panel)
                # The metrics are fetched, as for a log.
                jax.block_until_ready(state)
                jax.device_get(output)
                seconds[panel].append(now() - start)
        extra = [with_panel / without - 1 for without, with_panel in zip(*seconds.values(), strict=True)]
        low, middle, high = statistics.quantiles(extra, n=4)
        step = statistics.median(seconds[False])
        print(
            f"{name:18} step {1000 * step:.1f} ms; panel at every step {middle:+.1%} ({low:+.1%} to {high:+.1%}), at every "
            f"{interval}th {middle / interval:+.2%}"
        )


if __name__ == "__main__":
    command.run(main)
