"""Three added lines put a training loop of one's own under σReparam, in every framework."""

from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

pytestmark = pytest.mark.usefixtures("one_device")

FOLDER = Path(__file__).parents[1] / "examples" / "classifier"


def repeated(function, x):
    for _ in range(100):
        x = function(x)
    return x


def run(lines):
    names = {}
    exec("\n".join(lines), names)
    return names


@pytest.mark.parametrize("name", ["linen", "in_nnx", "in_equinox"])
def test_three_lines_are_new_and_both_programs_train(name):
    if name == "in_equinox":
        pytest.importorskip("equinox")
    lines = (FOLDER / f"{name}.py").read_text().splitlines()
    new = [line for line in lines if line.endswith("# new")]
    assert len(new) == 3
    # Without imports, the docstring and blank lines.
    assert sum(bool(line) and not line.startswith(("import", "from", '"""')) for line in lines) <= 30
    plain = run([line for line in lines if line not in new])
    names = run(lines)
    assert plain["accuracy"] > 0.9
    assert names["accuracy"] > 0.9
    model = names["model"]
    # A single vector lags behind Adam; it catches up where the kernels stand still.
    if name == "linen":
        names["params"] = repeated(jax.jit(model.advance), names["params"])
    elif name == "in_nnx":
        model.train()
        once = nnx.jit(lambda model: model(names["x"][:1]))
        for _ in range(100):
            once(model)
    else:
        import equinox

        model = repeated(equinox.filter_jit(lambda model: model.advance()), model)
    if name == "linen":
        folded, params = model.fold(names["params"])["params"], names["params"]["params"]
        kernels = {key: (folded[key]["kernel"], params[key]["gamma"]) for key in folded}
    elif name == "in_nnx":
        kernels = {i: (model.layers[i].effective_kernel(), model.layers[i].gamma[...]) for i in (0, 2, 4)}
    else:
        folded = model.fold()
        kernels = {i: (folded.layers[i].weight, model.params.gamma[f"layers/{i}/weight"]) for i in range(3)}
    assert len(kernels) == 3
    for kernel, gamma in kernels.values():
        np.testing.assert_allclose(np.linalg.norm(kernel, 2), abs(gamma), rtol=1e-3)
