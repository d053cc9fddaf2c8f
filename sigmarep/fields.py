"""Fields of a configuration, each declared once: its default, what it means, and which values it accepts.

A section is a dictionary of fields, durations and further sections:

    FIELDS = {
        "width": field(64, "Features of a token.", at_least=1),
        "norm": field("pre", "Placement of the norms.", choices=("none", "pre", "post")),
        "warmup": duration(100, "Length of the warmup."),      # warmup_steps, warmup_epochs, warmup_examples
        "augment": {"flip": field(False, "Mirrors half of the pictures.")},
    }

`sigmarep.training.config` makes the configuration of it and checks one against it.
"""

import dataclasses
import itertools
import math
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from sigmarep import doors

UNITS = ("steps", "epochs", "examples")
# The step counter, array dimensions and file formats are 32-bit.
LARGEST_INT = 2**31 - 1
LARGEST_FLOAT = 3.4e38


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of a configuration; see `field` for the attributes."""

    default: Any
    doc: str
    kind: type
    element: type | None = None
    optional: bool = False
    choices: tuple[str, ...] = ()
    also: Callable[[str], bool] | None = None
    also_doc: str = ""
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    lengths: tuple[int, ...] = ()
    nonempty: bool = False
    order: str = ""
    pattern: bool = False
    dotted: bool = False
    whole: bool = False

    def accepted(self) -> str:
        """Description of the accepted values, for messages and `--describe`."""
        if self.kind is tuple:
            text = self._accepted_tuple()
        elif self.choices:
            text = f"one of {', '.join(self.choices)}"
        else:
            text = self._accepted_one(self.kind)
        if self.also_doc:
            text += f", {self.also_doc}"
        return f"{text}, or None" if self.optional else text

    def problem(self, value: Any) -> str | None:
        """Description of the accepted values if `value` is not one of them, else None."""
        if value is None:
            return None if self.optional else self.accepted()
        if self.kind is tuple:
            valid = isinstance(value, tuple | list) and self._valid_tuple(value)
        else:
            valid = self._valid(value, self.kind)
        return None if valid else self.accepted()

    def takes_dotted(self) -> bool:
        """True if a dotted Python name is accepted, alone or beside words of the field's own."""
        return self.dotted or (self.also is not None and self.also("package.name"))

    def _accepted_one(self, kind: type) -> str:
        if kind in (bool, object):
            return "True or False" if kind is bool else "a value"
        if kind is str:
            return "a dotted Python name, as my_package.my_name" if self.dotted else "a string"
        return f"a {'whole ' if kind is int or self.whole else ''}number{self._range()}"

    def _accepted_tuple(self) -> str:
        if self.element is str:
            words = "strings"
            if self.pattern:
                words = "regular expressions"
            elif self.dotted:
                words = "dotted Python names, as my_package.my_name"
            elif self.choices:
                words = f"words, each one of {', '.join(self.choices)}"
        else:
            words = f"{'whole ' if self.element is int else ''}numbers{self._range()}"
        count = " or ".join(str(each) for each in self.lengths)
        text = f"a tuple of {count + ' ' if count else ''}{words}"
        if self.order:
            text += f", {self.order}"
        return f"{text}, at least one" if self.nonempty else text

    def _range(self) -> str:
        bounds = {"at least": self.at_least, "above": self.above, "at most": self.at_most, "below": self.below}
        # A large whole number in full, not as 2.14748e+09.
        numbers = {word: str(x) if isinstance(x, int) else f"{x:g}" for word, x in bounds.items() if x is not None}
        parts = [f"{word} {number}" for word, number in numbers.items()]
        if not parts:
            return ""
        return f" {'of ' if parts[0].startswith('at') else ''}{' and '.join(parts)}"

    def _valid_tuple(self, value: tuple | list) -> bool:
        element = self.element or str
        if not all(self._valid(each, element) for each in value):
            return False
        if (self.nonempty and not value) or (self.lengths and len(value) not in self.lengths):
            return False
        if self.order == "each once":
            return len(set(value)) == len(value)
        pairs = list(itertools.pairwise(value))
        if self.order == "rising":
            return all(a < b for a, b in pairs)
        return self.order != "not falling" or all(a <= b for a, b in pairs)

    def _valid(self, value: Any, kind: type) -> bool:
        if kind is object:
            return True
        if isinstance(value, bool) != (kind is bool):
            return False
        if kind is bool:
            return True
        if kind is str:
            return isinstance(value, str) and self._valid_word(value)
        number = isinstance(value, int) if kind is int else isinstance(value, int | float)
        return number and self._in_range(value)

    def _valid_word(self, value: str) -> bool:
        if self.pattern:
            return _is_pattern(value)
        if self.dotted:
            return doors.is_dotted(value)
        return not self.choices or value in self.choices or (self.also is not None and self.also(value))

    def _in_range(self, value: float) -> bool:
        # Python compares integers of any size with floats exactly.
        if isinstance(value, float) and not math.isfinite(value):
            return False
        if self.whole and value != int(value):
            return False
        if abs(value) > (LARGEST_INT if isinstance(value, int) and self.at_most is None else LARGEST_FLOAT):
            return False
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )


@dataclasses.dataclass(frozen=True)
class Duration:
    """Three fields of one meaning, in steps, epochs or examples, of which at most one may be set."""

    default: float | None
    doc: str
    unit: str = "steps"

    def fields(self, name: str) -> dict[str, Field]:
        return {
            f"{name}_{unit}": Field(
                self.default if unit == self.unit else None,
                f"{self.doc} In {unit}.",
                float,
                optional=True,
                at_least=0,
                at_most=LARGEST_INT if unit == "steps" else 1e15,
                whole=unit == "steps",
            )
            for unit in UNITS
        }


