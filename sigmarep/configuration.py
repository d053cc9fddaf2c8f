"""Configurations (`ml_collections.ConfigDict`) of declared fields: making one, checking one, describing one."""

import difflib
from collections.abc import Iterable
from typing import Any, NamedTuple

import ml_collections
from ml_collections import config_dict

from sigmarep import fields
from sigmarep.errors import BadInput

# Names that fields had in earlier versions.
RENAMED = {
    "optimizer.other_learning_rate": "optimizer.non_matrix_learning_rate",
    "optimizer.gains": "optimizer.scale_parameters",
    "optimizer.gain_factor": "optimizer.scale_parameters_factor",
}


class Described(NamedTuple):
    """A field of a configuration: its dotted name, its value, what it means, and which values it accepts."""

    name: str
    value: Any
    doc: str
    accepted: str


def make(section: fields.Section) -> ml_collections.ConfigDict:
    """The configuration of a section with all fields at their defaults."""
    config = ml_collections.ConfigDict()
    for name, declared in section.items():
        if isinstance(declared, fields.Duration):
            for each, one in declared.fields(name).items():
                _set(config, each, one)
        elif isinstance(declared, fields.Free):
            config[name] = ml_collections.ConfigDict()
        elif isinstance(declared, fields.Field):
            _set(config, name, declared)
        else:
            config[name] = make(declared)
    return config


def _set(config: ml_collections.ConfigDict, name: str, declared: fields.Field) -> None:
    if declared.optional and declared.kind is not object:
        # May be set to a value of its type, and back to None.
        config[name] = config_dict.placeholder(declared.kind)
    if declared.default is not None or declared.kind is object:
        config[name] = declared.default


def locked(config: ml_collections.ConfigDict, section: fields.Section) -> ml_collections.ConfigDict:
    """Locks `config` except for its free sections."""
    config.lock()
    unlock(config, [name for name, declared in fields.flatten(section) if isinstance(declared, fields.Free)])
    return config


def unlock(config: ml_collections.ConfigDict, sections: Iterable[str]) -> None:
    """Unlocks the sections of these dotted names; those that `config` lacks are passed over."""
    for name in sections:
        block: Any = config
        for part in name.split("."):
            block = block.get(part, {})
        if isinstance(block, ml_collections.ConfigDict):
            block.unlock()


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted names to leaf values."""
    leaves: dict[str, Any] = {}
    for key in config:
        value = config[key]
        if isinstance(value, ml_collections.ConfigDict | dict):
            leaves.update(flatten(value, f"{prefix}{key}."))
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def check(config: Any, section: fields.Section, *, prefix: str = "config.", remedy: str = "") -> None:
    """Compares a configuration with the fields of a section.

    Args:
      prefix: of the fields' names in messages.
      remedy: advice for one that lacks a field.

    Raises:
      BadInput: an unknown or missing field, or a value that is not accepted; the message names field, value and remedy.
    """
    known, given = dict(fields.flatten(section)), flatten(config)
    free = tuple(f"{name}." for name, declared in known.items() if isinstance(declared, fields.Free))
    for name in given:
        if name not in known and not name.startswith(free):
            raise BadInput(unknown(name, known, prefix=prefix))
    for name, declared in known.items():
        if isinstance(declared, fields.Free):
            continue
        if name not in given:
            raise BadInput(f"{prefix}{name}: is missing; {remedy}".removesuffix("; "))
        if expected := declared.problem(given[name]):
            raise BadInput(f"{prefix}{name} = {fields.shown(given[name])}: expected {expected}")


def unknown(name: str, known: Iterable[str], *, prefix: str = "config.") -> str:
    """The message for a field that does not exist, with the name that was probably meant."""
    return f"{prefix}{name}: there is no such field{nearest(name, known, prefix=prefix)}"


def nearest(name: str, known: Iterable[str], *, prefix: str = "config.") -> str:
    """A clause that offers the nearest known name, or nothing."""
    if name in RENAMED:
        return f"; it is called {prefix}{RENAMED[name]} now"
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not close:
        by_leaf = {each.rsplit(".", 1)[-1]: each for each in known}
        close = [by_leaf[leaf] for leaf in difflib.get_close_matches(name.rsplit(".", 1)[-1], by_leaf, n=1)]
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def with_current_names(stored: dict[str, Any]) -> dict[str, Any]:
    """A stored configuration with the present names of fields; nested dictionaries, changed in place."""
    for old, new in RENAMED.items():
        section: Any = stored
        *blocks, leaf = old.split(".")
        for block in blocks:
            section = section.get(block) if isinstance(section, dict) else None
        if isinstance(section, dict) and leaf in section:
            target = stored
            *blocks, name = new.split(".")
            for block in blocks:
                target = target.setdefault(block, {})
            target[name] = section.pop(leaf)
    return stored


def describe(config: Any, section: fields.Section) -> list[Described]:
    """Every field of a configuration, in the order in which they are declared."""
    values = flatten(config)
    rows = []
    for name, declared in fields.flatten(section):
        if isinstance(declared, fields.Free):
            given = {each.removeprefix(f"{name}."): values[each] for each in values if each.startswith(f"{name}.")}
            rows.append(Described(name, given, declared.doc, "any fields"))
        else:
            rows.append(Described(name, values.get(name), declared.doc, declared.accepted()))
    return rows
