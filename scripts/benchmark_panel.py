"""Times the panel's cost in a training step: at every step, and at the interval at which it is logged by default.

    python scripts/benchmark_panel.py [--width 384] [--depth 4] [--batch_size 32] [--rounds 15]

Steps with and without the panel alternate in one process, so that a change in the machine's speed affects both. Printed
are the median over rounds, and median and quartiles of the ratios within each round. On a CPU times are processor time,
which other processes disturb less than wall-clock time; on accelerators they are wall-clock time. The pictures are the
digits, enlarged.
"""

import statistics
import time

from benchmark_step import ROUNDS, STEPS, described, prepare, with_fields

from sigmarep import command

# Fields of config.model.
ARMS = {
    "pre-LN, plain": {"norm": "pre", "reparam": "none"},
    "post-LN, σReparam": {"norm": "post", "reparam": "sigma"},
}


def main() -> None:
    import jax

    now = time.process_time if jax.devices()[0].platform == "cpu" else time.perf_counter
    print(described())
    for name, words in ARMS.items():
        experiment, state, batch = prepare(with_fields(**words))
        runner, interval = experiment.runner, experiment.intervals["log"]
        # Compiled before the first round.
        state, output = runner.step(state, batch, panel=True)
        jax.block_until_ready((state, output))
        seconds: dict[bool, list[float]] = {False: [], True: []}
        for i in range(ROUNDS.value):
            # The order alternates between rounds.
            for panel in (False, True) if i % 2 else (True, False):
                start = now()
                outputs = []
                for _ in range(STEPS.value):
                    state, output = runner.step(state, batch, panel=panel)
                    outputs.append(output)
                # Fetches the metrics, as logging does.
                jax.block_until_ready(state)
                jax.device_get(outputs)
                seconds[panel].append((now() - start) / STEPS.value)
        extra = [with_panel / without - 1 for without, with_panel in zip(*seconds.values(), strict=True)]
        low, middle, high = statistics.quantiles(extra, n=4)
        step = statistics.median(seconds[False])
        print(
            f"{name:18} step {1000 * step:.1f} ms; panel at every step {middle:+.1%} ({low:+.1%} to {high:+.1%}), at every "
            f"{interval}th {middle / interval:+.2%}"
        )


if __name__ == "__main__":
    command.run(main)
