"""Packs the finished runs of a sweep into one small file, or adds the runs of such a file to a sweep's folder.

    python scripts/archive_sweep.py --workdir runs/claim_a --archive claim_a.jsonl.xz            # a new file
    python scripts/archive_sweep.py --workdir runs/claim_a --archive claim_a.jsonl.xz --unpack

An archive has each run's settings and the metrics that tables of sweeps need, no weights. Unpacked, the runs count as
finished: scripts/sweep.py makes the others, so machines that share no disk can share a sweep. Those of docs/data are the
runs behind the tables of docs/results.md.
"""

from absl import flags

from sigmarep import command

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the sweep.")
ARCHIVE = flags.DEFINE_string("archive", None, "The file, NAME.jsonl.xz.")
UNPACK = flags.DEFINE_bool("unpack", False, "Add the file's runs to the folder; runs that it has stay as they are.")
METRIC = flags.DEFINE_multi_string("metric", [], "Beginning of the names of further metrics to pack.")


def main() -> None:
    workdir, path = command.required("workdir", WORKDIR.value), command.required("archive", ARCHIVE.value)
    from sigmarep import sweep_archive

    if UNPACK.value:
        added, present = sweep_archive.unpack(path, workdir)
        print(f"{added} runs added to {workdir}, {present} were there")
    else:
        count = sweep_archive.pack(workdir, path, (*sweep_archive.METRICS, *METRIC.value))
        print(f"{count} runs in {path}")


if __name__ == "__main__":
    command.run(main)
