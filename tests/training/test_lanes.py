"""Runs made together by one program: each is what it is alone."""

import itertools
import json

import jax
import numpy as np
import pytest

from sigmarep.errors import BadInput, Diverged, Stopped
from sigmarep.training import Callback, train_and_evaluate
from sigmarep.training.checkpoints import Checkpointer
from sigmarep.training.config import default_config, validate
from sigmarep.training.experiment import Programs, build
from sigmarep.training.lanes import SharedData
from sigmarep.training.metrics import read_metrics
from sigmarep.training.together import train_together

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("tfds"))


@pytest.fixture(scope="module")
def programs():
    return Programs()


def tiny(data_dir, **fields):
    config = default_config("image_classification")
    config.total_steps, config.log_every_steps, config.eval_every_steps, config.checkpoint_every_steps = 6, 1, 3, 1
    config.batch_size, config.writers.progress = 16, "off"
    config.model.depth, config.model.width, config.model.num_heads, config.model.mlp_dim = 1, 8, 2, 8
    config.model.patch_size, config.model.dropout = 4, 0.1
    config.optimizer.name, config.optimizer.learning_rate = "sgd", 0.1
    config.data.data_dir, config.data.in_memory, config.data.num_threads = data_dir, True, 1
    config.data.eval_splits = ("test[:16]",)
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return config


def rows(folder):
    return [
        {name: value for name, value in row.items() if "per_second" not in name}
        for row in read_metrics(str(folder / "metrics.jsonl"))
    ]


def parameters(config, folder):
    checkpoints = Checkpointer(str(folder / "checkpoints"), keep=2)
    restored = checkpoints.restore(build(validate(config)).abstract_state)
    checkpoints.close()
    return restored.step, jax.device_get(restored.state)


def assert_same_run(config, together, alone):
    """The folders hold runs that are equal to rounding."""
    assert sorted(path.name for path in together.iterdir()) == sorted(path.name for path in alone.iterdir())
    assert [list(row) for row in rows(together)] == [list(row) for row in rows(alone)]
    for one, other in zip(rows(together), rows(alone), strict=True):
        for name, value in one.items():
            np.testing.assert_allclose(value, other[name], rtol=2e-4, atol=1e-5, err_msg=name)
    (step, state), (other_step, other) = parameters(config, together), parameters(config, alone)
    assert step == other_step
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), state, other)


def test_lanes_are_the_runs_made_alone_and_a_diverged_one_ends_as_it_does_alone(data_dir, programs, tmp_path):
    # Two with one seed and one with another; one of the former diverges in the middle.
    fields = [
        {"optimizer__learning_rate": 0.1},
        {"optimizer__learning_rate": 1e30},
        {"optimizer__learning_rate": 0.02, "seed": 1},
    ]
    configs = [tiny(data_dir, **each) for each in fields]
    runs = [(config, str(tmp_path / f"together{i}")) for i, config in enumerate(configs)]
    results = train_together(runs, programs=programs)
    for i, (config, result) in enumerate(zip(configs, results, strict=True)):
        together, alone = tmp_path / f"together{i}", tmp_path / f"alone{i}"
        if i == 1:
            with pytest.raises(Diverged) as error:
                train_and_evaluate(config, str(alone), programs=programs)
            assert isinstance(result, Diverged)
            assert str(result) == str(error.value)
            assert json.loads((together / "diagnosis.json").read_text())["step"] == rows(together)[-1]["step"] < 6
        else:
            expected = train_and_evaluate(config, str(alone), programs=programs)
            numbers = [name for name, value in expected.items() if not isinstance(value, str)]
            assert {name: result[name] for name in numbers} == pytest.approx(
                {name: expected[name] for name in numbers}, rel=1e-3
            )
            assert result.keys() == expected.keys()
        assert_same_run(config, together, alone)
    assert rows(tmp_path / "together0") != rows(tmp_path / "together2")


def test_runs_that_were_stopped_go_on_together_each_where_it_was(data_dir, programs, tmp_path):
    class Stop(Callback):
        """Ends the run in the way that a signal does, after the checkpoint of a step."""

        def __init__(self, step):
            self.step = step

        def on_checkpoint(self, run, step):
            if step == self.step:
                raise Stopped(f"after step {step}")

    # As many as in the test above, with two places in the data: the program is compiled already.
    configs = [tiny(data_dir, optimizer__learning_rate=rate) for rate in (0.1, 0.05, 0.02)]
    for i, (config, step) in enumerate(zip(configs, (2, 5, 2), strict=True)):
        with pytest.raises(Stopped):
            train_and_evaluate(config, str(tmp_path / f"together{i}"), [Stop(step)], programs=programs)
    train_together([(config, str(tmp_path / f"together{i}")) for i, config in enumerate(configs)], programs=programs)
    for i, config in enumerate(configs[:2]):
        train_and_evaluate(config, str(tmp_path / f"alone{i}"), programs=programs)
        assert_same_run(config, tmp_path / f"together{i}", tmp_path / f"alone{i}")


def test_lanes_with_one_seed_read_one_stream(data_dir):
    opened = []

    class Data:
        unit = "examples"

        def train_stream(self, *, start, process_index, process_count):
            opened.append(start)
            for number in itertools.count(start):
                yield {"x": np.asarray([number])}

    data = SharedData(Data())
    readers = [data.train_stream(start=start, process_index=0, process_count=1) for start in (3, 3, 7)]
    for number in range(4):
        first, second, third = (next(reader) for reader in readers)
        assert first is second
        assert [int(each["x"][0]) for each in (first, second, third)] == [3 + number, 3 + number, 7 + number]
    assert data.unit == "examples"
    assert opened == [3, 7]


def test_what_runs_made_together_need(data_dir, tmp_path):
    (result,) = train_together([(tiny(data_dir, parallel="pmap"), str(tmp_path / "run"))])
    assert isinstance(result, BadInput)
    assert str(result) == "config.parallel = 'pmap': runs made together (--vectorize) need 'jit'"
    assert not (tmp_path / "run").exists()
