"""Dotted names: which objects they stand for, what is wrong with one, and whom to trust with one."""

import json
import subprocess
import sys

import pytest

from sigmarep import command, configuration, doors
from sigmarep.errors import BadInput
from sigmarep.remedies import set_arm
from sigmarep.training.config import FREE, default_config
from sigmarep.training.restore import restored_config


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of the user's own, by a name that no other test has."""
    name = f"own_{tmp_path.name}"
    folder = tmp_path / name
    (folder / "inner").mkdir(parents=True)
    (folder / "__init__.py").write_text("import os\n")
    (folder / "inner" / "__init__.py").write_text("")
    (folder / "task.py").write_text("def create():\n    return 3\n\nclass Task:\n    size = 5\n")
    (folder / "broken.py").write_text("x = 1\ny = 1 / 0\n")
    (folder / "lacks.py").write_text("import no_such_library\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield name
    for module in [each for each in sys.modules if each.split(".")[0] == name]:
        del sys.modules[module]


@pytest.mark.parametrize(
    ("word", "dotted"),
    [
        ("a.b", True),
        ("a.b.c:D.e", True),
        ("a:b", True),
        ("adamw", False),
        ("mnist:3.0.1", False),
        ("wmt17_translate/de-en:1.0.0", False),
        ("./a.b", False),
        ("a._b", False),
        ("a.b:", False),
        (3, False),
        (None, False),
    ],
)
def test_which_words_are_dotted_names(word, dotted):
    assert doors.is_dotted(word) is dotted


def test_a_name_stands_for_a_module_an_attribute_or_an_attribute_of_one(package):
    assert doors.load(f"{package}.task", field="f").create() == 3
    assert doors.load(f"{package}.task.create", field="f")() == 3
    assert doors.load(f"{package}.task:Task.size", field="f") == 5
    assert doors.load(f"{package}.inner", field="f").__name__ == f"{package}.inner"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("no_such_package.x", "there is no module no_such_package; install it, or put the folder"),
        ("PACKAGE.nothing", "the package PACKAGE has no module or attribute nothing"),
        ("PACKAGE.nothing:x", "the package PACKAGE has no module or attribute nothing"),
        ("PACKAGE.task.make", "the module PACKAGE.task has no attribute make"),
        ("PACKAGE.task:Task.length", "the object Task has no attribute length"),
        ("PACKAGE.broken.x", "broken.py:2: ZeroDivisionError: division by zero)"),
        ("PACKAGE.lacks.x", "importing PACKAGE.lacks fails (.*ModuleNotFoundError: No module named 'no_such_library')"),
        ("PACKAGE.os.system", "os is no part of PACKAGE; name it itself"),
        ("word", "expected a dotted Python name"),
    ],
)
def test_an_error_is_one_line_with_field_value_and_problem(package, word, message):
    word, message = word.replace("PACKAGE", package), message.replace("PACKAGE", package)
    with pytest.raises(BadInput) as raised:
        doors.load(word, field="config.task")
    text = str(raised.value)
    assert text.startswith(f"config.task = {word!r}: ")
    assert "\n" not in text
    for part in message.split(".*"):
        assert part in text


def stored(field, word):
    for part in reversed(field.split(".")):
        word = {part: word}
    return word


@pytest.mark.parametrize("field", doors.FIELDS)
def test_a_workdir_alone_imports_nothing(package, field, monkeypatch):
    monkeypatch.setattr(doors, "_trusted", set())
    word = f"{package}.task:create"
    for value in (word, ["optax.adam", word]):
        with pytest.raises(BadInput) as raised:
            doors.check_stored(stored(field, value), "runs/theirs")
        if isinstance(value, str):
            assert str(raised.value).startswith(f"--workdir runs/theirs: its config.json names {word} (config.{field})")
            assert f"add --import {package}, or in Python sigmarep.doors.trust({package!r})" in str(raised.value)
            assert "\n" not in str(raised.value)
    assert package not in sys.modules
    doors.import_named(package)
    doors.check_stored(stored(field, word), "runs/theirs")


def test_what_the_users_program_imported_is_trusted(package, monkeypatch):
    monkeypatch.setattr(doors, "_trusted", set())
    __import__(package)
    doors.check_stored(stored("task", f"{package}.task"), "w")


@pytest.mark.parametrize(
    ("field", "word"),
    [
        ("data.name", "os.system"),
        ("data.name", "optax.adam"),
        ("optimizer.name", "subprocess.run"),
        ("optimizer.name", "sigmarep.files.write_atomically"),
        ("optimizer.schedule", "numpy.load"),
        ("callbacks", ("pytest.main",)),
        ("task", "optax_of_another.task"),
    ],
)
def test_libraries_are_not_trusted_for_being_imported(field, word, monkeypatch):
    monkeypatch.setattr(doors, "_trusted", set())
    with pytest.raises(BadInput, match="on the word of a folder alone"):
        doors.check_stored(stored(field, word), "w")


@pytest.mark.parametrize(
    ("field", "word"),
    [
        ("task", "image_classification"),
        ("task", "sigmarep.tasks.contrastive"),
        ("optimizer.name", "optax.contrib.prodigy"),
        ("data.name", "mnist:3.0.1"),
        ("writers.extra", ()),
    ],
)
def test_words_of_the_product_need_no_trust(field, word):
    doors.check_stored(stored(field, word), "w")


