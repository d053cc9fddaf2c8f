"""Parts that the commands share: the --config flag with its overrides, --import, one-line errors, exit statuses.

The configuration of a run is a configuration file as well: `--config runs/a/config.json --config.seed=1 --workdir runs/b`.

Modules of the user's are found by `config.task = "my_package.my_task"` and its like where Python finds them, and in the
folder of the configuration file (of the outermost package that it is in). `--import` imports a package, by its name or the
path of its folder; a workdir's own `config.json` may then name it (`sigmarep.doors`).
"""

import ast
import contextlib
import functools
import importlib.util
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from absl import app, flags, logging
from ml_collections import config_flags

from sigmarep import configuration, doors, fields, huge_pages, recipes, signals, terminal
from sigmarep.errors import BadInput, SigmarepError, one_line
from sigmarep.fields import UNITS
from sigmarep.training.config import FREE, sections

# Flags that are defined here count as those of the command, so that its --help shows them.
flags.disclaim_key_flags()

# Flags of absl's that print the flags and end the process, and the form that many other programs have.
HELP = ("help", "helpshort", "helpfull", "helpxml", "?", "h")
IMPORT_HELP = "A module of yours that is imported first, by its name or its path; a workdir may then name it."
flags.DEFINE_multi_string("import", [], IMPORT_HELP)
flags.DEFINE_string(
    "compilation_cache",
    "auto",
    "Where compiled programs are kept for the next start: auto is your cache folder, off is nowhere, else a folder.",
)
# Time that the interpreter has to get to a Ctrl-C.
INTERRUPT_SECONDS = 2.0
_interrupted = threading.Event()


class Overrides(NamedTuple):
    """Overrides that ml_collections refuses or misreads.

    Attributes:
      free: of fields that the configuration need not have: those of its sections `FREE`.
      none: of declared fields by None, which would be read as a word.
    """

    free: dict[str, Any]
    none: list[str]


# Those of this process's own arguments.
_overrides = Overrides({}, [])


def define_config_flag() -> Any:
    """Defines `--config FILE[:arguments]` and its overrides `--config.name=value`."""
    return config_flags.DEFINE_config_file(
        "config", None, "Configuration file, with its arguments behind a colon.", lock_config=True
    )


def define_average_flag() -> Any:
    """The flag --average of commands that open a run: how many of its newest checkpoints are averaged."""
    return flags.DEFINE_integer("average", 1, "Newest checkpoints whose parameters are averaged.", lower_bound=1)


def resolved_config(flag: Any) -> Any:
    """The configuration of the flag. A duration given on the command line replaces the same one in other units.

    Raises:
      BadInput: --config is missing.
    """
    return _resolved(flag.value, flags.FLAGS, _overrides)


def resolve(arguments: Sequence[str]) -> Any:
    """The configuration that scripts/train.py would make of these arguments, whatever those of this process are.

    Raises:
      BadInput: an argument is wrong; the message is the one of that command.
    """
    values = flags.FlagValues()
    values.set_gnu_getopt(False)
    flags.DEFINE_string("workdir", None, "", flag_values=values)
    flags.DEFINE_multi_string("import", [], "", flag_values=values)
    named = recipes.with_paths([_program(), *arguments])
    with _bad_input(named):
        _import(named)
        rest, overrides = _without_free_overrides(named)
        flag = config_flags.DEFINE_config_file("config", None, "", flag_values=values, sys_argv=rest)
        _check(values(rest), values)
        return _resolved(flag.value, values, overrides)


def _resolved(config: Any, values: flags.FlagValues, overrides: Overrides) -> Any:
    if config is None:
        raise BadInput("--config is missing: name a configuration file, for example --config configs/quickstart.py")
    for name in config_flags.get_override_values(values["config"]):
        stem, _, unit = name.rpartition("_")
        if unit in UNITS:
            *blocks, leaf = stem.split(".")
            block = config
            for each in blocks:
                block = block[each]
            for other in UNITS:
                if other != unit:
                    block[f"{leaf}_{other}"] = None
    configuration.unlock(config, FREE)
    config.update_from_flattened_dict(overrides.free)
    _set_none(config, overrides.none)
    return config


