"""metrics.jsonl, the clock and the panel's names."""

import json
import math
import time

import jax.numpy as jnp
import numpy as np
import orjson
import pytest

from sigmarep.errors import BadInput
from sigmarep.training import metrics
from sigmarep.training.metrics import MetricWriter, read_metrics
from sigmarep.training.panel import panel_metrics
from sigmarep.training.progress import Clock, Progress, waiting


def write(folder, steps, resume_step=0):
    writer = MetricWriter(str(folder), resume_step=resume_step)
    for step in steps:
        writer.write(step, {"train/loss": 1.0 / step})
    writer.close()


def steps_in(folder):
    return [row["step"] for row in read_metrics(str(folder / "metrics.jsonl"))]


def test_a_resumed_run_has_neither_gaps_nor_repeats(tmp_path):
    write(tmp_path, range(1, 8))
    write(tmp_path, range(5, 10), resume_step=4)
    assert steps_in(tmp_path) == list(range(1, 10))


def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path):
    write(tmp_path, range(1, 4))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "train/lo')
    assert steps_in(tmp_path) == [1, 2, 3]
    write(tmp_path, [4], resume_step=3)
    assert steps_in(tmp_path) == [1, 2, 3, 4]


def test_numbers_keep_every_bit_and_any_parser_can_read_them(tmp_path):
    values = {"a": np.float32(0.1), "b": jnp.float32(1 / 3), "c": math.nan, "d": -math.inf, "e": 3}
    writer = MetricWriter(str(tmp_path))
    writer.write(1, values)
    writer.close()
    line = (tmp_path / "metrics.jsonl").read_text()
    json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    (row,) = read_metrics(str(tmp_path / "metrics.jsonl"))
    assert np.float32(row["a"]) == np.float32(0.1)
    assert np.float32(row["b"]) == np.float32(1 / 3)
    assert math.isnan(row["c"])
    assert row["d"] == -math.inf


def test_both_parsers_read_the_same_numbers(tmp_path, monkeypatch):
    values = np.random.default_rng(0).standard_normal(1950) * 10.0 ** np.arange(-37, 38).repeat(26)
    writer = MetricWriter(str(tmp_path))
    for step, each in enumerate(values.astype(np.float32)):
        writer.write(step, {"σ": each, "lost": math.inf})
    writer.close()
    path = str(tmp_path / "metrics.jsonl")
    assert metrics._loads is orjson.loads
    fast = read_metrics(path)
    monkeypatch.setattr(metrics, "_loads", json.loads)
    assert read_metrics(path) == fast
    assert [row["σ"] for row in fast] == [float(each) for each in values.astype(np.float32)]


def test_names_are_in_the_order_of_their_first_row():
    rows = [{"step": 1, "b": 0.0}, {"step": 2, "b": 0.0}, {"step": 2, "a": 0.0, "b": 1.0}, {"step": 3, "c": 0.0}]
    assert metrics.metric_names(rows) == ["b", "a", "c"]
    assert metrics.metric_names([]) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=r"--workdir .*cannot be written"):
        MetricWriter(str(tmp_path / "file" / "run"))


def test_tensorboard_files_are_written_on_request(tmp_path):
    writer = MetricWriter(str(tmp_path), tensorboard=True)
    writer.write(1, {"train/loss": 2.0})
    writer.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/loss" in events.read_bytes()


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(BadInput, match=r"pip install \"sigmarep\[wandb\]\""):
        MetricWriter(str(tmp_path), wandb_project="x")


def test_the_clock_tells_activities_apart_and_leaves_them_out_of_the_speed():
    clock = Clock()
    for _ in range(5):
        with clock.measure("training"):
            time.sleep(0.01)
        clock.step(100)
        with clock.measure("evaluating"):
            time.sleep(0.05)
    assert 2_000 < clock.units_per_second < 10_100
    resumed = Clock()
    resumed.load_state_dict(json.loads(json.dumps(clock.state_dict())))
    assert resumed.state_dict() == clock.state_dict()
    assert resumed.state_dict()["evaluating"] > resumed.state_dict()["training"]


def test_blocks_that_follow_each_other_are_not_silent_for_twice_the_time(capsys, monkeypatch):
    monkeypatch.setattr("sigmarep.training.progress.SECONDS_BETWEEN_SIGNS", 1.5)
    Progress(10, mode="plain").message("begins")
    with waiting("first", mode="plain"):
        time.sleep(1.2)
    with waiting("second", mode="plain"):
        # Said after 1.5 - 1.2 seconds or, as a block's first second may be all of it, one.
        time.sleep(1.3)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "begins"
    assert [line.split(",")[0] for line in lines[1:]] in (["second"], ["first", "second"])


def test_plain_progress_is_sparse_and_names_the_time_left(capsys):
    progress = Progress(1000, mode="plain")
    for step in range(1, 101):
        progress.update(step, loss=2.0, entropy_min=1.5, units_per_second=10.0)
    progress.message("evaluated")
    progress.close()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 3
    assert "step 1/1000" in lines[0]
    assert "lowest entropy 1.5 nats" in lines[0]
    assert lines[-1] == "evaluated"


def test_stacked_and_unrolled_layers_have_the_same_names():
    def block(value):
        heads = np.asarray([value, value + 1.0], np.float32)
        return {
            "attention": {
                "entropy": heads,
                "entropy_normalised": heads / 10,
                "max_logit": heads * 2,
                "qk_norm": heads * 3,
                "bound": heads / 2,
                "logit_variance": heads * 4,
            }
        }

    def spectral(value):
        return {"attention": {"query": {"u": np.ones(3, np.float32), "sigma": np.float32(value)}}}

    def layer(value):
        names = ("sigma", "norm", "stable_rank", "gradient", "update")
        return {"up": {name: np.float32(value + i) for i, name in enumerate(names)}}

    apart = {
        "attention": {"encoder": {f"block_{i}": block(i + 1.0) for i in range(2)}},
        "spectral": {"encoder": {f"block_{i}": spectral(i + 5.0) for i in range(2)}},
        "gamma": {},
        "layers": {"encoder": {f"block_{i}": layer(i + 7.0) for i in range(2)}, "head": layer(9.0)["up"]},
    }

    def stack(a, b):
        return {k: stack(a[k], b[k]) for k in a} if isinstance(a, dict) else np.stack([a, b])

    together = {
        "attention": {"encoder": {"blocks": stack(block(1.0), block(2.0))}},
        "spectral": {"encoder": {"blocks": stack(spectral(5.0), spectral(6.0))}},
        "gamma": {},
        "layers": {"encoder": {"blocks": stack(layer(7.0), layer(8.0))}, "head": layer(9.0)["up"]},
    }
    found = panel_metrics(together, {"encoder/blocks": 1})
    assert found == panel_metrics(apart, {})
    assert found["attention/entropy/encoder/block_1"] == 2.5
    assert found["attention/entropy_head/encoder/block_1/0"] == 2.0
    assert found["attention/entropy_min"] == 1.5
    assert found["attention/entropy_head_min"] == 1.0
    assert found["attention/max_logit/encoder/block_1"] == 6.0
    assert found["spectral/sigma/encoder/block_1/attention/query"] == 6.0
    assert found["attention/bound/encoder/block_1"] == 1.25
    assert found["attention/logit_variance/encoder/block_0"] == 6.0
    path = "encoder/block_1/up"
    assert [
        found[f"{name}/{path}"]
        for name in ("spectral/sigma", "spectral/norm", "spectral/stable_rank", "gradient/norm", "update/ratio")
    ] == [8.0, 9.0, 10.0, 11.0, 12.0]
    assert found["update/ratio/head"] == 13.0
