"""Memory in huge pages for a process on Linux, which glibc gives to those that start with a setting of it.

XLA's CPU device allocates the arrays of a step anew at each step, and glibc gives large ones back to the kernel, which has
to hand out and clear their pages again: a fifth of the time of a small language model's step. In pages of 2 MiB it is less.
"""

import os
import platform
import sys
from collections.abc import Mapping

TUNABLES = "GLIBC_TUNABLES"
SETTING = "glibc.malloc.hugetlb"
# The first glibc with the setting.
GLIBC = (2, 35)
MODES = "/sys/kernel/mm/transparent_hugepage/enabled"


def restart() -> None:
    """Starts the process's program once more with huge pages, as the same process, if it has none and could have them.

    For the start of a program: nothing may have happened yet that the program does not do again. Does nothing where JAX is
    imported already or where what runs is no file, as in a notebook. `GLIBC_TUNABLES=glibc.malloc.hugetlb=0` prevents it.
    """
    main = sys.modules["__main__"]
    if "jax" in sys.modules or not getattr(main, "__file__", None):
        return
    changed = environment(os.environ, modes=_modes(), libc=platform.libc_ver())
    if changed is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], changed)


def environment(variables: Mapping[str, str], *, modes: str, libc: tuple[str, str]) -> dict[str, str] | None:
    """The environment variables of a process with huge pages; None where they are set already or cannot be had.

    Args:
      variables: of this process.
      modes: the kernel's, the present one in brackets, such as "always [madvise] never". Only under madvise has a program
        the choice.
      libc: name and version of the C library, as `platform.libc_ver` returns them.
    """
    name, version = libc
    numbers = tuple(int(part) for part in version.split(".") if part.isdecimal())
    tunables = variables.get(TUNABLES, "")
    if "[madvise]" not in modes or name != "glibc" or numbers < GLIBC or SETTING in tunables:
        return None
    # Another allocator takes no settings of glibc's.
    if "malloc" in variables.get("LD_PRELOAD", ""):
        return None
    return {**variables, TUNABLES: ":".join(filter(None, (tunables, f"{SETTING}=1")))}


def _modes() -> str:
    try:
        with open(MODES) as file:
            return file.read()
    except OSError:
        return ""
