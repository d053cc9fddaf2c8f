"""Times a training step of the same ViT with plain layers, plain layers and pre-LN, and σReparam, interleaved.

    python scripts/benchmark_step.py [--width 384] [--depth 4] [--batch_size 32] [--rounds 15]
    python scripts/benchmark_step.py --width 768 --depth 12 --image_size 224 --patch_size 16 --batch_size 256 \
        --dtype bfloat16 --peak_tflops 989 --scan_unroll 12 --steps 8      # ViT-B/16 on an H100 or H200
    python scripts/benchmark_step.py --width 128 --remedies all            # every arm of sigmarep.remedies

The models alternate in one process, so that a change in the machine's speed affects all of them. Printed are the median
over rounds, and the median of the ratios within each round. The pictures are the digits, enlarged; their content does not
affect the time. With --remedies the models are arms of `sigmarep.remedies`, and a Markdown table has each one's ratio to
plain pre-LN, whose steps alternate with that arm's alone. Model FLOPs are those of the forward pass's matrix products
times three.
"""

import statistics
import time

from absl import flags

from sigmarep import command

WIDTH = flags.DEFINE_integer("width", 384, "Width; heads have 64 dimensions, the MLP four times the width.")
DEPTH = flags.DEFINE_integer("depth", 4, "Number of blocks.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Examples per step.")
IMAGE_SIZE = flags.DEFINE_integer("image_size", 64, "Side of an image, in pixels.")
PATCH_SIZE = flags.DEFINE_integer("patch_size", 8, "Side of a patch, in pixels.")
ATTENTION = flags.DEFINE_string("attention", "auto", "config.model.attention_implementation.")
SCAN_UNROLL = flags.DEFINE_integer("scan_unroll", 1, "config.model.scan_unroll.", lower_bound=1)
QKV = flags.DEFINE_string("qkv", "separate", "config.model.qkv.")
ACTIVATION = flags.DEFINE_string("activation", "gelu", "config.model.activation.")
POWER_VECTORS = flags.DEFINE_integer("power_vectors", 16, "Leaves out models with more vectors of the power iteration.")
PEAK = flags.DEFINE_float(
    "peak_tflops", 0.0, "The device's dense peak for --dtype; prints the share of it that is used."
)
REMEDIES = flags.DEFINE_list(
    "remedies", [], "Arms of sigmarep.remedies to time against pre_ln, or all, in place of the models above."
)
ROUNDS = flags.DEFINE_integer("rounds", 15, "Number of turns of each model.", lower_bound=2)
STEPS = flags.DEFINE_integer(
    "steps", 1, "Steps of a turn, queued as in a training, so that an accelerator copies batches while it computes."
)
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Type of the computation.")

# Norm, reparametrization, vectors of the power iteration.
ARMS = {
    "pre-LN, plain": ("pre", "none", 1),
    "no norm, plain": ("none", "none", 1),
    "no norm, σReparam": ("none", "sigma", 1),
    "no norm, σReparam, 4 vectors": ("none", "sigma", 4),
    "no norm, σReparam, 16 vectors": ("none", "sigma", 16),
}


