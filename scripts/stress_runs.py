"""Attacks whole commands, and compares what they leave with runs that nobody disturbed.

    python scripts/stress_runs.py [--attacks kills,flips,trainers,readers] [--kills 100] [--commands images,sweep]

kills: kill -9 at random moments of runs of three tasks, of one with worker processes and of sweeps, whose runs are killed
too; flips: a bit of the newest checkpoint changes after kill -9; trainers: two start in one workdir at random offsets;
readers: evaluate, generate and report beside a run with 200 checkpoints. Metrics and the final state must be those of an
undisturbed run, bit for bit, and no process may outlive the one that started it. Ends with status 1 if anything differs.

Checkpoints and the lock by themselves, more often: scripts/stress_workdir.py.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import IO, Any, NamedTuple

SCRIPTS = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(SCRIPTS)
MARK = "SIGMAREP_STRESS"
# Longest time that runs may take to save and end once the sweep that started them was killed.
ORPHAN_SECONDS = 20.0
XLA_FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
COMMANDS = ("images", "self-supervised", "text", "workers", "sweep")
MODEL = ["depth=1", "width=16", "num_heads=2", "mlp_dim=16"]
SWEEP = """
import configs.quickstart
from sigmarep.sweeps import seeds

def get_config(text=None):
    config = configs.quickstart.get_config()
    config.update_from_flattened_dict(FIELDS)
    return config

def sweep():
    return seeds(2)
"""


class Command(NamedTuple):
    """A command that makes runs in a folder: its script, its flags, and the folders of the runs in that one."""

    script: str
    flags: list[str]
    runs: tuple[str, ...] = ("",)


def fields(steps: int, **more: Any) -> dict[str, Any]:
    common = {"total_steps": steps, "log_every_steps": 1, "checkpoint_every_steps": 10, "writers.progress": "plain"}
    return {**common, "optimizer.warmup_steps": 5, **more}


def train(config: str, **values: Any) -> Command:
    model = [f"--config.model.{each}" for each in MODEL]
    given = [f"--config.{name}={value}" for name, value in values.items()]
    return Command("train.py", ["--config", f"configs/{config}.py", *model, *given])


def commands(folder: str) -> dict[str, Command]:
    """The commands that are killed."""
    images = fields(200, batch_size=16, eval_every_steps=50)
    ssl = fields(200, batch_size=25, eval_every_steps=100)
    text = fields(200, batch_size=4, eval_every_steps=100, baselines=False, **{"data.sequence_length": 16})
    path = os.path.join(folder, "sweep.py")
    model = {f"model.{name}": int(value) for name, value in (each.split("=") for each in MODEL)}
    with open(path, "w") as file:
        values = {name: float(value) if name.endswith("_steps") else value for name, value in (images | model).items()}
        file.write(SWEEP.replace("FIELDS", repr({"model.dropout": 0.1, **values})))
    return {
        "images": train("quickstart", **images, **{"model.dropout": 0.1}),
        "self-supervised": train("ssl/quickstart", **ssl),
        "text": train("lm/quickstart", **text),
        "workers": train("quickstart", **images, **{"data.num_workers": 1}),
        "sweep": Command("sweep.py", ["--config", path, "--jobs", "2"], ("seed=0", "seed=1")),
    }


# Processes.


class Process(NamedTuple):
    """A command that runs, and the file that its output goes to."""

    popen: subprocess.Popen[bytes]
    output: IO[bytes]

    @property
    def runs(self) -> bool:
        return self.popen.poll() is None

    def end(self) -> tuple[int, str]:
        """Waits for its end. Returns its status and its output."""
        status = self.popen.wait(timeout=600)
        with self.output as file:
            file.seek(0)
            return status, file.read().decode(errors="replace")


def start(command: Command, workdir: str, cache: str, mark: str = "") -> Process:
    """Starts the command with `mark` in its environment, and that of all processes that it starts."""
    own = {MARK: mark, "JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    path = os.pathsep.join(filter(None, (ROOT, os.environ.get("PYTHONPATH"))))
    # A pipe would be open as long as a process that inherited it.
    output = tempfile.TemporaryFile()  # noqa: SIM115
    popen = subprocess.Popen(
        [sys.executable, os.path.join(SCRIPTS, command.script), *command.flags, *_place(command, workdir)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": XLA_FLAGS, "PYTHONPATH": path, **own},
        stdout=output,
        stderr=subprocess.STDOUT,
    )
    return Process(popen, output)


def _place(command: Command, workdir: str) -> list[str]:
    return [workdir] if command.script == "report.py" else ["--workdir", workdir]


def marked(mark: str) -> list[int]:
    """The living processes that were started with the mark."""
    numbers = []
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            # Of one that has ended this file is empty.
            if entry.isdecimal() and f"{MARK}={mark}\0".encode() in _read(f"/proc/{entry}/environ"):
                numbers.append(int(entry))
    return numbers


def trainers_of(workdir: str) -> int:
    """The number of living processes of train.py that have the workdir's lock open, or are started for it alone."""
    count, lock = 0, os.path.join(os.path.realpath(workdir), ".lock")
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            words = _read(f"/proc/{entry}/cmdline").split(b"\0") if entry.isdecimal() else []
            if any(each.endswith(b"/train.py") for each in words[:3]):
                count += workdir.rstrip("/").encode() in words or _opens(entry, lock)
    return count


