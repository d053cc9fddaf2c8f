"""Files that a package of Debian's brings, installed or unpacked into the folder of data sets."""

import glob
import os
from collections.abc import Sequence

from sigmarep.errors import BadInput


def find_file(roots: Sequence[str], name: str) -> str | None:
    """Path of the file of this name in the first root that has it, at any depth; None without any."""
    for root in roots:
        paths = glob.glob(os.path.join(glob.escape(root), "**", name), recursive=True)
        if paths:
            return min(paths)
    return None


def missing(data_set: str, package: str, installed: str, unpacked: str) -> BadInput:
    """The error of a data set whose package is in neither place, with the commands that bring it."""
    return BadInput(
        f"config.data.name = {data_set!r}: is neither in {installed} nor under {unpacked}; run: apt-get install {package}, "
        f"or: apt-get download {package} && dpkg -x {package}_*.deb {unpacked}"
    )
