"""Runs whose story is written by hand, for tests of what the report makes of them."""

import json
from pathlib import Path

from sigmarep.diagnostics import findings, report, runs


def run_folder(folder, rows, *, end="\n", config=None, total=None, **files):
    """A run with the metrics `rows`; `end` follows the last line."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"task": "image_classification", "seed": 0, **(config or {})}))
    (folder / "environment.json").write_text(json.dumps({"total_steps": total, "packages": {"jax": "0.10"}}))
    (folder / "metrics.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + end)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def row(step, loss, *entropies, **more):
    found = {f"attention/entropy/encoder/block_{i}": value for i, value in enumerate(entropies)}
    heads = {
        f"attention/entropy_head/encoder/block_{i}/{h}": value for i, value in enumerate(entropies) for h in range(2)
    }
    least = {"attention/entropy_min": "nan" if "nan" in entropies else min(entropies)} if entropies else {}
    return {"step": step, "train/loss": loss, **found, **heads, **least, **more}


def collapsing(rise=400):
    """100 lines, five steps apart: block 1 falls below 0.1 nats at step 340, block 0 at 360; the loss rises at `rise`."""

    def entropy(step, at):
        return 2.0 if step < at else 0.05

    return [
        row(step, 1.0 if step < rise else 2.0, entropy(step, 360), entropy(step, 340) + step * 1e-6)
        for step in range(5, 505, 5)
    ]


def read_all(*folders):
    return [runs.read(place) for place in runs.find([str(each) for each in folders]).places]


def read(folder):
    (run,) = read_all(folder)
    return run, findings.facts(run)


def told(run, facts):
    return [sentence.text for sentence in findings.sentences(run, facts)]


def page_of(tmp_path, *folders, most=6, static=None):
    output = str(tmp_path / "out" / "page.html")
    files = report.write([str(each) for each in folders], output, most=most, static=static)
    return Path(files[0]).read_text(), [Path(each).name for each in files[1:]]


def sweep(tmp_path, arms=("pre_ln", "sigma"), rates=(0.001, 0.01, 0.1), seeds=2):
    """`sigma` trains at all rates; `pre_ln` collapses at 0.01 and diverges at 0.1."""
    record = {}
    for arm in arms:
        for rate in rates:
            for seed in range(seeds):
                name = f"arm={arm},learning_rate={rate},seed={seed}"
                bad = arm == "pre_ln" and rate > 0.001
                rows = [
                    row(step, 3.0 if bad or step < 15 else 1.0 + seed / 100, 0.01 if bad else 2.0)
                    for step in range(1, 21)
                ]
                if diverged := arm == "pre_ln" and rate == 0.1:
                    rows.append(row(21, "nan", 0.01))
                config = {"optimizer": {"learning_rate": rate}, "seed": seed}
                run_folder(tmp_path / "sweep" / name, rows, config=config, total=20)
                point = {"arm": arm, "learning_rate": rate, "config.seed": seed}
                record[name] = {"point": point, "state": "diverged" if diverged else "done", "status": 0}
    (tmp_path / "sweep/sweep.json").write_text(json.dumps(record))
    return tmp_path / "sweep"