def _opens(process: str, path: str) -> bool:
    for descriptor in os.listdir(f"/proc/{process}/fd"):
        # It may be closed by now.
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/{process}/fd/{descriptor}") == path:
                return True
    return False


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


# What a run leaves.


def lines(workdir: str) -> int:
    with contextlib.suppress(OSError):
        return _read(os.path.join(workdir, "metrics.jsonl")).count(b"\n")
    return 0


def left(workdir: str) -> dict[str, Any]:
    """Everything that a run computed: rows of metrics without speeds, and the bytes of its final state by name."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    rows = [json.loads(line) for line in _read(os.path.join(workdir, "metrics.jsonl")).splitlines()]
    rows = [{name: value for name, value in row.items() if not name.endswith("_per_second")} for row in rows]
    folder = os.path.join(workdir, "checkpoints")
    step = max(int(name) for name in os.listdir(folder) if name.isdecimal())
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        state = checkpointer.restore(f"{folder}/{step}", args=ocp.args.Composite(state=ocp.args.StandardRestore()))
    leaves = jax.tree_util.tree_leaves_with_path(state["state"])
    arrays = {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}
    return {"step": step, "rows": rows, "state": arrays}


def differences(workdir: str, reference: str) -> list[str]:
    """Names of the parts of a run that are not those of the reference."""
    ours, theirs = left(workdir), left(reference)
    differing = [name for name in ours if ours[name] != theirs[name]]
    extra = set(os.listdir(workdir)) - set(os.listdir(reference))
    return differing + [f"leaves {name}" for name in sorted(extra)]


# Attacks.


class Attack:
    """The folder of an attack, its cache of compiled programs, the names of the commands to be killed, and the failures."""

    def __init__(self, folder: str, commands: list[str]):
        self.folder, self.cache, self.commands = folder, os.path.join(folder, "cache"), commands
        self.failures: list[str] = []
        self._number = 0

    def place(self, name: str) -> str:
        self._number += 1
        return os.path.join(self.folder, f"{name.replace(' ', '_')}-{self._number}")

    def check(self, right: bool, failure: str) -> None:
        if not right:
            self.failures.append(failure)
            print(f"  FAILED: {failure}", flush=True)

    def reference(self, name: str, command: Command) -> tuple[str, float, float]:
        """The folder of an undisturbed run, and the seconds to its first row of metrics and from there to its end."""
        workdir = self.place(f"{name}-reference")
        # The first start compiles.
        for again in (False, True):
            if again:
                shutil.rmtree(workdir)
            process, begin = start(command, workdir, self.cache), time.monotonic()
            while process.runs and not lines(os.path.join(workdir, command.runs[0])):
                time.sleep(0.01)
            first = time.monotonic()
            status, output = process.end()
            if status:
                raise SystemExit(f"{name}: the undisturbed run ended with status {status}: {output[-2000:]}")
        return workdir, first - begin, time.monotonic() - first


def kill_at_random(process: Process, workdir: str, command: Command, before: float, after: float) -> bool:
    """Kills the process or one of the runs that it makes: at a random moment before its first step, or, two times in
    three, after it. Returns False if it ended before."""
    run = os.path.join(workdir, random.choice(command.runs))
    begin, rows = time.monotonic(), lines(run)
    if random.random() < 2 / 3:
        while process.runs and (now := lines(run)) <= rows and time.monotonic() - begin < 3 * before + 10:
            # A start drops the rows after its checkpoint.
            rows = min(rows, now)
            time.sleep(0.002)
        begin, wait = time.monotonic(), random.random() * after
    else:
        wait = random.random() * before
    while process.runs and time.monotonic() - begin < wait:
        time.sleep(0.002)
    if not process.runs:
        return False
    number = process.popen.pid
    children = _children(number) if command.script == "sweep.py" and random.random() < 1 / 3 else []
    with contextlib.suppress(ProcessLookupError):
        os.kill(random.choice(children) if children else number, signal.SIGKILL)
    return True


def _children(parent: int) -> list[int]:
    children: list[int] = []
    for task in os.listdir(f"/proc/{parent}/task"):
        with contextlib.suppress(OSError):
            children += map(int, _read(f"/proc/{parent}/task/{task}/children").split())
    return children


def await_end_of(mark: str, seconds: float) -> list[int]:
    """Waits for the marked processes, and returns those that are alive after so long."""
    end = time.monotonic() + seconds
    while (alive := marked(mark)) and time.monotonic() < end:
        time.sleep(0.05)
    return alive


def kills(attack: Attack, count: int) -> None:
    chosen = {name: each for name, each in commands(attack.folder).items() if name in attack.commands}
    shares = dict.fromkeys(chosen, count // len(chosen))
    shares[next(iter(chosen))] += count - sum(shares.values())
    for name, command in chosen.items():
        reference, before, after = attack.reference(name, command)
        killed, starts, finished, most, orphans = 0, 0, 0, 0, 0
        while killed < shares[name]:
            workdir, status = attack.place(name), None
            while status != 0:
                mark, starts = f"{os.getpid()}-{name}-{starts}", starts + 1
                process = start(command, workdir, attack.cache, mark)
                one = killed < shares[name] and kill_at_random(process, workdir, command, before, after)
                killed += one
                while process.runs:
                    most = max(most, *(trainers_of(os.path.join(workdir, run)) for run in command.runs))
                    time.sleep(0.05)
                status, output = process.end()
                # A sweep is started again at once half of the time: its runs may still be saving then.
                if not one or command.script != "sweep.py" or random.random() < 0.5:
                    orphans += len(await_end_of(mark, ORPHAN_SECONDS))
                attack.check(status == 0 or one, f"{name}: status {status}: {output[-1000:]}")
                if status != 0 and not one:
                    break
            finished += 1
            for run in command.runs:
                differing = differences(os.path.join(workdir, run), os.path.join(reference, run))
                attack.check(not differing, f"{name}: differs in {differing}")
            shutil.rmtree(workdir)
        attack.check(not orphans, f"{name}: {orphans} processes outlived their parent")
        print(
            f"kill -9, {name}: {killed} kills in {starts} starts of {finished} runs (first step after {before:.1f} s, "
            f"{after:.1f} s of steps), at most {most} trainers in a workdir, {orphans} orphans",
            flush=True,
        )


def flips(attack: Attack, draws: int) -> None:
    command = commands(attack.folder)["images"]
    reference, _, after = attack.reference("flips", command)
    refused = 0
    for _ in range(draws):
        workdir = attack.place("flips")
        folder = os.path.join(workdir, "checkpoints")
        process = start(command, workdir, attack.cache)
        while process.runs and len(_steps(folder)) < 2:
            time.sleep(0.002)
        time.sleep(random.random() * after / 2)
        process.popen.kill()
        process.end()
        newest = max(_steps(folder))
        paths = [os.path.join(at, name) for at, _, names in os.walk(f"{folder}/{newest}") for name in names]
        path = random.choice([each for each in paths if os.path.getsize(each)])
        content = bytearray(_read(path))
        bit = random.randrange(8 * len(content))
        content[bit // 8] ^= 1 << bit % 8
        with open(path, "wb") as file:
            file.write(content)
        status, output = start(command, workdir, attack.cache).end()
        attack.check(status == 0, f"flip in {path}: status {status}: {output[-1000:]}")
        refused += "is damaged" in output
        differing = differences(workdir, reference)
        attack.check(not differing, f"flip in {path}: differs in {differing}")
        shutil.rmtree(workdir)
    print(f"bit flips, then train.py: {draws} draws, {refused} refused, {draws - refused} without effect", flush=True)


def trainers(attack: Attack, starts: int) -> None:
    command = commands(attack.folder)["images"]
    reference, before, _ = attack.reference("trainers", command)
    met = late = 0
    while met < starts:
        workdir = attack.place("trainers")
        first = start(command, workdir, attack.cache)
        time.sleep(random.random() * before)
        second = start(command, workdir, attack.cache)
        (trained, _), (refused, output) = results = sorted([first.end(), second.end()])
        if trained == refused == 0 and any("steps are done already" in text for _, text in results):
            # On a busy machine the first may have ended before the second looked.
            late += 1
            attack.check(late <= 5 * starts, "two trainers: the first has always ended before the second looks")
            if late > 5 * starts:
                break
            continue
        met += 1
        # Before it looks at the workdir, it says what it is about to do.
        errors = [line for line in output.splitlines() if line.startswith("train.py: ")]
        right = (trained, refused, len(errors)) == (0, 2, 1) and "trains in it" in errors[0]
        attack.check(right and "Traceback" not in output, f"two trainers: {results}")
        differing = differences(workdir, reference)
        attack.check(not differing, f"two trainers: differs in {differing}")
    print(f"two train.py at random offsets: {met} met, {late} came late, {len(attack.failures)} failures", flush=True)


def readers(attack: Attack, checkpoints: int) -> None:
    steps = {"total_steps": 10 * checkpoints, "checkpoint_every_steps": 10}
    values = fields(0, batch_size=4, baselines=False, **{"data.sequence_length": 16}) | steps
    command = train("lm/quickstart", **values)
    kinds = {
        "evaluate": Command("evaluate.py", []),
        "generate": Command("generate.py", ["--prompt", "The", "--max_length", "8"]),
        "report": Command("report.py", ["--output", os.path.join(attack.folder, "page.html")]),
    }
    reference, _, _ = attack.reference("readers", command)
    workdir, counts = attack.place("readers"), dict.fromkeys(kinds, 0)
    writer = start(command, workdir, attack.cache)
    while writer.runs and not _steps(os.path.join(workdir, "checkpoints")):
        time.sleep(0.01)
    while writer.runs:
        for name, kind in kinds.items():
            status, output = start(kind, workdir, attack.cache).end()
            attack.check(status == 0 and "Traceback" not in output, f"{name} beside a run: status {status}: {output}")
            counts[name] += writer.runs
    status, output = writer.end()
    attack.check(status == 0, f"a run beside readers: status {status}: {output[-1000:]}")
    differing = differences(workdir, reference)
    attack.check(not differing, f"a run beside readers: differs in {differing}")
    print(f"readers beside a run of {checkpoints} checkpoints: {counts}", flush=True)


def _steps(checkpoints: str) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(name) for name in os.listdir(checkpoints) if name.isdecimal()]
    return []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attacks", default="kills,flips,trainers,readers", help="separated by commas")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--commands", default=",".join(COMMANDS), help="those that are killed")
    parser.add_argument("--flips", type=int, default=20)
    parser.add_argument("--trainers", type=int, default=10, help="starts of two")
    parser.add_argument("--readers", type=int, default=200, help="checkpoints of the run that is read")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    random.seed(given.seed)
    every: dict[str, Callable[[Attack, int], None]] = {
        "kills": kills,
        "flips": flips,
        "trainers": trainers,
        "readers": readers,
    }
    failures: list[str] = []
    for name in given.attacks.split(","):
        if name not in every:
            parser.error(f"--attacks {name}: expected some of {', '.join(every)}")
        with tempfile.TemporaryDirectory(prefix=f"stress-{name}-") as folder:
            attack = Attack(folder, given.commands.split(","))
            every[name](attack, getattr(given, name))
            failures += attack.failures
    print(f"{len(failures)} failures")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
