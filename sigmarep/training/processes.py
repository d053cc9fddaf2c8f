"""Several processes of one run: joining them before anything touches a device, and ending together.

On CPU the processes talk by gloo. There a process with several devices must not give its devices a step before the last
one is finished: collectives of two steps can wait for each other for ever (`steps_in_flight`).
"""

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
from absl import flags

from sigmarep.errors import BadInput
from sigmarep.training.process_flags import HEARTBEAT_SECONDS

# Collectives of one device that may be ready together.
THREADS_A_DEVICE = 4


def join_by_flags() -> None:
    """`join` with what flags and the standard variables of the environment say; prints who this process is.

    Raises:
      BadInput: see `join`.
    """
    give_threads()
    values = flags.FLAGS
    line = join(
        values.distributed,
        coordinator=values.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS"),
        num_processes=_number(values.num_processes, "JAX_NUM_PROCESSES"),
        process_id=_number(values.process_id, "JAX_PROCESS_ID"),
        timeout=values.distributed_timeout,
        heartbeat=values.heartbeat_timeout,
    )
    if line:
        print(line, flush=True)


def give_threads() -> None:
    """Gives XLA a thread for each virtual CPU device; to be called before anything touches a device.

    XLA runs what a device has ready on a pool of one thread a core, and a collective keeps its thread while it waits. With
    more devices than cores the collectives of some devices can wait in all threads for those of others; after 40 seconds
    XLA ends the process. XLA reads the variable NPROC, where it is set, as the number of cores.
    """
    # JAX's types know the name from one of its versions on.
    config: Any = jax.config
    devices = config.jax_num_cpu_devices
    if devices > (os.cpu_count() or 1):
        os.environ.setdefault("NPROC", str(THREADS_A_DEVICE * devices))


def _number(value: int | None, variable: str) -> int | None:
    text = os.environ.get(variable, "")
    if value is not None or not text:
        return value
    if not text.isdecimal():
        raise BadInput(f"{variable} = {text!r}: expected a number")
    return int(text)


def join(
    mode: str,
    *,
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    timeout: int,
    heartbeat: int = HEARTBEAT_SECONDS,
) -> str | None:
    """Makes this process one of several; the first thing that a command does with JAX.

    Args:
      mode: one of `sigmarep.training.process_flags.MODES`.
      coordinator, num_processes, process_id: None for the cluster's own, as JAX detects it.
      timeout: seconds that the processes wait for each other.
      heartbeat: seconds without a sign of life after which a process counts as dead.

    Returns:
      "process i of n: its devices", None for a single process.

    Raises:
      BadInput: a value is missing or wrong, the coordinator cannot be reached, or a process did not start in time.
    """
    if mode == "off" or (mode == "auto" and coordinator is None and not _in_cluster()):
        return None
    missing = _missing({"--coordinator": coordinator, "--num_processes": num_processes, "--process_id": process_id})
    if process_id is not None and num_processes is not None and process_id >= num_processes:
        raise BadInput(f"--process_id = {process_id}: expected a number below --num_processes = {num_processes}")
    start = time.monotonic()
    if coordinator is not None:
        _check_address(coordinator)
        if process_id:
            # JAX's own attempt would end the process without a message.
            _reach(coordinator, process_id, start + timeout)
    left = max(int(start + timeout - time.monotonic()), 1)
    timed_out = _not_all(num_processes, coordinator, timeout)
    # JAX may end the process itself; the reason has been printed by then.
    with _ended_by(time.monotonic() + left + 3, timed_out):
        try:
            jax.distributed.initialize(
                coordinator,
                num_processes,
                process_id,
                cluster_detection_method=None if missing else "deactivate",
                initialization_timeout=left,
                heartbeat_timeout_seconds=heartbeat,
                # At the end one may still write while the others wait.
                shutdown_timeout_seconds=max(heartbeat, HEARTBEAT_SECONDS),
            )
        except (jax.errors.JaxRuntimeError, ValueError, RuntimeError) as error:
            if isinstance(error, ValueError) and missing:
                raise BadInput(_required(missing)) from None
            text = " ".join(str(error).split())
            if "DEADLINE_EXCEEDED" in text:
                raise BadInput(timed_out) from None
            raise BadInput(f"--distributed={mode}: the processes did not connect ({text[:200]})") from error
    return _description()


def _missing(given: dict[str, Any]) -> list[str]:
    """The flags without a value.

    Raises:
      BadInput: only some have one, and no cluster has the others.
    """
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < len(given) and not _in_cluster():
        raise BadInput(_required(missing))
    return missing


def _check_address(coordinator: str) -> None:
    host, _, port = coordinator.rpartition(":")
    if not port.isdecimal() or not host:
        raise BadInput(f"--coordinator = {coordinator!r}: expected HOST:PORT")


def _required(missing: list[str]) -> str:
    return f"{', '.join(missing)}: required outside Slurm, MPI or a TPU slice"


def _description() -> str:
    devices = jax.local_devices()
    return (
        f"process {jax.process_index()} of {jax.process_count()}: {len(devices)} of {jax.device_count()} devices "
        f"({devices[0].device_kind}, numbers {', '.join(str(each.id) for each in devices)})"
    )


def index() -> int:
    """The number of this process."""
    return jax.process_index()


def steps_in_flight(most: int) -> int:
    """Number of steps that the devices may be given before the host waits: `most`, but none among processes on CPU."""
    return 0 if jax.process_count() > 1 and jax.default_backend() == "cpu" else most


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Says that another process of the run has ended on one line and ends this one with status 1.

    Without waiting for the others: one that is gone would be waited for.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        text = " ".join(str(error).split())[:200]
        print(
            f"process {jax.process_index()}: another process of the run has ended ({text})", file=sys.stderr, flush=True
        )
        os._exit(1)


def _in_cluster() -> bool:
    """True if the environment is that of one process of several, in the ways that JAX knows of."""
    hosts = [name for name in os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",") if name]
    tasks = [os.environ.get(name, "1") for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")]
    return len(hosts) > 1 or any(number.isdecimal() and int(number) > 1 for number in tasks)


def _reach(coordinator: str, process_id: int, deadline: float) -> None:
    host, _, port = coordinator.rpartition(":")
    reason = ""
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
            return
        except (OSError, OverflowError) as error:
            reason = str(getattr(error, "strerror", None) or error)
        if time.monotonic() > deadline:
            raise BadInput(
                f"process {process_id}: the coordinator {coordinator} cannot be reached ({reason}); start process 0 there, "
                "or correct --coordinator"
            )
        time.sleep(0.2)


def _not_all(num_processes: int | None, coordinator: str | None, timeout: int) -> str:
    count = num_processes or "all"
    return (
        f"not {count} processes came to the coordinator {coordinator or 'of the cluster'} within {timeout} s; start all of "
        "them, or raise --distributed_timeout"
    )


@contextlib.contextmanager
def _ended_by(deadline: float, message: str) -> Iterator[None]:
    """Ends this process with `message` and the status of bad input if the block is not left by then."""
    done = threading.Event()

    def watch() -> None:
        if not done.wait(deadline - time.monotonic()):
            print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr, flush=True)
            os._exit(BadInput.exit_status)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        done.set()
