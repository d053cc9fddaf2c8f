"""Files and commands of a sweep on a cluster."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from sigmarep import launchers
from sigmarep.errors import BadInput

ROOT = Path(__file__).parents[1]


def test_slurm_gets_one_array_of_the_runs_that_are_left(tmp_path):
    given = launchers.options(["gpus-per-node=8", "time=12:00:00", "exclusive"])
    launch = launchers.slurm("c.py", str(tmp_path / "sw"), [0, 1, 2, 5], script="sweep.py", jobs=3, given=given)
    (path, text), *more = launch.files.items()
    assert not more
    assert launch.commands == [["sbatch", path]]
    lines = text.splitlines()
    assert lines[0] == "#!/bin/bash"
    assert {"#SBATCH --array=0-2,5%3", "#SBATCH --requeue", "#SBATCH --exclusive"} <= set(lines)
    assert {"#SBATCH --gpus-per-node=8", "#SBATCH --time=12:00:00"} <= set(lines)
    assert f"--config {os.getcwd()}/c.py --workdir {tmp_path}/sw --run" in text
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    assert (
        "%"
        not in launchers.slurm("c.py", "w", [3], script="s", jobs=None, given={}).files.popitem()[1].split("output")[0]
    )


@pytest.mark.parametrize(("status", "queued"), [(143, True), (0, False), (1, False)])
def test_a_stopped_run_is_queued_again(tmp_path, status, queued):
    text = launchers.slurm("c.py", str(tmp_path), [0], script="s", jobs=1, given={}).files.popitem()[1]
    for name, body in {"srun": f"exit {status}", "scontrol": f'echo "$@" > {tmp_path}/asked'}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "SLURM_ARRAY_JOB_ID": "7",
        "SLURM_ARRAY_TASK_ID": "0",
    }
    assert subprocess.run(["bash"], input=text, text=True, env=environment, check=False).returncode == status
    asked = tmp_path / "asked"
    assert asked.exists() == queued
    assert not queued or asked.read_text() == "requeue 7_0\n"


def test_skypilot_gets_one_task_and_a_job_for_each_run(monkeypatch):
    monkeypatch.chdir(ROOT)
    launch = launchers.skypilot(
        "configs/stability/vit.py", "runs/sw", [0, 2], ["arm=a,seed=0", "arm=b,seed=0"], given={"bucket": "gs://b"}
    )
    (path, text), *_ = launch.files.items()
    task = json.loads(text)
    assert task["resources"]["accelerators"] == "tpu-v5litepod-16"
    assert task["resources"]["use_spot"] is True
    assert task["file_mounts"] == {"/runs": {"source": "gs://b", "mode": "MOUNT"}}
    assert 'scripts/sweep.py --config configs/stability/vit.py --workdir /runs/sw --run "$RUN"' in task["run"]
    assert subprocess.run(["bash", "-n"], input=task["run"], text=True, check=False).returncode == 0
    assert [command[-1] for command in launch.commands] == [path, path]
    assert [command[-2] for command in launch.commands] == ["RUN=0", "RUN=2"]
    assert launch.commands[1][6] == "arm-b-seed-0"


@pytest.mark.parametrize(
    ("config", "given", "message"),
    [
        ("configs/quickstart.py", {}, "--option bucket=: expected a bucket"),
        ("configs/quickstart.py", {"bucket": "gs://b", "gpus": "8"}, "--option gpus: expected one of accelerators"),
        ("configs/quickstart.py", {"bucket": "gs://b", "use_spot": "maybe"}, "num_nodes, use_spot"),
        ("/etc/c.py", {"bucket": "gs://b"}, "expected a file below the current folder"),
    ],
)
def test_what_skypilot_could_not_run_is_refused(monkeypatch, config, given, message):
    monkeypatch.chdir(ROOT)
    with pytest.raises(BadInput, match=message):
        launchers.skypilot(config, "runs/sw", [0], ["a"], given=given)


def test_options_are_names_with_values():
    assert launchers.options(["a-b=1=2", "c"]) == {"a-b": "1=2", "c": ""}
    with pytest.raises(BadInput, match="expected name=value"):
        launchers.options(["--nodes=2"])


def test_a_command_that_is_not_there_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BadInput, match="sbatch: there is no such command on this machine"):
        launchers.submit(launchers.slurm("c.py", str(tmp_path / "w"), [0], script="s", jobs=1, given={}))
    assert not (tmp_path / "w").exists()


def test_the_script_for_a_slice_prints_what_it_would_run():
    environment = {"PATH": os.environ["PATH"], "NAME": "n", "ZONE": "z", "TYPE": "v6e-64", "DRY_RUN": "1"}
    script = ROOT / "scripts/launch/tpu_pod.sh"
    done = subprocess.run(
        [script, "--config", "configs/vit/a b.py"], env=environment, capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert (
        lines[0] == "gcloud compute tpus tpu-vm create n --accelerator-type v6e-64 --version v2-alpha-tpuv6e --zone z "
    )
    assert any("--distributed=on" in line and "--worker=all" in line for line in lines)
    assert lines[-1].startswith("gcloud compute tpus tpu-vm delete n")
