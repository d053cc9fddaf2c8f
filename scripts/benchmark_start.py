"""Measures the making of a configuration's initial state, in seconds of processor time, without reading any data.

    python scripts/benchmark_start.py --config configs/vit/imagenet_simplified.py:variant=H/16
    python scripts/benchmark_start.py --config configs/asr/librispeech_100h.py --topology v5e:16x16

Printed are the seconds to trace, lower, compile and run the program that makes it, and the calls of LAPACK in that program.
With a topology (see `scripts/compile_check.py`) it is compiled for TPUs that are not there, and not run. Seconds of the
processor count all threads, and two threads that share a core take more of them: compare under `taskset -c 0`.
"""

import os
import time
from typing import Any

from absl import flags

from sigmarep import command

CONFIG = command.define_config_flag()
TOPOLOGY = flags.DEFINE_string("topology", "local", "Devices to compile for, such as v5e:16x16.")


class Clock:
    """Prints the time that each part took, of the processor and of the wall."""

    def __init__(self):
        self._times = self._now()

    def part(self, name: str) -> None:
        times = self._now()
        processor, wall = (new - old for new, old in zip(times, self._times, strict=True))
        print(f"{name}: {processor:.1f} s of the processor, {wall:.1f} s", flush=True)
        self._times = self._now()

    def _now(self) -> tuple[float, float]:
        return time.process_time(), time.perf_counter()


def main() -> None:
    config = command.resolved_config(CONFIG)
    # Programs of an earlier start would be read.
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"
    import jax
    import numpy as np

    from sigmarep.compile import aot_compile
    from sigmarep.training.config import validate
    from sigmarep.training.experiment import build_program

    target = aot_compile.target(TOPOLOGY.value)
    clock = Clock()
    program = build_program(validate(config), devices=target.devices)
    clock.part("described")
    parameters = sum(x.size for x in jax.tree.leaves(program.abstract_state.params))
    arguments = (np.uint32(program.config.seed), jax.tree.map(np.float32, program.rates), None)
    initialize: Any = program.initialize
    lowered = initialize.lower(*arguments)
    clock.part("traced and lowered")
    compiled = lowered.compile()
    clock.part("compiled")
    text = aot_compile.program_text(compiled)
    calls = "unknown" if text is None else text.lower().count("lapack")
    print(f"{parameters / 1e6:.1f} M parameters on {len(target.devices)} x {target.kind}; calls of LAPACK: {calls}")
    if target.name == aot_compile.LOCAL:
        clock = Clock()
        jax.block_until_ready(compiled(*arguments))
        clock.part("run")


if __name__ == "__main__":
    command.run(main)
