"""Checkpoints: whatever happens to a file, what is restored is what was saved, or the one before."""

import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sigmarep.errors import BadInput
from sigmarep.training.checkpoints import Checkpointer


def state(step, size=1000):
    return {"a": jnp.arange(float(size)) + step, "b": {"c": jnp.float32(step)}, "none": None}


def abstract(like, sharding=None):
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), like)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with whole checkpoints of steps 2 and 3; step 1 is not kept."""
    folder = tmp_path_factory.mktemp("whole") / "checkpoints"
    checkpoints = Checkpointer(str(folder), keep=2)
    for step in (1, 2, 3):
        checkpoints.save(step, state(step), extra={"step": step})
    checkpoints.close()
    return folder


def restore(folder, say=lambda _: None, like=None):
    checkpoints = Checkpointer(str(folder), keep=2, say=say)
    try:
        return checkpoints.restore(abstract(state(0)) if like is None else like)
    finally:
        checkpoints.close()


def files(folder):
    return sorted(os.path.relpath(os.path.join(w, n), folder) for w, _, names in os.walk(folder) for n in names)


def damage(path, how):
    size = os.path.getsize(path)
    if how == "deleted":
        os.remove(path)
    elif how == "flipped":
        with open(path, "r+b") as file:
            file.seek(size // 2)
            byte = file.read(1)
            file.seek(size // 2)
            file.write(bytes([byte[0] ^ 0xFF]))
    else:
        os.truncate(path, 0 if how == "emptied" else size // 2)


def test_the_newest_is_restored_with_what_was_saved_beside_it(whole):
    found = restore(whole)
    assert (found.step, found.extra) == (3, {"step": 3})
    jax.tree.map(np.testing.assert_array_equal, found.state, state(3))
    assert sorted(os.listdir(whole)) == ["2", "3"]


@pytest.mark.parametrize("how", ["deleted", "emptied", "halved", "flipped"])
def test_any_damage_to_any_file_falls_back_and_says_so(whole, tmp_path, how):
    names = files(whole / "3")
    assert len(names) > 8
    for number, name in enumerate(names):
        folder = tmp_path / str(number)
        shutil.copytree(whole, folder)
        damage(folder / "3" / name, how)
        said = []
        found = restore(folder, said.append)
        jax.tree.map(np.testing.assert_array_equal, found.state, state(found.step))
        assert found.extra == {"step": found.step}
        assert found.step == 2, name
        assert len(said) == 1
        assert "the checkpoint of step 3 is damaged" in said[0]
        assert "going on from step 2" in said[0]
        assert "\n" not in said[0]


def test_a_damaged_step_is_kept_aside_and_can_be_saved_again(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "c")
    damage(tmp_path / "c" / "3" / "state" / "manifest.ocdbt", "emptied")
    checkpoints = Checkpointer(str(tmp_path / "c"), keep=2, say=lambda _: None)
    assert checkpoints.restore(abstract(state(0))).step == 2
    assert checkpoints.all_steps() == [2]
    checkpoints.save(3, state(3), extra={"step": 3})
    checkpoints.close()
    assert restore(tmp_path / "c").step == 3
    assert os.listdir(tmp_path / "c" / "damaged") == ["3"]


def test_when_all_are_damaged_nothing_is_changed(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "c")
    for step in ("2", "3"):
        damage(tmp_path / "c" / step / "_CHECKPOINT_METADATA", "emptied")
    before = files(tmp_path / "c")
    with pytest.raises(BadInput, match="every checkpoint is damaged"):
        restore(tmp_path / "c")
    assert files(tmp_path / "c") == before


def test_another_configuration_is_not_damage(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "c")
    with pytest.raises(BadInput, match=r"another configuration: a is \[1000\] there and \[7\] here"):
        restore(tmp_path / "c", like=abstract(state(0, size=7)))
    assert files(tmp_path / "c") == files(whole)


def test_an_empty_folder_has_nothing_to_restore(tmp_path):
    assert restore(tmp_path) is None


def test_what_a_kill_left_unfinished_is_ignored(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "c")
    shutil.copytree(whole / "3", tmp_path / "c" / "4.orbax-checkpoint-tmp")
    (tmp_path / "c" / "4.orbax-checkpoint-tmp" / "commit_success.txt").unlink(missing_ok=True)
    assert restore(tmp_path / "c").step == 3


@pytest.mark.parametrize(("saving", "restoring"), [(8, 1), (1, 8), (8, 4)])
def test_other_numbers_of_devices_restore_the_same_numbers(tmp_path, saving, restoring):
    def sharding(count):
        mesh = jax.make_mesh((count,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:count])
        return NamedSharding(mesh, PartitionSpec("x"))

    value = {"a": jax.device_put(jnp.arange(16.0), sharding(saving))}
    checkpoints = Checkpointer(str(tmp_path), keep=1)
    checkpoints.save(5, value, extra={})
    checkpoints.close()
    found = restore(tmp_path, like=abstract(value, sharding(restoring)))
    np.testing.assert_array_equal(found.state["a"], np.arange(16.0))
    assert len(found.state["a"].sharding.device_set) == restoring


def test_the_state_may_be_given_away_while_it_is_written(tmp_path):
    checkpoints = Checkpointer(str(tmp_path), keep=1)
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    value = jnp.arange(2_000_000.0)
    checkpoints.save(1, {"a": value}, extra={})
    jax.block_until_ready(overwrite(value))
    checkpoints.close()
    like = {
        "a": jax.ShapeDtypeStruct(
            (2_000_000,), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
        )
    }
    np.testing.assert_array_equal(restore(tmp_path, like=like).state["a"], np.arange(2_000_000.0))


def test_a_step_is_not_saved_twice(tmp_path):
    checkpoints = Checkpointer(str(tmp_path), keep=2)
    checkpoints.save(1, state(1), extra={})
    checkpoints.save(1, state(99), extra={})
    checkpoints.close()
    np.testing.assert_array_equal(restore(tmp_path).state["b"]["c"], 1.0)
