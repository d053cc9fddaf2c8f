"""Declared fields: what they accept, how they say so, and the sections that a task from outside declares or does not."""

import dataclasses

import ml_collections
import pytest

from sigmarep import configuration, fields
from sigmarep.errors import BadInput
from sigmarep.fields import duration, field

SECTION = {
    "width": field(64, "Features of a token.", at_least=1),
    "rate": field(0.1, "Share of units that are dropped.", at_least=0, below=1),
    "norm": field("pre", "Placement of the norms.", choices=("pre", "post")),
    "schedule": field("cosine", "Learning rate.", choices=("cosine",), also=str.isupper, also_doc="or any capitals"),
    "mean": field((0.5,), "Mean of each channel.", lengths=(1, 3), above=0),
    "lengths": field((16, 32), "Lengths.", at_least=1, order="rising", nonempty=True),
    "range": field((0.1, 0.1), "Smallest and largest.", order="not falling", lengths=(2,)),
    "splits": field(("test",), "Splits.", order="each once"),
    "rules": field(("bias$",), "Paths.", pattern=True),
    "extra": field((), "Writers.", dotted=True),
    "flip": field(False, "Mirrors."),
    "folder": field(None, "A folder.", kind=str, optional=True),
    "warmup": duration(100, "Length of the warmup."),
    "arguments": fields.Free("Arguments of somebody else's function."),
    "inner": {"seed": field(0, "Seed.", at_least=0, at_most=2**32 - 1)},
}


def changed(**values):
    config = configuration.make(SECTION)
    for name, value in values.items():
        *blocks, leaf = name.split("__")
        block = config
        for each in blocks:
            block = block[each]
        with block.ignore_type():
            block[leaf] = value
    return config


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("width", 1),
        ("width", 2**31 - 1),
        ("rate", 0),
        ("schedule", "STEP"),
        ("mean", (0.1, 0.2, 0.3)),
        ("mean", [1]),
        ("lengths", (3,)),
        ("range", (1, 2.5)),
        ("rules", ()),
        ("extra", ("package.module:name",)),
        ("folder", "data"),
        ("warmup_steps", None),
        ("warmup_epochs", 0.5),
        ("inner__seed", 2**32 - 1),
    ],
)
def test_a_value_within_the_declaration_is_accepted(name, value):
    configuration.check(changed(**{name: value}), SECTION)


@pytest.mark.parametrize(
    ("name", "value", "accepted"),
    [
        ("width", 0, "a whole number of at least 1"),
        ("width", 2**31, "a whole number of at least 1"),
        ("width", 10**400, "a whole number of at least 1"),
        ("width", 1.0, "a whole number of at least 1"),
        ("width", True, "a whole number of at least 1"),
        ("width", None, "a whole number of at least 1"),
        ("rate", 1, "a number of at least 0 and below 1"),
        ("rate", float("nan"), "a number of at least 0 and below 1"),
        ("rate", -float("inf"), "a number of at least 0 and below 1"),
        ("rate", "0.1", "a number of at least 0 and below 1"),
        ("norm", "prenorm", "one of pre, post"),
        ("norm", None, "one of pre, post"),
        ("schedule", "step", "one of cosine, or any capitals"),
        ("mean", (0.5, 0.5), "a tuple of 1 or 3 numbers above 0"),
        ("mean", (None,), "a tuple of 1 or 3 numbers above 0"),
        ("mean", (True,), "a tuple of 1 or 3 numbers above 0"),
        ("mean", 0.5, "a tuple of 1 or 3 numbers above 0"),
        ("lengths", (), "a tuple of whole numbers of at least 1, rising, at least one"),
        ("lengths", (9, 3, 1), "a tuple of whole numbers of at least 1, rising, at least one"),
        ("lengths", (3, 3), "a tuple of whole numbers of at least 1, rising, at least one"),
        ("lengths", (3.0,), "a tuple of whole numbers of at least 1, rising, at least one"),
        ("range", (0.2, 0.1), "a tuple of 2 numbers, not falling"),
        ("splits", ("test", "test"), "a tuple of strings, each once"),
        ("rules", ("(",), "a tuple of regular expressions"),
        ("rules", (3,), "a tuple of regular expressions"),
        ("rules", "bias$", "a tuple of regular expressions"),
        ("extra", ("module",), "a tuple of dotted Python names, as my_package.my_name"),
        ("flip", 1, "True or False"),
        ("flip", None, "True or False"),
        ("folder", 3, "a string, or None"),
        ("warmup_steps", 1e30, "a whole number of at least 0 and at most 2147483647, or None"),
        ("warmup_steps", 1.5, "a whole number of at least 0 and at most 2147483647, or None"),
        ("warmup_epochs", -1, "a number of at least 0 and at most 1e+15, or None"),
        ("inner__seed", 2**32, "a whole number of at least 0 and at most 4294967295"),
    ],
)
def test_a_value_outside_is_refused_with_field_value_and_what_is_accepted(name, value, accepted):
    with pytest.raises(BadInput) as refusal:
        configuration.check(changed(**{name: value}), SECTION)
    text = str(refusal.value)
    assert text.startswith(f"config.{name.replace('__', '.')} = ")
    assert text.endswith(f": expected {accepted}")
    assert "\n" not in text
    assert len(text) < 250


