"""Measures the error of the power iteration's spectral norms during training, by number of power vectors.

    python scripts/sigma_error.py --config configs/quickstart.py [--steps 200] [--power_vectors 1,4,16]

Every tenth step the stored σ of each layer is compared with a float64 SVD of the kernel that it was computed from. Printed
are the relative errors.
"""

import statistics

from absl import flags

from sigmarep import command

CONFIG = command.define_config_flag()
STEPS = flags.DEFINE_integer("steps", 200, "Number of training steps.", lower_bound=10)
POWER_VECTORS = flags.DEFINE_list("power_vectors", ["1", "4", "16"], "Numbers of power vectors to compare.")


def errors(params, spectral) -> list[float]:
    """Relative error of the stored σ of every layer below `spectral`."""
    import numpy as np

    if "sigma" in spectral:
        matrix = np.asarray(params["kernel"], np.float64).reshape(-1, spectral["u"].size)
        return [abs(float(spectral["sigma"]) / float(np.linalg.norm(matrix, 2)) - 1)]
    return [error for name, state in spectral.items() for error in errors(params[name], state)]


def main() -> None:
    config = command.resolved_config(CONFIG)
    import jax

    from sigmarep.training.config import validate
    from sigmarep.training.experiment import build

    print("power vectors  after the last step: median, worst layer  worst layer of any tenth step")
    for vectors in POWER_VECTORS.value:
        config.model.scan = False
        config.model.power_vectors = int(vectors)
        experiment = build(validate(config))
        state = experiment.runner.put_state(experiment.create_state())
        stream = experiment.data.train_stream(start=0, process_index=0, process_count=1)
        worst, last = 0.0, [0.0]
        for step, batch in zip(range(1, STEPS.value + 1), stream, strict=False):
            # The step stores σ of the kernel before the update.
            kernels = jax.device_get(experiment.runner.get_state(state).params) if step % 10 == 0 else None
            state, _ = experiment.runner.step(state, batch, panel=False)
            if kernels is not None:
                last = errors(kernels, jax.device_get(experiment.runner.get_state(state).model_state["spectral"]))
                worst = max(worst, *last)
        print(f"{vectors:>13}  {statistics.median(last):28.1e}, {max(last):.1e}  {worst:30.1e}", flush=True)


if __name__ == "__main__":
    command.run(main)
