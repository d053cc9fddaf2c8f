"""A workdir that a reader, a second trainer, a divergence, a longer run or a damaged file meets."""

import json
import multiprocessing
import multiprocessing.pool
import os
import shutil
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sigmarep.errors import BadInput, Diverged, SigmarepError
from sigmarep.files import write_atomically
from sigmarep.training import checkpoint_files, evaluate, train_and_evaluate
from sigmarep.training import checkpoints as checkpoints_module
from sigmarep.training.checkpoint_files import MANIFEST, check_path
from sigmarep.training.checkpoints import Checkpointer, read_variables
from sigmarep.training.config import default_config
from sigmarep.training.divergence import GoodCheckpoints
from sigmarep.training.metrics import JsonLines, read_metrics, wandb_id
from sigmarep.training.workdir_lock import FILE, WorkdirLock

pytestmark = pytest.mark.usefixtures("one_device")

DEVICE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def state(step):
    return {"params": {"a": jnp.full(3000, float(step))}, "model_state": {}}


ABSTRACT = {"params": {"a": jax.ShapeDtypeStruct((3000,), jnp.float32, sharding=DEVICE)}}


def saved(folder, steps, keep=2):
    checkpoints = Checkpointer(str(folder), keep=keep)
    for step in steps:
        checkpoints.save(step, state(step), extra={})
    checkpoints.close()


def tree(folder):
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != FILE}


def read(folder, say=lambda _: None):
    step, variables = read_variables(str(folder), ABSTRACT, say=say)
    return step, float(variables["params"]["a"][7])


def test_every_complete_checkpoint_has_its_manifest_while_the_next_is_written(tmp_path):
    checkpoints = Checkpointer(str(tmp_path), keep=3)
    checkpoints.save(1, state(1), extra={})
    checkpoints.wait()
    assert (tmp_path / "1" / MANIFEST).exists()
    assert checkpoint_files.problem_of(str(tmp_path / "1")) is None
    checkpoints.close()


