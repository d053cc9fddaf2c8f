"""SIGTERM and Ctrl-C while a command runs Python, and while it runs a long call that is not Python's."""

import signal
import subprocess
import sys
import threading
import time

import pytest

# As deaf to Python's handlers as a compilation, and lets other threads run.
DEAF = "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"
COMMAND = """
import hashlib, os, signal, sys, time
# Tests that a shell has put into the background may hand down an ignored Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
from sigmarep import command, signals

def main():
    {before}
    print("begun", flush=True)
    try:
        {body}
    finally:
        print("cleaned up", flush=True)

command.run(main)
"""
PREEMPTION = (
    "from sigmarep.training.preemption import Preemption; stop = Preemption(143); stop.__enter__(); "
    "command.ctrl_c_is_sigterm()"
)


def start(tmp_path, body, before="pass"):
    path = tmp_path / "program.py"
    path.write_text(COMMAND.format(body=body, before=before))
    # Without absl's own flags, a command needs none.
    # Newer Pythons warn where a process with threads forks.
    command = [sys.executable, "-W", "ignore::DeprecationWarning", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "begun\n"
    time.sleep(0.1)
    return process


def ended(process):
    # Not by communicate(): what came together with "begun" is in the buffer already, which that leaves out.
    limit = threading.Timer(20, process.kill)
    limit.start()
    with process:
        out, err = process.stdout.read(), process.stderr.read()
    limit.cancel()
    return process.returncode, out, err


@pytest.mark.parametrize(
    ("by", "body", "before", "status", "out", "err"),
    [
        (signal.SIGINT, "time.sleep(60)", "pass", 130, "cleaned up\n", "program.py: interrupted\n"),
        (signal.SIGINT, DEAF, "pass", 130, "", "program.py: interrupted\n"),
        (signal.SIGTERM, DEAF, "pass", 143, "", "program.py: stopped by SIGTERM\n"),
        (signal.SIGTERM, "time.sleep(60)", "pass", 143, "", "program.py: stopped by SIGTERM\n"),
        (signal.SIGINT, DEAF, "command.ctrl_c_is_sigterm()", 143, "", "program.py: stopped by SIGTERM\n"),
        (signal.SIGINT, "time.sleep(60)", "command.stop_with_runs()", 143, "cleaned up\n", ""),
        (
            signal.SIGINT,
            DEAF,
            PREEMPTION,
            143,
            "",
            "stopped by SIGTERM before the next step: everything made so far is saved\n",
        ),
    ],
    ids=lambda value: getattr(value, "name", None) or str(value)[:20],
)
def test_a_signal_ends_a_command_with_a_line(by, body, before, status, out, err, tmp_path):
    process = start(tmp_path, body, before)
    process.send_signal(by)
    assert ended(process) == (status, out, err)


def test_the_first_ctrl_c_waits_where_something_must_be_saved_and_the_second_does_not(tmp_path):
    process = start(tmp_path, DEAF, f"{PREEMPTION}; stop.nothing_to_save = False")
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert ended(process) == (130, "", "program.py: interrupted\n")


# The main thread waits without a limit, and the system hands the signal to another thread.
WAITS = (
    "threading.Timer(0.2, lambda: signal.pthread_kill(threading.get_ident(), {by})).start(); threading.Event().wait()"
)


@pytest.mark.parametrize("by", ["SIGTERM", "SIGINT"])
def test_a_signal_that_another_thread_gets_reaches_a_main_thread_that_waits(by, tmp_path):
    body = f"import threading; {WAITS.format(by=f'signal.{by}')}"
    assert ended(start(tmp_path, body, "command.stop_with_runs()")) == (143, "cleaned up\n", "")


def test_a_signal_to_a_forked_child_is_the_childs_alone(tmp_path):
    body = "(child := os.fork()) or time.sleep(60); os.kill(child, signal.SIGTERM); print(os.wait()[1])"
    assert ended(start(tmp_path, body)) == (0, f"{signal.SIGTERM.value}\ncleaned up\n", "")


def test_a_command_ends_with_the_one_that_started_it(tmp_path):
    child = tmp_path / "child.py"
    child.write_text(COMMAND.format(before="signals.end_with_parent()", body="time.sleep(60)"))
    body = (
        f"import subprocess; child = subprocess.Popen([sys.executable, {str(child)!r}], stderr=subprocess.PIPE, "
        "env={**os.environ, **signals.child_environment()}, process_group=0); "
        "time.sleep(60)"
    )
    process = start(tmp_path, body)
    assert process.stdout.readline() == "begun\n"
    process.kill()
    process.wait()
    # The child had the same pipe: at its end both have ended.
    assert process.stdout.read() == ""
