"""Compiled programs kept in the user's cache folder, so that the next start of a run does not compile them again.

JAX's persistent compilation cache does the work; this module chooses its folder and bounds its size. Whoever can write to
the folder decides which code the commands run: it is trusted like code, made for its owner alone, and not used if others
can write to it. `JAX_COMPILATION_CACHE_DIR` and `JAX_ENABLE_COMPILATION_CACHE` of the environment go before.
"""

import contextlib
import hashlib
import os
import pathlib
import platform
import stat
import warnings

import jax

from sigmarep.errors import BadInput

# Least recently used programs go at the start of a command when all of them are larger than this.
MAX_BYTES = 2 * 2**30


def enable(where: str = "auto", *, max_bytes: int = MAX_BYTES) -> pathlib.Path | None:
    """Keeps compiled programs from now on, and uses those that were kept.

    Args:
      where: "auto" for the user's cache folder (`$XDG_CACHE_HOME`, else `~/.cache`), "off" for none, or a folder.
      max_bytes: bound of the folder's size.

    Returns:
      The folder; None if nothing is kept.

    Raises:
      BadInput: a folder that was named cannot be used.
    """
    if where == "off":
        jax.config.update("jax_enable_compilation_cache", False)
        return None
    values = jax.config.values
    if where == "auto" and (values["jax_compilation_cache_dir"] or not values["jax_enable_compilation_cache"]):
        return None
    folder = default_folder() if where == "auto" else pathlib.Path(where)
    problem = "there is no home folder" if folder is None else _problem(folder)
    if folder is None or problem:
        if where == "auto":
            return None
        raise BadInput(f"--compilation_cache = {where!r}: {problem}; expected auto, off or a folder of your own")
    _shorten(folder, max_bytes)
    # Programs of another processor's instructions would end the process.
    jax.config.update("jax_compilation_cache_dir", str(folder / _processor()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    # An entry that a killed process left half written is compiled anew.
    warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache entry")
    return folder


def default_folder() -> pathlib.Path | None:
    """The user's own folder for compiled programs; None without a home folder."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):
        base = os.path.expanduser("~/.cache")
    return pathlib.Path(base, "sigmarep", "programs") if os.path.isabs(base) else None


def _problem(folder: pathlib.Path) -> str:
    """Makes the folder, and says why it cannot be used, "" if it can."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        return f"it cannot be made ({error.strerror})"
    if hasattr(os, "getuid") and (status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)):
        return "others can write to it, and programs are run from it"
    return "" if os.access(folder, os.W_OK | os.X_OK) else "it cannot be written to"


def _processor() -> str:
    """A name for what this machine's processor can do."""
    features = platform.processor()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        features = next((line for line in file if line.startswith(("flags", "Features"))), features)
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:12]}"


def _shorten(folder: pathlib.Path, max_bytes: int) -> None:
    """Removes the programs that were used longest ago, until the rest is small enough."""
    entries = []
    for path in folder.glob("*/*"):
        # Another process may be doing the same.
        with contextlib.suppress(OSError):
            status = path.stat()
            entries.append((max(status.st_atime, status.st_mtime), status.st_size, path))
    total = sum(size for _, size, _ in entries)
    for _, size, path in sorted(entries):
        if total <= max_bytes:
            return
        with contextlib.suppress(OSError):
            path.unlink()
            total -= size