def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path):
    saved(tmp_path / "c", (1, 2))
    paths = [path for path in (tmp_path / "c" / "2").rglob("*") if path.is_file()]
    rng = np.random.default_rng(0)
    for _ in range(40):
        path = paths[rng.integers(len(paths))]
        content = bytearray(path.read_bytes())
        bit = rng.integers(8 * len(content))
        content[bit // 8] ^= 1 << bit % 8
        original = path.read_bytes()
        path.write_bytes(content)
        lines = []
        step, value = read(tmp_path / "c", lines.append)
        assert value == step
        assert step == 2 or "step 2 is damaged" in lines[0]
        path.write_bytes(original)


def test_averaging_passes_over_damaged_checkpoints(tmp_path):
    saved(tmp_path, (1, 2, 4, 8), keep=4)
    damaged = next(path for path in (tmp_path / "4").rglob("*") if path.is_file() and path.name != MANIFEST)
    damaged.write_bytes(b"")
    lines = []
    step, variables = read_variables(str(tmp_path), ABSTRACT, average=3, say=lines.append)
    assert step == 8
    np.testing.assert_allclose(variables["params"]["a"], (1 + 2 + 8) / 3, rtol=1e-6)
    (line,) = lines
    assert "step 4 is damaged" in line
    with pytest.raises(BadInput, match="holds 3 of the 4 checkpoints to average"):
        read_variables(str(tmp_path), ABSTRACT, average=4, say=lines.append)


def test_a_checkpoint_without_a_manifest_is_used_last_and_never_silently(tmp_path):
    saved(tmp_path / "c", (1, 2))
    os.remove(tmp_path / "c" / "2" / MANIFEST)
    lines = []
    assert read(tmp_path / "c", lines.append) == (1, 1.0)
    assert "manifest.json is missing" in lines[0]
    os.remove(tmp_path / "c" / "1" / MANIFEST)
    assert read(tmp_path / "c", lines.append) == (2, 2.0)
    assert lines[1:] == ["the checkpoint of step 2 has no checksums: it is used, but cannot be verified"]


def test_a_reader_changes_nothing_not_even_what_is_unfinished_or_damaged(tmp_path):
    saved(tmp_path / "c", (1, 2))
    shutil.copytree(tmp_path / "c" / "2", tmp_path / "c" / "3.orbax-checkpoint-tmp")
    (tmp_path / "c" / "2" / "_CHECKPOINT_METADATA").write_bytes(b"")
    before = tree(tmp_path)
    assert read(tmp_path / "c") == (1, 1.0)
    assert tree(tmp_path) == before


def test_readers_beside_a_writer_read_whole_checkpoints(tmp_path):
    checkpoints = Checkpointer(str(tmp_path), keep=1)
    checkpoints.save(1, state(1), extra={})
    checkpoints.wait()
    steps, lines, ended = [], [], threading.Event()

    def reader():
        while not ended.is_set():
            step, value = read(tmp_path, lines.append)
            assert value == step
            steps.append(step)

    with multiprocessing.pool.ThreadPool(2) as pool:
        results = [pool.apply_async(reader) for _ in range(2)]
        for step in range(2, 26):
            checkpoints.save(step, state(step), extra={})
        checkpoints.wait()
        ended.set()
        for result in results:
            result.get()
    # One that was being read when its turn to be deleted came is deleted after a later save.
    checkpoints.save(26, state(26), extra={})
    checkpoints.wait()
    checkpoints.close()
    assert checkpoints.all_steps() == [26]
    assert lines == []
    assert len(set(steps)) > 2


def test_a_checkpoint_that_vanishes_while_it_is_read_is_followed_by_the_next(tmp_path, monkeypatch):
    saved(tmp_path, (1,))
    restore = checkpoint_files.read_items

    def vanishing(path, **items):
        if path.endswith("/1") and os.path.exists(path):
            # As where file systems have no locks.
            saved(tmp_path, (2,))
            shutil.rmtree(path)
        return restore(path, **items)

    monkeypatch.setattr(checkpoints_module, "read_items", vanishing)
    lines = []
    assert read(tmp_path, lines.append) == (2, 2.0)
    assert lines == []


def test_the_last_good_checkpoint_outlives_newer_ones(tmp_path):
    checkpoints = Checkpointer(str(tmp_path), keep=1)
    for step in range(1, 5):
        checkpoints.save(step, state(step), extra={})
        checkpoints.wait()
        checkpoints.last_good = min(step, 2)
    assert checkpoints.all_steps() == [2, 4]
    checkpoints.set_aside_after(2)
    assert checkpoints.all_steps() == [2]
    checkpoints.save(4, state(4), extra={})
    checkpoints.close()
    assert checkpoints.all_steps() == [2, 4]
    assert os.listdir(tmp_path / "diverged") == ["4"]


def test_the_loss_after_a_checkpoint_says_if_it_is_good():
    good = GoodCheckpoints(3.0)
    for step, loss, last in [(0, 2.0, 0), (1, 1.9, 1), (2, 4.0, 1), (3, 4.1, 3), (4, 7.0, 3), (5, np.nan, 3)]:
        good.judge(step, loss)
        assert good.step == last, step
    assert GoodCheckpoints(3.0, json.loads(json.dumps(good.state_dict()))).step == 3


@pytest.mark.parametrize("name", ["a[b]", "a\\b"])
def test_a_path_that_the_array_store_cannot_read_is_refused_first(name, tmp_path):
    with pytest.raises(BadInput, match="checkpoints cannot be read from a path with"):
        check_path(str(tmp_path / name / "run"))


# The lock.


def write_lock(folder, beat=0, **owner):
    content = {"pid": 12345, "host": "elsewhere", "boot": "x", "since": "yesterday", "beat": beat, **owner}
    write_atomically(str(folder / FILE), json.dumps(content))


def test_a_second_trainer_is_refused_and_told_who_holds_the_workdir(tmp_path):
    with WorkdirLock(str(tmp_path)):
        with pytest.raises(BadInput, match=rf"process {os.getpid()} on host .*, started .*, trains in it") as error:
            WorkdirLock(str(tmp_path)).__enter__()
        assert "\n" not in str(error.value)
    with WorkdirLock(str(tmp_path)):
        pass


def hold(folder, ready):
    with WorkdirLock(folder):
        ready.set()
        time.sleep(60)


def test_the_lock_of_a_killed_process_is_free_at_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=hold, args=(str(tmp_path), ready))
    process.start()
    assert ready.wait(60)
    with pytest.raises(BadInput, match=f"process {process.pid} "):
        WorkdirLock(str(tmp_path)).__enter__()
    process.kill()
    process.join()
    assert json.loads((tmp_path / FILE).read_text())["pid"] == process.pid
    lines = []
    with WorkdirLock(str(tmp_path), say=lines.append):
        assert json.loads((tmp_path / FILE).read_text())["pid"] == os.getpid()
    assert lines == []


