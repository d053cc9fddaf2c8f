"""Python objects named in a configuration, such as `config.task = "my_package.my_task"`, and who may name them.

A configuration that the user wrote, or a flag, may name any object. A workdir may come from a stranger, and opening it
must not run a stranger's code: a module that only its `config.json` names is not imported until the user names it too,
with `--import`, with `trust`, or by having imported it from code of their own. Naming a package trusts all of it.
"""

import importlib
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Mapping
from types import MappingProxyType, ModuleType
from typing import Any

from sigmarep.errors import BadInput

# No part begins with an underscore: a private name is not offered to others.
DOTTED = re.compile(r"[A-Za-z]\w*(\.[A-Za-z]\w*)*[.:][A-Za-z]\w*(\.[A-Za-z]\w*)*")
# The fields of every task's configuration that may hold dotted names, alone or in a tuple, and the packages that any
# workdir may name in them: those whose objects, called as the field's are, touch no file of the user's.
FIELDS: dict[str, tuple[str, ...]] = {
    "task": ("sigmarep.tasks",),
    "init_from.names": (),
    "optimizer.name": ("optax",),
    "optimizer.schedule": ("optax",),
    "data.name": ("sigmarep.data.datasets",),
    "model.activation": ("flax.linen", "jax.nn"),
    "model.norm_type": ("flax.linen",),
    "model.kernel_init": (),
    "model.qk_norm": ("flax.linen",),
    "model.attention_weights": (),
    "model.attention_implementation": (),
    "model.process_heads": (),
    "writers.extra": (),
    # Its pruner reads and writes the study of the search that the run belongs to, and only while it trains.
    "callbacks": ("sigmarep.searches",),
}

_trusted: set[str] = set()


def is_dotted(word: Any) -> bool:
    """True if `word` is spelled like a Python object's name, "package.module.attribute" or "package.module:attribute"."""
    return isinstance(word, str) and DOTTED.fullmatch(word) is not None


def load(word: str, *, field: str) -> Any:
    """The object that a dotted name stands for: a module, or an attribute of one.

    Args:
      word: "package.module.attribute", or with a colon before the attribute.
      field: the field or flag that holds it, for the message of an error.

    Raises:
      BadInput: it is no dotted name, there is no such module or attribute, or importing the module fails.
    """
    if not is_dotted(word):
        raise BadInput(f"{field} = {word!r}: expected a dotted Python name such as my_package.my_module.my_object")
    modules, _, attributes = word.partition(":")
    first, *rest = modules.split(".")
    named: Any = _import(first, word, field)
    for part in rest:
        # As in `from package import part`: an attribute, else a submodule.
        submodule = hasattr(named, "__path__") and (attributes or not hasattr(named, part))
        named = _import(f"{named.__name__}.{part}", word, field) if submodule else _attribute(named, part, word, field)
    for part in filter(None, attributes.split(".")):
        named = _attribute(named, part, word, field)
    return named


def trust(*packages: str) -> None:
    """Lets the `config.json` of any workdir name objects of these packages, as `--import` does."""
    _trusted.update(packages)


def import_named(module: str, *, field: str = "--import") -> None:
    """Imports a module that the user names, and trusts it.

    Args:
      module: a module's name, or the path of a package's folder or of a module's file: the folder that it is in then
        becomes importable.

    Raises:
      BadInput: there is no such module, folder or file, or importing it fails.
    """
    name = module
    if os.sep in module or module.endswith(".py"):
        if not os.path.exists(module):
            raise BadInput(f"{field} {module}: there is no such folder or file")
        name = make_importable(module)
    _import(name, module, field)
    trust(name)


def make_importable(path: str) -> str:
    """Puts the folder that holds the outermost package of `path` at the end of Python's search path.

    Args:
      path: of a package's folder or of a module's file.

    Returns:
      The name by which it is imported.
    """
    path = os.path.abspath(path)
    name = os.path.basename(path.removesuffix(".py"))
    folder = os.path.dirname(path)
    while os.path.exists(os.path.join(folder, "__init__.py")):
        name = f"{os.path.basename(folder)}.{name}"
        folder = os.path.dirname(folder)
    if folder not in sys.path:
        sys.path.append(folder)
    return name


def check_stored(
    stored: Mapping[str, Any], workdir: str, fields: Mapping[str, tuple[str, ...]] = MappingProxyType(FIELDS)
) -> None:
    """Refuses the contents of a `config.json` that names objects of packages which the user did not name.

    Args:
      stored: the nested dictionary that the file holds.
      fields: those that may hold dotted names, and the packages that any workdir may name in them.

    Raises:
      BadInput: it does; the message has the remedy.
    """
    for field, safe in fields.items():
        value: Any = stored
        for part in field.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        for word in value if isinstance(value, list | tuple) else [value]:
            if is_dotted(word) and not is_trusted(word, safe):
                package = re.split("[.:]", word)[0]
                raise BadInput(
                    f"--workdir {workdir}: its config.json names {word} (config.{field}), which is not imported on the "
                    f"word of a folder alone; if you trust that package, add --import {package}, or in Python "
                    f"sigmarep.doors.trust({package!r})"
                )


def is_trusted(word: str, safe: tuple[str, ...] = ()) -> bool:
    """True if a stored configuration may name this object: one of the packages `safe`, or of one that the user named."""
    path = word.replace(":", ".")
    if any(f"{path}.".startswith(f"{package}.") for package in (*safe, *_trusted)):
        return True
    # Code of the user's own that their program has imported; libraries are imported whoever asked for them.
    module = sys.modules.get(path.partition(".")[0])
    return module is not None and module.__name__ != "sigmarep" and not _is_library(module)


def _is_library(module: ModuleType) -> bool:
    """True if a module is part of Python or of an installed package."""
    places = [getattr(module, "__file__", None), *getattr(module, "__path__", [])]
    files = [os.path.realpath(place) for place in places if place]
    python = {os.path.realpath(sysconfig.get_path(name)) + os.sep for name in ("stdlib", "platstdlib")}
    return not files or any(
        file.startswith(tuple(python)) or {"site-packages", "dist-packages"} & set(file.split(os.sep)) for file in files
    )


def _import(name: str, word: str, field: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            package, _, part = error.name.rpartition(".")
            if package:
                raise BadInput(f"{field} = {word!r}: the package {package} has no module or attribute {part}") from None
            raise BadInput(
                f"{field} = {word!r}: there is no module {part}; install it, or put the folder that it is in on PYTHONPATH"
            ) from None
        raise BadInput(_failed(name, word, field, error)) from error
    except BadInput:
        raise
    except Exception as error:
        raise BadInput(_failed(name, word, field, error)) from error


def _failed(name: str, word: str, field: str, error: Exception) -> str:
    """The message of an import that fails, with the line of the file that fails."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    line = f"{frames[-1].filename}:{frames[-1].lineno}: " if len(frames) > 1 else ""
    text = " ".join(str(error).split())
    return f"{field} = {word!r}: importing {name} fails ({line}{type(error).__name__}: {text})"


def _attribute(owner: Any, part: str, word: str, field: str) -> Any:
    name = getattr(owner, "__name__", type(owner).__name__)
    try:
        value = getattr(owner, part)
    except AttributeError:
        kind = "module" if isinstance(owner, ModuleType) else "object"
        raise BadInput(f"{field} = {word!r}: the {kind} {name} has no attribute {part}") from None
    if isinstance(value, ModuleType) and not value.__name__.startswith(f"{name}."):
        # Else a trusted package would open every module that it imports.
        raise BadInput(f"{field} = {word!r}: {value.__name__} is no part of {name}; name it itself")
    return value
