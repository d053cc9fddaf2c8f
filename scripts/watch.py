"""Shows a run, a sweep or a folder of runs in the browser while it goes on.

    python scripts/watch.py runs/stability_vit [--port 8765] [--plots 4]

Prints an address of this machine alone with a secret in it. The page is that of scripts/report.py and shows new rows within
three seconds; zoom, chosen lines and place stay. Only reads: a run is not disturbed, and the folder may be read-only. From
another machine: `ssh -L 8765:127.0.0.1:8765 HOST`, then the same address. Starts no JAX.
"""

from absl import flags

from sigmarep import command

PORT = flags.DEFINE_integer(
    "port", 8765, "Port on 127.0.0.1; 0 takes any that is free.", lower_bound=0, upper_bound=65535
)
PLOTS = flags.DEFINE_integer("plots", 4, "Largest number of runs that are drawn one by one.", lower_bound=0)


def main(folders: list[str]) -> None:
    from sigmarep.diagnostics import watch

    watch.serve(folders, most=PLOTS.value, port=PORT.value, say=lambda text: print(text, flush=True))


if __name__ == "__main__":
    command.run(main, positional=True)