def test_another_host_that_gives_signs_holds_the_workdir(tmp_path):
    write_lock(tmp_path)
    timer = threading.Timer(0.2, write_lock, (tmp_path, 1))
    timer.start()
    lines = []
    with pytest.raises(BadInput, match="process 12345 on host elsewhere, started yesterday, trains in it"):
        WorkdirLock(str(tmp_path), say=lines.append, heartbeat=0.1, patience=5).__enter__()
    assert "waiting 5 s for a sign" in lines[0]


def test_another_host_that_gives_none_loses_it(tmp_path):
    write_lock(tmp_path)
    with WorkdirLock(str(tmp_path), say=lambda _: None, heartbeat=0.1, patience=0.3) as lock:
        lock.check()
        write_lock(tmp_path)
        time.sleep(0.5)
        with pytest.raises(
            SigmarepError, match="process 12345 on host elsewhere, started yesterday, has taken it over"
        ):
            lock.check()


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"[1]", b"\xff", b'{"pid": "x"}'])
def test_a_lock_file_of_any_content_can_be_taken(content, tmp_path):
    (tmp_path / FILE).write_bytes(content)
    with WorkdirLock(str(tmp_path), say=lambda _: None, heartbeat=0.1, patience=0.2):
        pass


# metrics.jsonl.


def test_lines_that_are_no_rows_cost_themselves_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [b'{"step": 1, "train/loss": 2.0}', b'{"step": 2, "train/loss": "nan"}', b'{"step": 9, "train/loss": 1.0}']
    hostile = [
        b"\0" * 50,
        b'{"step": 3, "tra{"step": 4, "train/loss": 1.0}',
        b'{"step": 5, "x": "\xff"}',
        b"[1]",
        b"{}",
    ]
    hostile += [b"7", b'{"step": "6"}', b'{"step": 7, "x": [1]}', b'{"step": 8, "x": "word"}', b"[" * 100_000]
    lines = [rows[0], *hostile[:5], rows[1], *hostile[5:], rows[2], b'{"step": 10, "tr']
    path.write_bytes(b"\n".join(lines))
    assert [row["step"] for row in read_metrics(str(path))] == [1, 2, 9]
    said = []
    JsonLines(str(tmp_path), resume_step=2, say=said.append).close()
    assert path.read_bytes() == rows[0] + b"\n" + rows[1] + b"\n"
    assert len(said) == 1
    assert f"10 of 13 lines cannot be read and are left out; {path}.damaged is the file as it was" in said[0]
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == b"\n".join(lines)


def test_runs_of_weights_and_biases_have_ids_of_their_own(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    folders = [tmp_path / "a" / "seed0", tmp_path / "b" / "seed0", tmp_path / "old"]
    for folder in folders:
        folder.mkdir(parents=True)
    (tmp_path / "old" / "wandb").mkdir()
    ids = [wandb_id(str(folder)) for folder in folders]
    assert ids[0] != ids[1]
    assert ids[2] == "old"
    assert [wandb_id(str(folder)) for folder in folders] == ids
    monkeypatch.setenv("WANDB_RUN_ID", "agent")
    assert wandb_id(str(folders[0])) == "agent"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_is_one_line(tmp_path):
    writer = JsonLines(str(tmp_path))
    writer._file.close()
    writer._file = open("/dev/full", "w")  # noqa: SIM115
    with pytest.raises(SigmarepError, match=r"metrics.jsonl: cannot be written \(No space left on device\)"):
        writer.write(1, {"train/loss": 1.0})


# Whole runs.


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("tfds"))


def tiny(data_dir, **fields):
    config = default_config("image_classification")
    config.total_steps, config.log_every_steps, config.checkpoint_every_steps, config.keep_checkpoints = 6, 1, 1, 1
    config.batch_size, config.writers.progress = 16, "off"
    config.model.depth, config.model.width, config.model.num_heads, config.model.mlp_dim = 1, 16, 2, 16
    config.model.scan = False
    config.model.reparam, config.model.norm = "none", "pre"
    config.optimizer.name, config.optimizer.learning_rate, config.optimizer.schedule = "sgd", 0.01, "constant"
    config.data.data_dir, config.data.in_memory, config.data.num_threads = data_dir, True, 1
    with config.unlocked():
        config.update_from_flattened_dict(fields)
    return config


def losses(folder):
    return [row["train/loss"] for row in read_metrics(f"{folder}/metrics.jsonl") if "train/loss" in row]