def test_a_default_that_its_own_field_refuses_cannot_be_declared():
    with pytest.raises(ValueError, match=r"default 0: expected a whole number of at least 1"):
        field(0, "Blocks.", at_least=1)


def test_a_configuration_has_the_defaults_and_is_locked_but_for_its_free_sections():
    config = configuration.locked(configuration.make(SECTION), SECTION)
    values = configuration.flatten(config)
    assert values == {
        **{name: declared.default for name, declared in fields.flatten(SECTION) if isinstance(declared, fields.Field)}
    }
    config.arguments.anything = 3
    with pytest.raises(AttributeError):
        config.anything = 3
    configuration.check(config, SECTION)


def test_a_field_that_may_be_none_is_set_and_set_back():
    config = configuration.locked(configuration.make(SECTION), SECTION)
    for value in ("data", None):
        config.folder = value
        assert config.folder == value
    config.warmup_steps = None
    config.warmup_epochs = 2
    configuration.check(config, SECTION)


def test_an_unknown_and_a_missing_field_are_named():
    with pytest.raises(
        BadInput, match=r"^config\.inner\.sead: there is no such field; did you mean config\.inner\.seed\?$"
    ):
        configuration.check(changed(inner__sead=1), SECTION)
    config = configuration.make(SECTION)
    del config["norm"]
    with pytest.raises(BadInput, match=r"^config\.norm: is missing; add it$"):
        configuration.check(config, SECTION, remedy="add it")


def test_sections_with_other_defaults_keep_what_is_accepted():
    section = fields.with_defaults(SECTION, width=8)
    assert configuration.make(section).width == 8
    assert section["width"].accepted() == SECTION["width"].accepted()
    with pytest.raises(KeyError):
        fields.with_defaults(SECTION, height=8)


def test_every_field_is_described_in_the_order_of_its_declaration():
    rows = configuration.describe(changed(width=8, arguments__decay=0.5), SECTION)
    assert [row.name for row in rows] == [name for name, _ in fields.flatten(SECTION)]
    by_name = {row.name: row for row in rows}
    assert by_name["width"] == ("width", 8, "Features of a token.", "a whole number of at least 1")
    assert by_name["arguments"].value == {"decay": 0.5}
    assert by_name["warmup_epochs"].doc == "Length of the warmup. In epochs."


@dataclasses.dataclass(frozen=True)
class Block:
    """A dataclass whose fields are fields of a configuration, but for `dtype`."""

    width: int = fields.attribute(8, "Features.", at_least=1)
    norm: str = fields.attribute("pre", "Placement.", choices=("pre", "post"))
    dtype: str = "float32"

    def __post_init__(self):
        fields.check_attributes(self)


def test_a_dataclass_declares_and_checks_its_fields():
    assert configuration.flatten(configuration.make(fields.of_dataclass(Block))) == {"width": 8, "norm": "pre"}
    assert Block(norm="post").norm == "post"
    with pytest.raises(ValueError, match=r"^norm = 'prenorm': expected one of pre, post$"):
        Block(norm="prenorm")


def test_of_a_configuration_that_nobody_declared_the_types_are_checked():
    plain = ml_collections.ConfigDict({"ratio": 0.5, "name": "x", "sizes": (1, 2), "inner": {"on": True}, "any": None})
    section = fields.inferred(plain)
    assert configuration.flatten(configuration.make(section)) == configuration.flatten(plain)
    for name, value in {"ratio": "much", "name": 3, "sizes": (1, "two"), "inner.on": 1}.items():
        config = configuration.make(section)
        block, leaf = (config.inner, "on") if name == "inner.on" else (config, name)
        with block.ignore_type():
            block[leaf] = value
        with pytest.raises(BadInput, match=rf"^config\.{name} = "):
            configuration.check(config, section)