def built(change):
    """Builds an experiment; returns it, its state and a batch.

    Args:
      change: is called with the configuration, last.
    """
    from sigmarep.training.config import default_config, validate
    from sigmarep.training.experiment import build

    config = default_config("image_classification")
    config.total_steps = 100
    config.batch_size = BATCH_SIZE.value
    config.compute_dtype = DTYPE.value
    config.optimizer.name = "adam"
    config.data.image_size = IMAGE_SIZE.value
    model = config.model
    model.patch_size, model.attention_implementation = PATCH_SIZE.value, ATTENTION.value
    model.scan_unroll, model.qkv, model.activation = SCAN_UNROLL.value, QKV.value, ACTIVATION.value
    model.depth, model.width, model.num_heads = DEPTH.value, WIDTH.value, max(WIDTH.value // 64, 1)
    model.mlp_dim = 4 * WIDTH.value
    change(config)
    experiment = build(validate(config))
    batch = next(experiment.data.train_stream(start=0, process_index=0, process_count=1))
    return experiment, experiment.create_state(), batch


def prepare(change):
    """As `built`, after one step."""
    return stepped(built(change))


def stepped(run):
    """An experiment, its state and the batch after one step."""
    import jax

    experiment, state, batch = run
    state, output = experiment.runner.step(state, batch, panel=False)
    jax.block_until_ready((state, output))
    return experiment, state, batch


def described() -> str:
    """Describes model, device and rounds in words."""
    import jax

    return (
        f"ViT, depth {DEPTH.value}, width {WIDTH.value}, {tokens()} tokens, batch {BATCH_SIZE.value}, {DTYPE.value}, "
        f"attention {ATTENTION.value}, qkv {QKV.value}, {ACTIVATION.value}, {SCAN_UNROLL.value} blocks at once, "
        f"on {jax.devices()[0].device_kind}, jax {jax.__version__}, median of {ROUNDS.value} "
        f"interleaved rounds of {STEPS.value} steps"
    )


def tokens() -> int:
    """Number of tokens: the patches and the class token."""
    return (IMAGE_SIZE.value // PATCH_SIZE.value) ** 2 + 1


def model_flops() -> float:
    """Operations of the matrix products of a step, where the backward pass counts as two forward passes."""
    width, mlp, t = WIDTH.value, 4 * WIDTH.value, tokens()
    block = 2 * t * (4 * width * width + 2 * width * mlp) + 4 * t * t * width
    patches = 2 * (t - 1) * PATCH_SIZE.value**2 * width
    return 3.0 * BATCH_SIZE.value * (DEPTH.value * block + patches)


def with_fields(**fields):
    """What `prepare` is called with to set fields of `config.model`."""
    return lambda config: config.model.update(fields)


def timed(changes) -> dict[str, list[float]]:
    """Seconds of a step of the models that `changes` makes, by name, once a round.

    Args:
      changes: by name, what changes the configuration.
    """
    return alternated({name: prepare(change) for name, change in changes.items()})


def alternated(runs) -> dict[str, list[float]]:
    """Seconds of a step of every model, once a round; `runs` keeps what they have reached.

    Args:
      runs: by name, what `prepare` returned.
    """
    import jax

    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS.value):
        for name, (experiment, state, batch) in runs.items():
            start = time.perf_counter()
            for _ in range(STEPS.value):
                state, output = experiment.runner.step(state, batch, panel=False)
            jax.block_until_ready((state, output))
            seconds[name].append((time.perf_counter() - start) / STEPS.value)
            runs[name] = (experiment, state, batch)
    return seconds


def ratio(ours: list[float], base: list[float]) -> str:
    """Median and quartiles of the ratios of rounds."""
    ratios = [a / b for a, b in zip(ours, base, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return f"{statistics.median(ratios):.3f} ({low:.3f} to {high:.3f})"


def remedies() -> None:
    """Prints the table of the arms of --remedies."""
    import functools

    from sigmarep.remedies import ARMS as every
    from sigmarep.remedies import set_arm

    chosen = list(every) if REMEDIES.value == ["all"] else REMEDIES.value
    names = ["pre_ln", *(name for name in chosen if name != "pre_ln")]
    print(f"{described()}\n\n| arm | step | against pre_ln |\n|---|---|---|")
    base = prepare(functools.partial(set_arm, name="pre_ln"))
    for name in names:
        # Beside its own copy pre_ln shows how far off 1 the machine alone puts a ratio.
        runs = {"base": base, name: prepare(functools.partial(set_arm, name=name))}
        seconds = alternated(runs)
        base = runs["base"]
        milliseconds = 1000 * statistics.median(seconds[name])
        print(f"| {name} | {milliseconds:.1f} ms | {ratio(seconds[name], seconds['base'])} |", flush=True)


def main() -> None:
    if REMEDIES.value:
        remedies()
        return

    arms = {name: words for name, words in ARMS.items() if words[2] <= POWER_VECTORS.value}
    names = ("norm", "reparam", "power_vectors")
    seconds = timed({name: with_fields(**dict(zip(names, words, strict=True))) for name, words in arms.items()})
    print(described())
    for name, times in seconds.items():
        rate = model_flops() / statistics.median(times) / 1e12
        used = f", {rate / PEAK.value:.1%} of the peak" if PEAK.value else ""
        print(f"{name:31} {1000 * statistics.median(times):9.1f} ms, {rate:.4g} model TFLOP/s{used}")
    for ours in (name for name, words in arms.items() if words[1] == "sigma"):
        for base in (name for name, words in arms.items() if words[1] == "none"):
            print(f"{ours} / {base}: {ratio(seconds[ours], seconds[base])}, with quartiles")


if __name__ == "__main__":
    command.run(main)