@pytest.fixture(scope="module")
def six_steps(data_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("six")
    train_and_evaluate(tiny(data_dir), str(folder))
    return folder


def test_a_longer_run_goes_on_as_if_it_had_been_meant_to(six_steps, data_dir, tmp_path):
    shutil.copytree(six_steps, tmp_path / "run")
    fields = {"total_steps": 8.0, "divergence_factor": 5.0, "data.eval_splits": ("test[:50%]",), "keep_checkpoints": 3}
    train_and_evaluate(tiny(data_dir, **fields), str(tmp_path / "run"))
    train_and_evaluate(tiny(data_dir, total_steps=8.0), str(tmp_path / "whole"))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["data"]["eval_splits"] == ["test[:50%]"]


def test_what_would_change_the_past_is_refused_by_its_name(six_steps, data_dir):
    before = tree(six_steps)
    with pytest.raises(BadInput, match=r"config.seed is 0 there and 1 here, which would change what it has computed"):
        train_and_evaluate(tiny(data_dir, seed=1), str(six_steps))
    assert tree(six_steps) == before


def test_a_schedule_that_depends_on_the_length_keeps_it(data_dir, tmp_path):
    fields = {"optimizer.schedule": "cosine", "optimizer.warmup_steps": 3.0}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(tiny(data_dir, **fields).to_json())
    (tmp_path / "run" / "environment.json").write_text('{"total_steps": 6}')
    with pytest.raises(BadInput, match=r"has 6 steps and config.total_\* asks for 8: .*'cosine' depends .* step 5 on"):
        train_and_evaluate(tiny(data_dir, total_steps=8.0, **fields), str(tmp_path / "run"))


@pytest.mark.parametrize(("optimizer", "learning_rate"), [("sgd", 1e25), ("adam", 1e30), ("lars", 1e25)])
def test_a_diverging_run_leaves_a_checkpoint_that_can_be_evaluated(optimizer, learning_rate, data_dir, tmp_path):
    fields = {"optimizer.name": optimizer, "optimizer.learning_rate": learning_rate, "total_steps": 20.0}
    with pytest.raises(Diverged, match=r"last good checkpoint: step \d+") as error:
        train_and_evaluate(tiny(data_dir, **fields), str(tmp_path))
    result = evaluate(None, str(tmp_path))
    assert str(error.value).endswith(f"step {result['step']}")
    assert np.isfinite(result["eval/test/loss"])
    assert result["eval/test/loss"] < 2 * losses(tmp_path)[0]


@pytest.mark.parametrize(("optimizer", "learning_rate"), [("sgd", 4.0), ("adam", 3.0), ("lars", 30.0)])
def test_the_good_checkpoint_is_at_most_twice_as_bad_as_the_one_before(optimizer, learning_rate, data_dir, tmp_path):
    fields = {"optimizer.name": optimizer, "optimizer.learning_rate": learning_rate, "optimizer.warmup_steps": 80.0}
    fields |= {"total_steps": 80.0, "checkpoint_every_steps": 5.0, "keep_checkpoints": 20}
    with pytest.raises(Diverged, match=r"last good checkpoint: step \d+"):
        train_and_evaluate(tiny(data_dir, **fields), str(tmp_path))
    last = evaluate(None, str(tmp_path))
    shutil.rmtree(tmp_path / "checkpoints" / str(last["step"]))
    before = evaluate(None, str(tmp_path))
    assert 0 < before["step"] < last["step"]
    assert last["eval/test/loss"] <= 2 * before["eval/test/loss"]


def test_a_loss_that_is_nan_is_no_evaluation(six_steps, data_dir, tmp_path):
    shutil.copytree(six_steps, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    from sigmarep.training.config import validate
    from sigmarep.training.experiment import build

    values = build(validate(tiny(data_dir))).create_state()
    ruin = values.replace(params=jax.tree.map(lambda x: x * jnp.nan, values.params))
    checkpoints = Checkpointer(str(tmp_path / "run" / "checkpoints"), keep=1)
    checkpoints.save(6, ruin, extra={})
    checkpoints.close()
    with pytest.raises(Diverged, match="eval/test/loss of the checkpoint of step 6 is nan: its model diverged"):
        evaluate(None, str(tmp_path / "run"))


def test_a_second_run_in_the_workdir_is_refused_and_changes_nothing(six_steps, data_dir):
    with WorkdirLock(str(six_steps)):
        before = tree(six_steps)
        with pytest.raises(BadInput, match="trains in it"):
            train_and_evaluate(tiny(data_dir), str(six_steps))
        assert tree(six_steps) == before
