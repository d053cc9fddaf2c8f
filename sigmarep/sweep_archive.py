"""A sweep as one small file: every finished run's place in the sweep, settings and chosen metrics, without its weights.

Archives join what several machines have made of a sweep, and keep results from which tables can be computed again: they are
folders of sweeps once more when unpacked, with which scripts/sweep.py goes on and which every reader of sweeps takes. The
file is JSON lines, one for each run, compressed by xz.
"""

import json
import lzma
import os
from collections.abc import Iterator, Sequence
from typing import Any

from sigmarep.errors import BadInput, one_line
from sigmarep.files import is_plain_name, read_json
from sigmarep.sweep_execution import FINAL, RECORD, note, read_record
from sigmarep.training.metrics import encoded, read_metrics

# Objects of a run's folder beside its metrics.
FILES = ("config.json", "environment.json", "diagnosis.json")
# Beginnings of the metrics that tables and findings of sweeps read.
METRICS = ("train/loss", "train/learning_rate", "attention/entropy_min", "eval/")


def pack(workdir: str, path: str, metrics: Sequence[str] = METRICS) -> int:
    """Writes the finished runs of the sweep in `workdir` to a new archive.

    Args:
      metrics: beginnings of the names of the metrics that are kept.

    Returns:
      The number of runs.

    Raises:
      BadInput: there is no finished run, a run cannot be read, or the file exists or cannot be written.
    """
    finished = {name: entry for name, entry in read_record(workdir).items() if entry.get("state") in FINAL}
    if not finished:
        raise BadInput(f"--workdir {workdir}: holds no finished run of a sweep (by its {RECORD})")
    lines = []
    for name, entry in finished.items():
        folder = os.path.join(workdir, name)
        try:
            files = {file: read_json(each) for file in FILES if os.path.exists(each := os.path.join(folder, file))}
            rows = read_metrics(os.path.join(folder, "metrics.jsonl"))
        except (OSError, ValueError) as error:
            raise BadInput(f"{folder}: cannot be read ({one_line(error)})") from None
        chosen = [{key: value for key, value in row.items() if key.startswith((*metrics, "step"))} for row in rows]
        rows = [encoded(row) for row in chosen if len(row) > 1]
        run = {"name": name, "entry": entry, "files": files, "rows": rows}
        lines.append(json.dumps(run, separators=(",", ":")))
    try:
        with open(path, "xb") as file:
            file.write(lzma.compress("".join(f"{line}\n" for line in lines).encode(), preset=9))
    except OSError as error:
        raise BadInput(f"--archive {path}: cannot be written ({error.strerror})") from None
    return len(lines)


def unpack(path: str, workdir: str) -> tuple[int, int]:
    """Adds the runs of an archive to the sweep in `workdir`, a new one if there is none; runs that it has stay.

    Returns:
      Numbers of runs that were added and that were there.

    Raises:
      BadInput: the file is no archive of a sweep, or the folder cannot be written.
    """
    runs = list(_runs(path))
    record = read_record(workdir)
    added = 0
    for name, entry, files, rows in runs:
        folder = os.path.join(workdir, name)
        if name in record or os.path.lexists(folder):
            continue
        try:
            os.makedirs(folder)
            for file, content in files.items():
                with open(os.path.join(folder, file), "w", encoding="utf-8") as output:
                    json.dump(content, output, indent=2)
            with open(os.path.join(folder, "metrics.jsonl"), "w", encoding="utf-8") as output:
                output.writelines(f"{json.dumps(row)}\n" for row in rows)
            # Last: a run that is cut off here is none of the sweep yet.
            note(workdir, name, entry)
        except OSError as error:
            raise BadInput(f"--workdir {workdir}: cannot be written ({error.strerror})") from None
        added += 1
    return added, len(runs) - added


def _runs(path: str) -> Iterator[tuple[str, dict[str, Any], dict[str, Any], list[dict[str, Any]]]]:
    """Name, entry of the record, files and rows of every run of an archive."""
    try:
        with lzma.open(path, "rt", encoding="utf-8") as file:
            for line in file:
                run = json.loads(line)
                name, entry, files, rows = (run[key] for key in ("name", "entry", "files", "rows"))
                # An archive may be a stranger's: its names lead nowhere but into the sweep's folder.
                if not is_plain_name(name):
                    raise ValueError(f"a run is named {name!r}")
                if not (isinstance(entry, dict) and entry.get("state") in FINAL and set(files) <= set(FILES)):
                    raise ValueError(f"{name} is no finished run")
                # Archives made before had infinities that no reader of metrics takes.
                yield name, entry, files, [encoded(row) for row in rows]
    except OSError as error:
        raise BadInput(f"--archive {path}: cannot be read ({error.strerror})") from None
    except (lzma.LZMAError, EOFError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"--archive {path}: is no archive of a sweep ({one_line(error)})") from None
