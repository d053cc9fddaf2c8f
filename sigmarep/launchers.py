"""Launch of a sweep's runs on a cluster, as a Slurm job array or as SkyPilot managed jobs.

Both start `scripts/sweep.py … --run NUMBER` on the machines of a run, which makes that run and notes its outcome in the
sweep's record. A run that is preempted saves its state, exits with 143, and is queued again by the cluster.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from sigmarep.errors import BadInput

LAUNCHERS = ("local", "slurm", "skypilot")
# Port of the coordinator under SkyPilot. On Slurm and on TPU slices JAX finds the coordinator by itself.
PORT = 8476
SECONDS_TO_SAVE = 120
SKYPILOT_OPTIONS = {"accelerators": "tpu-v5litepod-16", "num_nodes": "1", "use_spot": "true", "bucket": "", "setup": ""}


class Launch(NamedTuple):
    """Files to write, as contents by path, and the commands to run afterwards."""

    files: dict[str, str]
    commands: list[list[str]]


def options(pairs: Sequence[str]) -> dict[str, str]:
    """Parses options of the form `name=value` or `name`.

    Raises:
      BadInput: a name has characters other than letters, digits, - and _, or a value has a line break.
    """
    values = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        if not re.fullmatch(r"[A-Za-z][\w-]*", name) or "\n" in value:
            raise BadInput(f"--option {pair!r}: expected name=value, or name alone")
        values[name] = value
    return values


def slurm(
    config: str,
    workdir: str,
    numbers: Sequence[int],
    *,
    script: str,
    jobs: int | None,
    given: dict[str, str],
    imports: Sequence[str] = (),
) -> Launch:
    """Prepares a Slurm job array.

    Args:
      config: the configuration file.
      workdir: folder of the sweep.
      numbers: numbers of the runs, increasing.
      script: path of scripts/sweep.py.
      jobs: largest number of runs at a time; None for no limit.
      given: options of sbatch without their dashes, such as {"gpus-per-node": "8", "nodes": "2"}.
      imports: values of the script's flag --import.
    """
    workdir = os.path.abspath(workdir)
    lines = {
        "job-name": os.path.basename(workdir),
        "array": _ranges(numbers) + (f"%{jobs}" if jobs else ""),
        "requeue": "",
        "open-mode": "append",
        "output": os.path.join(workdir, "slurm-%a.log"),
        # Tells a run to save before its time limit.
        "signal": f"TERM@{SECONDS_TO_SAVE}",
        **given,
    }
    path = os.path.join(workdir, "sweep.sbatch")
    modules = [f"--import={os.path.abspath(each) if os.sep in each else each}" for each in imports]
    run = shlex.join(
        [sys.executable, os.path.abspath(script), "--config", os.path.abspath(config), "--workdir", workdir, *modules]
    )
    text = "\n".join(
        [
            "#!/bin/bash",
            *(f"#SBATCH --{name}" + (f"={value}" if value else "") for name, value in lines.items()),
            f'srun {run} --run "$SLURM_ARRAY_TASK_ID"',
            "status=$?",
            "# Stopped with a saved state: queue the run again.",
            'if [ "$status" -eq 143 ]; then scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"; fi',
            'exit "$status"',
            "",
        ]
    )
    return Launch({path: text}, [["sbatch", path]])


def skypilot(
    config: str,
    workdir: str,
    numbers: Sequence[int],
    names: Sequence[str],
    *,
    given: dict[str, str],
    imports: Sequence[str] = (),
) -> Launch:
    """Prepares one SkyPilot managed job per run; SkyPilot restarts a preempted job on other machines.

    Args:
      config: the configuration file. It must be below the current folder, which is copied to the machines.
      workdir: folder of the sweep; its last part names the folder in the mounted bucket.
      numbers: numbers of the runs.
      names: names of the runs.
      given: options, see `SKYPILOT_OPTIONS`.
      imports: values of the script's flag --import; paths among them must be below the current folder too.

    Raises:
      BadInput: an option is unknown or invalid, there is no bucket, or a file would not be copied.
    """
    unknown = sorted(set(given) - set(SKYPILOT_OPTIONS))
    if unknown:
        raise BadInput(f"--option {unknown[0]}: expected one of {', '.join(SKYPILOT_OPTIONS)}")
    values = SKYPILOT_OPTIONS | given
    if not re.match(r"(gs|s3|r2)://", values["bucket"]):
        raise BadInput(f"--option bucket={values['bucket']}: expected a bucket for the runs, such as gs://NAME")
    if not values["num_nodes"].isdecimal() or values["use_spot"] not in ("true", "false"):
        raise BadInput("--option num_nodes, use_spot: expected a number, and true or false")
    relative = os.path.relpath(config)
    if relative.startswith(".."):
        raise BadInput(f"--config {config}: expected a file below the current folder, which is copied to the machines")
    mounted = f"/runs/{os.path.basename(os.path.abspath(workdir))}"
    tpu = values["accelerators"].startswith("tpu")
    extra = "jax[tpu]" if tpu else "jax[cuda13]"
    task: dict[str, Any] = {
        "name": os.path.basename(mounted).replace("_", "-"),
        "resources": {
            "accelerators": values["accelerators"],
            "use_spot": values["use_spot"] == "true",
            **({"accelerator_args": {"runtime_version": _runtime(values["accelerators"])}} if tpu else {}),
        },
        "num_nodes": int(values["num_nodes"]),
        "workdir": ".",
        "file_mounts": {"/runs": {"source": values["bucket"], "mode": "MOUNT"}},
        "envs": {"RUN": "0"},
        "setup": "\n".join([f'pip install "{extra}" -e ".[text,speech]"', *filter(None, [values["setup"]])]),
        "run": "\n".join(
            [
                # The nodes of a TPU slice are its hosts.
                f'export JAX_COORDINATOR_ADDRESS="$(echo "$SKYPILOT_NODE_IPS" | head -n 1):{PORT}"',
                'export JAX_NUM_PROCESSES="$SKYPILOT_NUM_NODES" JAX_PROCESS_ID="$SKYPILOT_NODE_RANK"',
                '[ "$SKYPILOT_NUM_NODES" -gt 1 ] || unset JAX_COORDINATOR_ADDRESS',
                f'python scripts/sweep.py --config {shlex.quote(relative)} --workdir {shlex.quote(mounted)} --run "$RUN"'
                + "".join(f" --import={shlex.quote(each)}" for each in imports),
            ]
        ),
    }
    path = os.path.join(os.path.abspath(workdir), "sweep.sky.yaml")
    commands = [
        ["sky", "jobs", "launch", "--yes", "--detach-run", "--name", _job_name(name), "--env", f"RUN={number}", path]
        for number, name in zip(numbers, names, strict=True)
    ]
    # JSON is valid YAML, and the standard library can write it.
    return Launch({path: json.dumps(task, indent=2) + "\n"}, commands)


def _ranges(numbers: Sequence[int]) -> str:
    """Formats increasing numbers for Slurm: 0-3,5."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def _runtime(accelerators: str) -> str:
    kinds = {"tpu-v5litepod": "v2-alpha-tpuv5-lite", "tpu-v5p": "v2-alpha-tpuv5", "tpu-v6e": "v2-alpha-tpuv6e"}
    return next((runtime for kind, runtime in kinds.items() if accelerators.startswith(kind)), "tpu-ubuntu2204-base")


def _job_name(name: str) -> str:
    return re.sub(r"[^a-z0-9-]+", "-", name.lower()).strip("-")


def show(launch: Launch) -> str:
    """Describes the files that `submit` would write and the commands that it would run."""
    files = [f"# {path}\n{text}" for path, text in launch.files.items()]
    return "\n".join([*files, *(shlex.join(command) for command in launch.commands)])


def submit(launch: Launch) -> None:
    """Writes the files and runs the commands.

    Raises:
      BadInput: a file cannot be written, or the cluster's command is missing or fails.
    """
    for command in launch.commands:
        if shutil.which(command[0]) is None:
            raise BadInput(f"{command[0]}: there is no such command on this machine; --dry_run prints the commands")
    for path, text in launch.files.items():
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "w") as file:
                file.write(text)
        except OSError as error:
            raise BadInput(f"{path}: cannot be written ({error.strerror})") from error
    for command in launch.commands:
        status = subprocess.run(command, check=False).returncode
        if status:
            raise BadInput(f"{shlex.join(command)}: failed with status {status}")
