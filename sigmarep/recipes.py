"""The configuration files that come with the package, by their names: quickstart, vit/cifar10, …"""

import difflib
import os
import pathlib
from collections.abc import Sequence

from sigmarep.files import shipped
from sigmarep.training import stored


def paths() -> dict[str, str]:
    """Paths by name."""
    folder = shipped("configs")
    files = sorted(pathlib.Path(folder).rglob("*.py"))
    return {path.relative_to(folder).with_suffix("").as_posix(): str(path) for path in files}


def with_paths(arguments: Sequence[str]) -> list[str]:
    """Replaces a name that --config has by its path, unless there is a file of that name; also the config.json of a run."""
    rest, value_next = [], False
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if flag in ("--config", "-config") and equals:
            argument = f"{flag}={_with_path(value)}"
        elif value_next:
            argument = _with_path(argument)
        value_next = argument in ("--config", "-config")
        rest.append(argument)
    return rest


def _with_path(value: str) -> str:
    if value.endswith(".json"):
        # The resolved configuration of a run, which may have a colon in its path.
        return f"{stored.__file__}:{value}"
    file, colon, text = value.partition(":")
    if os.path.isfile(file):
        return value
    name = file.replace(os.sep, "/").removeprefix("configs/").removesuffix(".py")
    return paths().get(name, file) + colon + text


def near(file: str) -> str:
    """The end of a message about a file that does not exist: configurations with names like it, if any."""
    names = difflib.get_close_matches(file.removesuffix(".py"), paths(), n=3, cutoff=0.4)
    return f"; configurations of the package: {', '.join(names)}, …" if names else ""
