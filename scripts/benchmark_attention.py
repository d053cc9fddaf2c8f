"""Times exact attention entropy relative to attention itself, and measures its error.

    python scripts/benchmark_attention.py [--tokens 512,2048,4096] [--dtype bfloat16]

For each number of tokens it times forward and backward pass of attention by XLA; on a GPU in bfloat16, by cuDNN; on an
accelerator, by `sigmarep.core.flash_attention`, without and with the statistics that its forward pass gives; the
statistics that the panel computes next to a fused kernel (`sigmarep.core.entropy.attention_statistics`: entropy, largest
logit, variance); and entropy from one more call of the fused attention with the keys as values (`entropy_from_lse`). The
contenders alternate in one process. Printed are medians, the ratio to forward and backward pass of the fastest attention,
temporary memory as compiled, and the largest error of an entropy against float64 on the CPU, for ordinary and for sharp
logits; and of the gradients of flash against those of XLA in float32. --flash times the interpreted kernels on a CPU too.
"""

import functools
import math
import statistics
import time

import numpy as np
from absl import flags

from sigmarep import command
from sigmarep.errors import BadInput

TOKENS = flags.DEFINE_list("tokens", ["512", "2048", "4096"], "Lengths of the sequences.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Number of sequences.", lower_bound=1)
HEADS = flags.DEFINE_integer("heads", 12, "Number of heads, of 64 dimensions each.", lower_bound=1)
CAUSAL = flags.DEFINE_boolean("causal", False, "Causal attention.")
ROUNDS = flags.DEFINE_integer("rounds", 15, "Number of timed calls of each contender.", lower_bound=2)
FLASH = flags.DEFINE_boolean("flash", None, "Times flash; if not set, where there is an accelerator.")
DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["float32", "bfloat16"], "Type of queries, keys and values.")


def inputs(tokens: int, sharpness: float):
    """Queries, keys and values (B, T, N, 64) of `DTYPE`; the logits' standard deviation is about `sharpness`."""
    import jax
    import jax.numpy as jnp

    keys = jax.random.split(jax.random.key(tokens), 3)
    shape = (BATCH_SIZE.value, tokens, HEADS.value, 64)
    q, k, v = (jax.random.normal(key, shape, jnp.float32) for key in keys)
    return tuple(x.astype(DTYPE.value) for x in (sharpness * q, k, v))


def contenders(implementations: list[str]):
    """Compiled functions of (q, k, v), by name."""
    import jax
    import jax.numpy as jnp

    from sigmarep.core import entropy
    from sigmarep.core.flash_attention import flash_attention

    attend = functools.partial(jax.nn.dot_product_attention, is_causal=CAUSAL.value)

    def trained(implementation):
        def loss(q, k, v):
            return jnp.sum(attend(q, k, v, implementation=implementation).astype(jnp.float32) ** 2)

        return jax.grad(loss, argnums=(0, 1, 2))

    def fused(implementation):
        def entropies(q, k, v):
            average, lse = attend(q, k, k, implementation=implementation, return_residual=True)
            return jnp.moveaxis(entropy.entropy_from_lse(q, average, lse.astype(jnp.float32)), 1, 2)

        return entropies

    def trained_by_flash(with_statistics):
        def loss(q, k, v):
            attended, values = flash_attention(q, k, v, is_causal=CAUSAL.value, statistics=with_statistics)
            return jnp.sum(attended.astype(jnp.float32) ** 2), values

        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)

    functions = {f"attention, {each}": trained(each) for each in implementations}
    if FLASH.value if FLASH.value is not None else jax.devices()[0].platform != "cpu":
        functions["attention, flash"] = lambda q, k, v: trained_by_flash(False)(q, k, v)[0]
        functions["flash and statistics"] = trained_by_flash(True)
    functions["statistics by blocks"] = lambda q, k, v: entropy.attention_statistics(q, k, is_causal=CAUSAL.value)
    functions |= {f"entropy fused, {each}": fused(each) for each in implementations}
    return {name: jax.jit(function) for name, function in functions.items()}