@dataclasses.dataclass(frozen=True)
class Free:
    """A section that takes any field, such as the arguments of somebody else's function."""

    doc: str

    def takes_dotted(self) -> bool:
        """False: what stands in such a section is handed on as it is."""
        return False


Section = Mapping[str, Any]


def field(
    default: Any,
    doc: str,
    *,
    kind: type | None = None,
    element: type | None = None,
    optional: bool = False,
    choices: Any = (),
    also: Callable[[str], bool] | None = None,
    also_doc: str = "",
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    lengths: tuple[int, ...] = (),
    nonempty: bool = False,
    order: str = "",
    pattern: bool = False,
    dotted: bool = False,
) -> Field:
    """Declares a field.

    Args:
      default: its value where nothing else is said. Its type is the field's; floats also take whole numbers.
      doc: one or two sentences that tell a user what the field does, with units.
      kind: the type of a field whose default is None.
      element: the type of a tuple's elements; that of the default's first one, or str.
      optional: None is accepted too.
      choices: accepted words, of a string or of every element of a tuple.
      also: a predicate of further accepted words, which `also_doc` describes.
      at_least, above, at_most, below: the range of a number or of every element of a tuple.
      lengths: accepted numbers of a tuple's elements.
      nonempty: an empty tuple is refused.
      order: "rising", "not falling" or "each once", of a tuple's elements.
      pattern: strings are regular expressions.
      dotted: strings are dotted Python names.

    Raises:
      ValueError: the default is not accepted itself.
    """
    kind = kind or type(default)
    if kind is tuple and element is None:
        element = type(default[0]) if default else str
    declared = Field(
        default=default,
        doc=doc,
        kind=kind,
        element=element,
        optional=optional,
        choices=tuple(choices),
        also=also,
        also_doc=also_doc,
        at_least=at_least,
        above=above,
        at_most=at_most,
        below=below,
        lengths=lengths,
        nonempty=nonempty,
        order=order,
        pattern=pattern,
        dotted=dotted,
    )
    if expected := declared.problem(default):
        raise ValueError(f"default {default!r}: expected {expected}")
    return declared


def duration(default: float | None, doc: str, *, unit: str = "steps") -> Duration:
    """Declares a length of training that may be given in steps, epochs or examples.

    Args:
      default: None for a length that is not set.
      unit: of the default, one of `UNITS`.
    """
    return Duration(default, doc, unit)


def with_defaults(section: Section, **changed: Any) -> dict[str, Any]:
    """The section with other defaults.

    Raises:
      KeyError: there is no such field.
    """
    return {**section, **{name: dataclasses.replace(section[name], default=value) for name, value in changed.items()}}


def metadata(declared: Field) -> dict[str, Field]:
    """The metadata by which a dataclass's field carries a declaration: `dataclasses.field(metadata=metadata(…))`."""
    return {"declared": declared}


def attribute(default: Any, doc: str, **options: Any) -> Any:
    """Declares a field of a configuration as the field of a dataclass; the arguments are those of `field`."""
    return dataclasses.field(default=default, metadata=metadata(field(default, doc, **options)))


def of_dataclass(cls: Any) -> dict[str, Field]:
    """The section of the fields that a dataclass declares by `attribute` or `metadata`."""
    return {each.name: each.metadata["declared"] for each in dataclasses.fields(cls) if "declared" in each.metadata}


def check_attributes(instance: Any) -> None:
    """Checks the declared fields of a dataclass's instance; for its `__post_init__`.

    Raises:
      ValueError: a value is not accepted; the message begins with the field's name.
    """
    for name, declared in of_dataclass(type(instance)).items():
        if expected := declared.problem(getattr(instance, name)):
            raise ValueError(f"{name} = {shown(getattr(instance, name))}: expected {expected}")


def flatten(section: Section, prefix: str = "") -> Iterator[tuple[str, Field | Free]]:
    """Dotted names and declarations of all fields of a section, durations as their three fields."""
    for name, declared in section.items():
        if isinstance(declared, Duration):
            yield from ((f"{prefix}{each}", one) for each, one in declared.fields(name).items())
        elif isinstance(declared, Mapping):
            yield from flatten(declared, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", declared


def shown(value: Any) -> str:
    """The value as a message shows it: lists as the tuples that configurations have, very long ones shortened."""
    text = repr(tuple(value) if isinstance(value, list) else value)
    return text if len(text) <= 200 else reprlib.repr(value)


def inferred(values: Mapping[str, Any]) -> dict[str, Any]:
    """The section of a configuration that nobody declared: the types of its values alone.

    Args:
      values: nested dictionaries, or an `ml_collections.ConfigDict`.
    """
    section: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) or hasattr(value, "to_dict"):
            section[name] = inferred(value)
        elif isinstance(value, bool | int | float | str):
            section[name] = field(value, "")
        elif isinstance(value, tuple | list):
            elements = {type(each) for each in value}
            same = elements.pop() if len(elements) == 1 else None
            section[name] = field(tuple(value), "", element=same) if same in (int, float, str) else _anything(value)
        else:
            section[name] = _anything(value)
    return section


def _anything(value: Any) -> Field:
    return Field(value, "", object, optional=True)


def _is_pattern(value: str) -> bool:
    try:
        re.compile(value)
    except re.error:
        return False
    return True
