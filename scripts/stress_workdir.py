"""Attacks checkpoints and the lock of a workdir, and prints what came of it.

    python scripts/stress_workdir.py

A reader beside a writer of 200 checkpoints; 200 single-bit flips in the newest checkpoint after kill -9; two trainers
that start in one workdir at random offsets, 20 times, on one host and as if from another. Ends with status 1 if anything
was lost, read wrongly or written by two.
"""

import argparse
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time

import jax
import jax.numpy as jnp

from sigmarep.errors import BadInput
from sigmarep.files import write_atomically
from sigmarep.training.checkpoints import Checkpointer, read_variables
from sigmarep.training.workdir_lock import FILE, WorkdirLock

SIZE = 20_000


def state(step):
    return {
        "params": {"a": jnp.arange(SIZE, dtype=jnp.float32) + step, "b": jnp.full(7, float(step))},
        "model_state": {},
    }


def save(folder, steps, keep=2):
    checkpoints = Checkpointer(folder, keep=keep)
    for step in steps:
        checkpoints.save(step, state(step), extra={})
    checkpoints.close()


def read(folder, say):
    """The step that was read, and True if its numbers are those that were saved."""
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = {
        "params": {
            name: jax.ShapeDtypeStruct((size,), jnp.float32, sharding=sharding)
            for name, size in (("a", SIZE), ("b", 7))
        }
    }
    restored = read_variables(folder, like, say=say)
    assert restored is not None
    read_step, variables = restored
    expected = state(read_step)["params"]
    return read_step, all(bool((variables["params"][name] == expected[name]).all()) for name in expected)


def readers_beside_a_writer(folder, context, checkpoints=200, reads=50):
    writer = context.Process(target=save, args=(folder, range(1, checkpoints + 1), 1))
    writer.start()
    while not os.path.isdir(os.path.join(folder, "1")) and writer.is_alive():
        time.sleep(0.01)
    wrong = 0
    lines: list[str] = []
    steps: list[int] = []
    while writer.is_alive() or len(steps) < reads:
        step, right = read(folder, lines.append)
        steps.append(step)
        wrong += not right
    writer.join()
    print(
        f"reader beside a writer: {checkpoints} checkpoints, {len(steps)} reads of {len(set(steps))} of them, "
        f"{wrong} wrong, {len(lines)} called damaged, status of the writer {writer.exitcode}, last step {steps[-1]}"
    )
    return wrong or lines or writer.exitcode or steps[-1] != checkpoints


def bit_flips(folder, context, draws=200):
    writer = context.Process(target=save, args=(folder, range(1, 10_000)))
    writer.start()
    while not os.path.isdir(os.path.join(folder, "8")):
        time.sleep(0.01)
    time.sleep(random.random() / 10)
    writer.kill()
    writer.join()
    newest, right = read(folder, print)
    paths = [os.path.join(where, name) for where, _, names in os.walk(f"{folder}/{newest}") for name in names]
    refused, harmless, wrong = 0, 0, int(not right)
    for _ in range(draws):
        path = random.choice(paths)
        with open(path, "rb") as file:
            content = file.read()
        flipped, bit = bytearray(content), random.randrange(8 * len(content))
        flipped[bit // 8] ^= 1 << bit % 8
        with open(path, "wb") as file:
            file.write(flipped)
        step, right = read(folder, lambda line: None)
        wrong, refused, harmless = wrong + (not right), refused + (step != newest), harmless + (step == newest)
        with open(path, "wb") as file:
            file.write(content)
    print(
        f"bit flips after kill -9: {draws} in {len(paths)} files, {refused} refused, {harmless} harmless, {wrong} wrong"
    )
    save(folder, [10_000])
    return wrong or read(folder, print) != (10_000, True)


def trainer(folder, offset, results):
    time.sleep(offset)
    try:
        with WorkdirLock(folder, say=lambda line: None, heartbeat=0.05, patience=1):
            time.sleep(0.6)
            results.put("trained")
    except BadInput as error:
        results.put(str(error))


def two_trainers(folder, context, starts=20):
    outcomes = {"one trained, one refused in one line": 0, "other": 0}
    for _ in range(starts):
        results = context.Queue()
        trainers = [context.Process(target=trainer, args=(folder, random.random() / 2, results)) for _ in range(2)]
        for each in trainers:
            each.start()
        answers = sorted(results.get() for _ in trainers)
        one = answers[1] == "trained" and "trains in it" in answers[0] and "\n" not in answers[0]
        outcomes["one trained, one refused in one line" if one else "other"] += 1
        for each in trainers:
            each.join()
    print(f"two trainers on one host, {starts} starts: {outcomes}")
    return outcomes["other"]


def another_host(folder, context, starts=20):
    outcomes = {"refused while it lives": 0, "taken over when it is dead": 0, "other": 0}
    for start in range(starts):
        lives = start % 2 == 0
        results = context.Queue()
        second = context.Process(target=trainer, args=(folder, random.random() / 2, results))
        second.start()
        beat, answer = 0, None
        while answer is None:
            if beat == 0 or lives:
                owner = {"pid": 1, "host": "elsewhere", "boot": "", "since": "now", "beat": beat}
                write_atomically(os.path.join(folder, FILE), json.dumps(owner))
                beat += 1
            time.sleep(0.05)
            answer = None if results.empty() else results.get()
        second.join()
        refused = "process 1 on host elsewhere" in answer
        key = "refused while it lives" if lives and refused else "taken over when it is dead"
        outcomes[key if lives == refused else "other"] += 1
    print(f"trainers beside one of another host, {starts} starts: {outcomes}")
    return outcomes["other"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    random.seed(parser.parse_args().seed)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sigmarep.training.checkpoints", "sigmarep.training.workdir_lock"])
    failures = 0
    for attack in (two_trainers, another_host, bit_flips, readers_beside_a_writer):
        with tempfile.TemporaryDirectory() as folder:
            failures += bool(attack(folder, context))
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