def exact(q, k) -> np.ndarray:
    """Attention entropy (N, T) of the first sequence, computed in float64."""
    q, k = (np.asarray(x[0], np.float64) for x in (q, k))
    logits = np.einsum("tnh,snh->nts", q, k) / math.sqrt(64)
    if CAUSAL.value:
        logits = np.where(np.tri(logits.shape[-1], dtype=bool), logits, -np.inf)
    logits -= logits.max(axis=-1, keepdims=True)
    weights = np.exp(logits)
    total = weights.sum(axis=-1)
    return np.log(total) - np.sum(weights * np.where(np.isfinite(logits), logits, 0.0), axis=-1) / total


def main() -> None:
    import jax

    try:
        lengths = [int(each) for each in TOKENS.value]
    except ValueError:
        raise BadInput(f"--tokens {','.join(TOKENS.value)}: expected whole numbers, such as 512,2048") from None
    device = jax.devices()[0]
    implementations = ["xla"] + (["cudnn"] if device.platform == "gpu" and DTYPE.value == "bfloat16" else [])
    print(
        f"{BATCH_SIZE.value} sequences, {HEADS.value} heads of 64, {DTYPE.value}, "
        f"{'causal' if CAUSAL.value else 'full'}, on {device.device_kind}, jax {jax.__version__}, median of "
        f"{ROUNDS.value} interleaved rounds"
    )
    for tokens in lengths:
        measure(tokens, implementations)


def measure(tokens: int, implementations: list[str]) -> None:
    import jax

    ordinary, sharp = inputs(tokens, 1.0), inputs(tokens, 10.0)
    functions = contenders(implementations)
    compiled = {name: function.lower(*ordinary).compile() for name, function in functions.items()}
    seconds: dict[str, list[float]] = {name: [] for name in compiled}
    for i in range(ROUNDS.value + 1):
        for name, run in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(run(*ordinary))
            # The first round is a warm-up.
            if i:
                seconds[name].append(time.perf_counter() - start)
    attentions = [name for name in compiled if name.startswith("attention")]
    fastest = min(attentions, key=lambda name: statistics.median(seconds[name]))
    print(f"{tokens} tokens:")
    for name, run in compiled.items():
        ratio = statistics.median(a / b for a, b in zip(seconds[name], seconds[fastest], strict=True))
        memory = getattr(run.memory_analysis(), "temp_size_in_bytes", 0)
        line = f"  {name:22} {1000 * statistics.median(seconds[name]):9.2f} ms {ratio:6.2f} x {memory / 2**20:9.1f} MiB"
        if not name.startswith("attention"):
            line += f"  error {error(run, ordinary):.1e}, sharp {error(run, sharp):.1e} nats"
        print(line, flush=True)
    if "attention, flash" in compiled:
        wide = [x.astype("float32") for x in ordinary]
        with jax.default_matmul_precision("highest"):
            slopes = functions["attention, xla"](*wide)
        errors = [
            float(np.max(abs(np.asarray(a, np.float32) - np.asarray(b))) / np.max(abs(np.asarray(b))))
            for a, b in zip(compiled["attention, flash"](*ordinary), slopes, strict=True)
        ]
        print("  gradients of flash, largest error over largest value: " + ", ".join(f"{each:.1e}" for each in errors))


def error(run, arguments) -> float:
    """Largest error in nats of the entropies that `run` computes for the first sequence."""
    result = run(*arguments)
    # Attention that gives its statistics returns them beside its gradients.
    result = result[1] if isinstance(result, tuple) and not hasattr(result, "entropy") else result
    entropy = getattr(result, "entropy", result)
    return float(np.max(np.abs(np.asarray(entropy[0], np.float64) - exact(*arguments[:2]))))


if __name__ == "__main__":
    command.run(main)