def _set_none(config: Any, names: Sequence[str]) -> None:
    """Does what --config.name=None says, of fields that may be None."""
    if not names:
        return
    declared = dict(fields.flatten(sections(config.task)))
    for name in names:
        one = declared.get(name)
        if not isinstance(one, fields.Field):
            raise BadInput(f"--{configuration.unknown(name, declared)}")
        if expected := one.problem(None):
            raise BadInput(f"--config.{name} = None: expected {expected}")
        config.update_from_flattened_dict({name: None})


def imports() -> list[str]:
    """The values of --import, for commands that start others."""
    return list(flags.FLAGS["import"].value or ())


def load_config_file(path: str) -> Any:
    """The module of a configuration file, for a command that makes several runs of it."""
    spec = importlib.util.spec_from_file_location("config_file", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def required(name: str, value: str | None) -> str:
    """The value of a flag that must be given.

    Raises:
      BadInput: it is not.
    """
    if not value:
        raise BadInput(f"--{name} is missing")
    return value


def run(main: Callable[..., Any], *, positional: bool = False, compiles: bool = False) -> None:
    """Parses the flags, runs `main` and ends the process with the status that its outcome has.

    Args:
      positional: `main` takes the list of the arguments that are no flags; without it they are refused.
      compiles: `main` compiles programs, which are kept for the next start (`sigmarep.compile.cache`), and computes
        with them, for which the process starts once more (`sigmarep.huge_pages`).
    """
    if compiles:
        huge_pages.restart()
    logging.set_verbosity(logging.ERROR)
    terminal.escape_unencodable()
    flags.declare_key_flag("import")
    if compiles:
        flags.declare_key_flag("compilation_cache")
        main = _keeping_programs(main)
    flags.FLAGS.set_gnu_getopt(positional)
    with _answering_signals():
        app.run(
            lambda rest: _finish(functools.partial(main, rest[1:]) if positional else main),
            flags_parser=functools.partial(_parse, positional=positional),
        )


@contextlib.contextmanager
def _answering_signals() -> Iterator[None]:
    """SIGTERM ends the process with a line; so does Ctrl-C where the interpreter does not get to it."""
    restore: dict[int, Any] = {}
    for number, handler in ((signal.SIGTERM, _sigterm), (signal.SIGINT, _interrupt)):
        # Under nohup and its like a signal is ignored, as asked for.
        if (before := signal.getsignal(number)) == signals.DEFAULTS[number]:
            signal.signal(number, handler)
            restore[number] = before
    try:
        with signals.answered(_answer):
            yield
    finally:
        for each, default in restore.items():
            signal.signal(each, default)


def _sigterm(*_: Any) -> None:
    """Stands for "not handled by the command"; `_answer` does what is to be done."""


def _interrupt(*_: Any) -> None:
    _interrupted.set()
    raise KeyboardInterrupt


def _ctrl_c(*_: Any) -> None:
    """Stands for `ctrl_c_is_sigterm`; `_answer` does what is to be done."""


def _answer(number: int) -> bool:
    """Answers a signal by the handler that is set for it."""
    handler = signal.getsignal(number)
    if handler is _sigterm:
        signals.end(f"{_program()}: stopped by SIGTERM", 128 + signal.SIGTERM)
    elif handler is _ctrl_c and not _interrupted.is_set():
        _interrupted.set()
        os.kill(os.getpid(), signal.SIGTERM)
    elif handler is _ctrl_c or (handler is _interrupt and not _interrupted.wait(INTERRUPT_SECONDS)):
        signals.end(f"{_program()}: interrupted", 128 + signal.SIGINT)
    return True


def _program() -> str:
    return os.path.basename(sys.argv[0])


def _keeping_programs(main: Callable[..., Any]) -> Callable[..., Any]:
    def with_cache(*arguments):
        from sigmarep.compile import cache

        cache.enable(flags.FLAGS.compilation_cache)
        return main(*arguments)

    return with_cache


def ctrl_c_is_sigterm() -> None:
    """Makes the first Ctrl-C save and stop as SIGTERM does; a second one ends the process at once."""
    signal.signal(signal.SIGINT, _ctrl_c)


def stop_with_runs() -> None:
    """Makes SIGTERM, SIGHUP and the first Ctrl-C end a command that makes runs with status 143, after it has stopped them.

    Under nohup a lost terminal is ignored, as asked for.
    """
    for stop in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(stop) is not signal.SIG_IGN:
            signal.signal(stop, lambda *_: sys.exit(143))
    ctrl_c_is_sigterm()


def fail(error: SigmarepError) -> None:
    """Prints the error's line and ends the process with its status."""
    sys.exit(_failed(error))


def _failed(error: SigmarepError) -> int:
    print(f"{_program()}: {error}", file=sys.stderr, flush=True)
    return error.exit_status


def _finish(main: Callable[[], Any]) -> None:
    try:
        main()
        sys.stdout.flush()
    except SigmarepError as error:
        fail(error)
    except KeyboardInterrupt:
        print(f"{_program()}: interrupted", file=sys.stderr, flush=True)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        _pipe_closed()


def _pipe_closed() -> None:
    # Whoever read the output, `head` for one, has seen enough. What is left of it goes nowhere, or the interpreter
    # would fail on it at its end; the status is that of a program that the closed pipe kills.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(128 + signal.SIGPIPE)


def outcome(main: Callable[[], Any]) -> int:
    """Calls `main` as the whole of a command, in a process that goes on: prints what it fails by, and returns the exit
    status that it has."""
    try:
        main()
        return 0
    except (Exception, SystemExit) as error:
        return status_of(error)


def status_of(error: BaseException) -> int:
    """The exit status of a command that fails by `error`, which is printed."""
    if isinstance(error, SigmarepError):
        return _failed(error)
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    traceback.print_exception(error)
    return 1


def _parse(arguments: Sequence[str], *, positional: bool) -> list[str]:
    global _overrides
    if asked := [each for each in arguments[1:] if each.startswith("-") and each.lstrip("-") in HELP]:
        _help(arguments[0], asked[0].lstrip("-"))
    try:
        arguments = recipes.with_paths(arguments)
        with _bad_input(arguments):
            _import(arguments)
            named, _overrides = _without_free_overrides(arguments)
            rest = flags.FLAGS(named)
            _check(rest[:1] if positional else rest, flags.FLAGS)
            return rest
    except SigmarepError as error:
        fail(error)
    return []


@contextlib.contextmanager
def _bad_input(arguments: Sequence[str]) -> Iterator[None]:
    """Raises what goes wrong with the arguments, and in the configuration file, as BadInput."""
    try:
        yield
    except SigmarepError:
        raise
    except flags.UnrecognizedFlagError as error:
        raise BadInput(f"--{error.flagname}: there is no such flag; see --help") from error
    except flags.Error as error:
        raise BadInput(_flag_error(error)) from error
    except (AttributeError, KeyError) as error:
        raise BadInput(_unknown_field(arguments, error)) from error
    except Exception as error:
        raise BadInput(f"{_place(error)}{type(error).__name__}: {one_line(error, most=2000)}") from error


def _help(program: str, name: str) -> None:
    """Prints the flags and ends the process with status 0; absl has 1."""
    try:
        flags.FLAGS([program, f"--{'help' if name == 'h' else name}"])
    except SystemExit:
        sys.stdout.flush()
        sys.exit(0)
    except BrokenPipeError:
        _pipe_closed()


def _import(arguments: Sequence[str]) -> None:
    """Does what --import says, before the configuration file is read, and makes modules beside that file importable."""
    early = flags.FlagValues()
    flags.DEFINE_multi_string("import", [], "", flag_values=early)
    flags.DEFINE_string("config", None, "", flag_values=early)
    early.set_gnu_getopt(True)
    # What is wrong with a flag is said when all of them are parsed.
    with contextlib.suppress(flags.Error):
        early(list(arguments), known_only=True)
        if early.config:
            doors.make_importable(early.config.partition(":")[0])
        for module in early["import"].value or ():
            doors.import_named(module)


def _without_free_overrides(arguments: Sequence[str]) -> tuple[list[str], Overrides]:
    """Parts the overrides that ml_collections refuses or misreads from the other arguments."""
    rest, pending, overrides = [], "", Overrides({}, [])
    for argument in arguments:
        name, equals, value = argument.lstrip("-").partition("=")
        if pending:
            overrides.free[pending], pending = _literal(argument), ""
        elif argument.startswith("-") and name.startswith(tuple(f"config.{section}." for section in FREE)):
            pending = name.removeprefix("config.")
            if equals:
                overrides.free[pending], pending = _literal(value), ""
        elif argument.startswith("-") and name.startswith("config.") and value == "None":
            overrides.none.append(name.removeprefix("config."))
        else:
            rest.append(argument)
    if pending:
        raise BadInput(f"--config.{pending}: a value is missing")
    return rest, overrides


def _literal(text: str) -> Any:
    """A number, a word of Python's, a tuple or dictionary of such; else the text itself."""
    try:
        return _keys_as_text(ast.literal_eval(text))
    except (ValueError, SyntaxError):
        return text


def _keys_as_text(value: Any) -> Any:
    return {str(key): _keys_as_text(each) for key, each in value.items()} if isinstance(value, dict) else value


def _check(rest: list[str], values: flags.FlagValues) -> None:
    if len(rest) > 1:
        raise BadInput(f"argument {rest[1]!r}: not understood; flags begin with --")
    path = values["config"].value if "config" in values else None
    if not isinstance(path, str | None):
        # ml_collections keeps what went wrong with the file for the first look at the configuration.
        try:
            path.task  # noqa: B018
        except OSError:
            named = config_flags.get_config_filename(values["config"])
            raise BadInput(f"--config {named}: there is no such file{recipes.near(named)}") from None


def _flag_error(error: flags.Error) -> str:
    """The message of absl; of an error in the configuration file, that error's own, which absl wraps in its trace."""
    text = str(error)
    if "Traceback (most recent call last)" not in text:
        return one_line(error, most=2000).removeprefix("flag ")
    kind, _, message = text.strip().splitlines()[-1].partition(": ")
    if kind.startswith("sigmarep.errors."):
        return message
    places = re.findall(r'File "([^"]+)", line (\d+), in get_config', text)
    return (f"{places[-1][0]}:{places[-1][1]}: " if places else "") + f"{kind}: {message}"


def _unknown_field(arguments: Sequence[str], error: Exception) -> str:
    """The flag of an unknown field or section, of which ml_collections names only one part."""
    # The message is the representation of another one: its quotes and line ends are escaped.
    text = " ".join(str(error).replace("\\n", " ").replace("\\", "").split())
    named = re.search(r"(\w+)['\"]*(?: Did you mean \"(\w+)\")?", text)
    for argument in arguments:
        name = argument.lstrip("-").partition("=")[0]
        parts = name.split(".")
        if named and parts[0] == "config" and named[1] in parts[1:]:
            field = name.removeprefix("config.")
            if field in configuration.RENAMED:
                return f"{name}: there is no such field{configuration.nearest(field, [])}"
            at = parts.index(named[1])
            kind = "section" if at + 1 < len(parts) else "field"
            near = ".".join([*parts[:at], named[2], *parts[at + 1 :]]) if named[2] else ""
            return f"{name}: there is no such {kind}" + (f"; did you mean {near}?" if near else "; see --describe")
    return f"{_place(error)}{text}"


def _place(error: BaseException) -> str:
    """File and line in the configuration file that raised `error`, if one did."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.name == "get_config" and "site-packages" not in frame.filename]
    return f"{own[-1].filename}:{own[-1].lineno}: " if own else ""