def test_a_package_is_imported_by_its_folder_too(tmp_path):
    (tmp_path / "my_examples").mkdir()
    folder = tmp_path / "my_examples" / "by_folder"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "task.py").write_text("print('imported', __name__)")
    for path, name in ((folder, "by_folder"), (folder / "task.py", "by_folder.task")):
        code = f"from sigmarep import doors; doors.import_named({str(path)!r}); print(doors._trusted)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert str({name}) in done.stdout
    with pytest.raises(BadInput, match=r"--import .*/nothing: there is no such folder or file"):
        doors.import_named(str(tmp_path / "nothing"))


def test_arguments_of_a_foreign_optimizer_come_from_the_command_line():
    rest, overrides = command._without_free_overrides(
        [
            "train.py",
            "--config.optimizer.arguments.decay_rate=0.7",
            "--config.seed=1",
            "--config.optimizer.arguments.multiply_by_parameter_scale",
            "False",
            "--config.optimizer.schedule_arguments.boundaries_and_scales={100: 0.5}",
            "--config.optimizer.arguments.kind=word",
        ]
    )
    assert rest == ["train.py", "--config.seed=1"]
    config = default_config("image_classification").lock()
    configuration.unlock(config, FREE)
    config.update_from_flattened_dict(overrides.free)
    assert config.optimizer.arguments.to_dict() == {
        "decay_rate": 0.7,
        "multiply_by_parameter_scale": False,
        "kind": "word",
    }
    assert config.optimizer.schedule_arguments.boundaries_and_scales.to_dict() == {"100": 0.5}
    with pytest.raises(BadInput, match=r"--config.optimizer.arguments.x: a value is missing"):
        command._without_free_overrides(["train.py", "--config.optimizer.arguments.x"])


def test_the_configuration_file_brings_the_folder_of_its_package(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    package = tmp_path / "outer" / "brought"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "extra.py").write_text("x = 1")
    for arguments in (
        ["train.py", f"--config={package}/config.py:steps=3", "--workdir", "w", "--config.a=1"],
        ["train.py", "--workdir", "w", "--config", f"{package}/config.py"],
    ):
        sys.path[:] = [each for each in sys.path if each != str(tmp_path / "outer")]
        command._import(arguments)
        assert sys.path[-1] == str(tmp_path / "outer")
    command._import(["train.py", "--workdir", "w", "--import", "brought.extra"])
    assert "brought.extra" in sys.modules
    with pytest.raises(BadInput, match=r"--import = 'brought.nothing': the package brought has no module or attribute"):
        command._import(["train.py", "--import=brought.nothing"])


def test_arguments_that_are_none_come_back_from_a_workdir(tmp_path):
    stored = default_config("image_classification")
    stored.optimizer.arguments.update({"clipping_threshold": None, "decay_rate": 0.7})
    (tmp_path / "config.json").write_text(stored.to_json())
    assert restored_config(str(tmp_path)).optimizer.arguments.to_dict() == {
        "clipping_threshold": None,
        "decay_rate": 0.7,
    }


def test_fields_of_a_task_from_outside_that_name_objects_are_checked_too(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(doors, "_trusted", {"outer"})
    (tmp_path / "outer.py").write_text(
        "from sigmarep.fields import field\n"
        "class task:\n"
        "    FIELDS = {'model': {'encoder': field('outer.task', 'Module.', dotted=True)}}\n"
        "    default_config = create_model = open_data = print\n"
    )
    stored = {"task": "outer.task", "model": {"encoder": "outer.task"}}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert restored_config(str(tmp_path)).model.encoder == "outer.task"
    stored["model"]["encoder"] = "shutil.rmtree"
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(BadInput, match=r"names shutil.rmtree \(config.model.encoder\)"):
        restored_config(str(tmp_path))


FIELDS = {"optimizer.arguments.decay_rate": 0.7, "optimizer.name": "adafactor", "model.norm": "none"}


def half_as_fast(config):
    config.optimizer.learning_rate /= 2


@pytest.mark.parametrize("name", [f"{__name__}.FIELDS", f"{__name__}:half_as_fast"])
def test_a_remedy_of_ones_own_is_an_arm(name):
    config, before = default_config("translation"), default_config("translation")
    set_arm(config, name)
    if name.endswith("FIELDS"):
        assert config.optimizer.arguments.decay_rate == 0.7
        assert (config.optimizer.name, config.model.norm) == ("adafactor", "none")
    else:
        assert config.optimizer.learning_rate == before.optimizer.learning_rate / 2


WRONG = {"model.nrm": "none"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("warp", "expected one of pre_ln, .*, or a dotted Python name"),
        (f"{__name__}.WRONG", "does not fit this configuration .*nrm"),
        (f"{__name__}.__doc__", "expected one of"),
        (f"{__name__}.pytest", "pytest is no part of tests.test_doors"),
    ],
)
def test_an_arm_that_does_not_fit_is_refused(name, message):
    with pytest.raises(BadInput, match=message) as raised:
        set_arm(default_config("translation"), name)
    assert "\n" not in str(raised.value)
