"""Runs that diverge for a cause made on purpose: message, diagnosis and report of each name it.

A gradient that alone is not finite is among the rows of test_diagnosis.py.
"""

import json

import numpy as np
import pytest

from sigmarep.diagnostics import findings, runs
from sigmarep.errors import Diverged
from sigmarep.tasks.image_classification.data import ImageClassificationData
from sigmarep.training import train_and_evaluate
from sigmarep.training.config import default_config
from sigmarep.training.divergence import DivergenceCheck
from sigmarep.training.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("tfds"))


def diverging(folder, data_dir, fields):
    """Trains a small ViT until it diverges; the message, diagnosis.json, the report's run and its facts."""
    config = default_config("image_classification")
    config.total_steps, config.log_every_steps, config.batch_size = 20, 1, 16
    config.writers.progress = "off"
    config.model.depth, config.model.width, config.model.num_heads, config.model.mlp_dim = 2, 16, 2, 16
    config.model.reparam, config.model.norm = "none", "pre"
    config.optimizer.name, config.optimizer.learning_rate, config.optimizer.momentum = "sgd", 0.01, 0.0
    config.optimizer.schedule = "constant"
    config.data.data_dir, config.data.in_memory, config.data.num_threads = data_dir, True, 1
    with config.unlocked():
        config.update_from_flattened_dict(fields)
    with pytest.raises(Diverged) as error:
        train_and_evaluate(config, str(folder))
    diagnosis = json.loads((folder / "diagnosis.json").read_text())
    (run,) = [runs.read(place) for place in runs.find([str(folder)]).places]
    return str(error.value), diagnosis, run, findings.facts(run)


CHANGED = {"intervention.at_steps": 2.0}
CAUSES = {
    # The head's bias alone learns so fast that the sum of the losses leaves float32.
    "loss": {
        "model.attention_temperature": 1e4,
        "optimizer.scale_parameters": ("^head/bias$",),
        "optimizer.scale_parameters_factor": 3e38,
        "optimizer.learning_rate": 1.0,
        "divergence_factor": 0.0,
    },
    "logits": {**CHANGED, "intervention.attention_temperature": 1e-40},
    "data": {},
    "initial values": {"model.attention_temperature": 1e-40},
    "learning rate": {"model.attention_temperature": 1e4, "optimizer.learning_rate": 300.0},
    "entropy collapse": {
        **CHANGED,
        "intervention.attention_temperature": 1e-5,
        "intervention.learning_rate_factor": 1e4,
    },
}


@pytest.mark.parametrize("cause", CAUSES)
def test_a_run_names_the_cause_of_its_divergence(cause, data_dir, tmp_path, monkeypatch):
    if cause == "data":
        real = ImageClassificationData.train_stream

        def with_a_nan(*arguments, **options):
            for number, batch in enumerate(real(*arguments, **options)):
                image = np.array(batch["image"], np.float32)
                if number == 2:
                    image[3, 1, 1] = np.nan
                yield {**batch, "image": image}

        monkeypatch.setattr(ImageClassificationData, "train_stream", with_a_nan)
    message, diagnosis, run, facts = diverging(tmp_path, data_dir, CAUSES[cause])
    assert diagnosis["cause"] == facts.cause == cause, message
    assert f"cause: {cause}; {diagnosis['explanation']}" in message
    assert diagnosis["step"] == facts.diverged == run.last_step
    sentences = findings.sentences(run, facts)
    assert sentences[1].text == f"Cause: {cause}; {diagnosis['explanation']}."
    collapsed = cause == "entropy collapse"
    assert [bool(diagnosis["collapsed"]), "fell first" in message, bool(facts.fell)] == [collapsed] * 3
    if cause != "initial values":
        assert diagnosis["healthy_step"] == diagnosis["broken_step"] - 1
        assert facts.lowest[0] < 0.1 if collapsed else facts.lowest[0] > 2
    # Every row is JSON, and what was not finite is not 0.
    rows = read_metrics(str(tmp_path / "metrics.jsonl"))
    if facts.nonfinite:
        last = rows[-1]
        assert np.isnan(last["attention/entropy_min"])
        assert not any(value == 0 for name, value in last.items() if name.startswith("attention/entropy"))


def test_the_step_that_ends_a_run_is_in_its_metrics_though_no_log_was_due(data_dir, tmp_path):
    fields = {
        "optimizer.learning_rate": 1e25,
        "log_every_steps": 50.0,
        "checkpoint_every_steps": 3.0,
    }
    message, diagnosis, run, facts = diverging(tmp_path, data_dir, fields)
    assert [row["step"] for row in run.rows] == [1, 3]
    assert diagnosis["cause"] == facts.cause == "unknown"
    assert "no attention was recorded at step 3" in message
    assert "step 1, the last one recorded before, was healthy" in message


@pytest.mark.parametrize("norm", ["pre", "none"])
def test_a_learning_rate_beyond_all_measure_is_no_collapse(norm, data_dir, tmp_path):
    fields = {"optimizer.learning_rate": 1e25, "model.norm": norm}
    message, diagnosis, _, facts = diverging(tmp_path, data_dir, fields)
    assert diagnosis["step"] == 2
    # The inputs of attention, its weights and its logits leave the range together.
    assert diagnosis["cause"] in ("learning rate", "logits")
    assert facts.lowest[0] == pytest.approx(np.log(17), rel=1e-2)
    assert facts.nonfinite == (2, "encoder/block_0")
    assert "fell" not in message


def test_a_run_that_goes_on_no_longer_has_the_diagnosis_of_its_last_start(tmp_path):
    (tmp_path / "diagnosis.json").write_text("{}")
    check = DivergenceCheck(str(tmp_path), 3.0, lambda: [], first_loss=None)
    for _ in range(2):
        check.on_start(None)
        assert not (tmp_path / "diagnosis.json").exists()
