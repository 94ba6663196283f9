"""What every script here does the same way: parse, and end with the contract's exit codes."""

from __future__ import annotations

import contextlib
import getpass
import itertools
import logging
import os
import re
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, NoReturn, TextIO, TypeVar

from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from dgm.errors import UserError, disk_fault
from dgm.train.run_folder import flatten, flatten_nested
from dgm.train.stop import SIGNALS
from dgm.yaml_file import read_yaml
from shards.cli import nearest, remedy_for
from shards.errors import ShardError
from shards.streams import keep_streams

DONE, FAULT, MISTAKE, STOPPED = 0, 1, 2, 75
_KINDS = {
    "int": "a whole number (int)", "float": "a number (float)", "bool": "true or false",
    "list": "a list, as [1, 2]", "str": "a text", "NoneType": "null",
}  # fmt: skip
CONFIGS = Path(__file__).parent / "configs"
_ends_process = False  # once `run` was called

Config = TypeVar("Config")
Number = TypeVar("Number", int, float)


def parse(config_class: type[Config], default_config: str, arguments: list[str]) -> Config:
    """Make a configuration from `--config FILE` (or the default one) and `--section.key VALUE`.

    Raises UserError in one line where a key is unknown or a value does not fit.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    description = (config_class.__doc__ or "").strip()
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False, description=description)
    parser.add_argument("--config", action="config", help="YAML file of keys")
    parser.add_class_arguments(config_class)
    if not any(a == "--config" or a.startswith("--config=") for a in arguments):
        arguments = ["--config", str(CONFIGS / default_config), *arguments]
    defaults = {key: value for key, value, _ in flatten(config_class())}
    for option, following in itertools.pairwise(["", *arguments, ""]):
        if option == "--config" or option.startswith("--config="):
            _check_file(following if option == "--config" else option[9:], defaults.keys())
    found = _parse(parser, _spell_out_flags(arguments, config_class))
    del found.config
    config = config_class(**vars(found))
    for key, value, _ in flatten(config):
        if value is None and defaults[key] is not None:
            raise UserError(f"{key} is null: give a value or leave it out")
    _check_values((key, value) for key, value, _ in flatten(config))
    return config


def _check_file(path: str, known: Collection[str]) -> None:
    # jsonargparse names neither the file nor the whole key of what it does not understand.
    if not path:
        raise UserError("--config is '': name a YAML file")
    try:
        keys = read_yaml(Path(path))
    except UserError as error:
        raise UserError(f"--config {error}") from None
    unknown = [key for key, _ in flatten_nested(keys) if key not in known]
    if unknown:
        if any(key.startswith(f"{unknown[0]}.") for key in known):
            raise UserError(f"{path} gives the section {unknown[0]} no keys: add or remove it")
        near = nearest(str(unknown[0]), known)
        hint = f"did you mean {near}?" if near else "see --help for the keys"
        raise UserError(f"{path} has an unknown key {unknown[0]}: {hint}")


def make_options_parser(description: str | None) -> ArgumentParser:
    """Make a parser of options for `parse_options`."""
    return ArgumentParser(exit_on_error=False, allow_abbrev=False, description=description)


def parse_options(parser: ArgumentParser, arguments: list[str]) -> Namespace:
    """Parse by a parser that does not exit on errors; raises UserError in one line."""
    found = _parse(parser, arguments)
    positional = {action.dest for action in parser._actions if not action.option_strings}
    _check_values((k if k in positional else f"--{k}", value) for k, value in vars(found).items())
    return found


def _parse(parser: ArgumentParser, arguments: list[str]) -> Namespace:
    try:
        return parser.instantiate(parser.parse_args(arguments))
    except ArgumentError as error:
        known = [option for action in parser._actions for option in action.option_strings]
        raise UserError(_plainly(one_line(str(error)), known)) from None


def _plainly(said: str, known: list[str]) -> str:
    """Say in our words what a parser found wrong, with what to do about it."""
    if unknown := re.match(r"unrecognized arguments: (--[^ =]+)", said):
        near = nearest(unknown[1], known)
        return f"{said}: {f'did you mean {near}?' if near else 'see --help'}"
    wrong = re.fullmatch(
        r'Parser key "([^"]+)": Expected an? (?:<class \'(\w+)\'>|(.+?))\. Got value: (.*)', said
    )
    if wrong:
        key, kind, other, value = wrong.groups()
        choices = (other or "").removeprefix("typing.Literal")
        wanted = f"one of {choices}" if choices.startswith("[") else f"a {choices}"
        return f"{key} is {value}: give {_KINDS.get(kind, kind) if kind else wanted}"
    # One of several types, mostly a number or null.
    union = re.fullmatch(r'Parser key "([^"]+)": Does not .* Given value: (.*)', said)
    if union:
        kinds = re.findall(r"- Expected a <class '(\w+)'>", said)
        told = " or ".join(_KINDS.get(kind, kind) for kind in kinds)
        return f"{union[1]} is {union[2]}: give {told or 'another value, see --help'}"
    return f"{said}: see --help"


def _check_values(given: Iterable[tuple[str, Any]]) -> None:
    """Raise UserError where a text is empty, or a number is none or far too large."""
    for name, value in given:
        for each in value if isinstance(value, list | tuple) else [value]:
            if remedy := remedy_for(each, name.removeprefix("--")):
                said = f"'{each}'" if isinstance(each, str) else each
                raise UserError(f"{name} is {said}: {remedy}")


def read_list(option: str, text: str, kind: Callable[[str], Number]) -> list[Number]:
    """Read numbers with commas between them, each once; raises UserError naming the option."""
    try:
        return list(dict.fromkeys(kind(part) for part in text.split(",")))
    except ValueError:
        which = "whole numbers" if kind is int else "numbers"
        raise UserError(
            f"{option} is '{text}': give {which} with commas, as {option} 5,10"
        ) from None


def _spell_out_flags(arguments: list[str], config_class: type) -> list[str]:
    """Let `--train.overfit_one_batch` alone mean true."""
    flags = {f"--{key}" for key, value, _ in flatten(config_class()) if isinstance(value, bool)}
    spelled = []
    for here, following in zip(arguments, [*arguments[1:], "--"], strict=True):
        alone = here in flags and following.startswith("--")
        spelled.append(f"{here}=true" if alone else here)
    return spelled


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run a script: 0 done, 75 stopped after saving, 2 the user's mistake, 1 anything else.

    The process ends here, so that it may change streams, warnings and hooks for good.
    """
    global _ends_process
    _ends_process = True
    keep_streams()
    _give_caches_a_place()
    warnings.showwarning = _say_warning
    # Without a GPU it warns of a CUDA toolkit that lies about unused.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    _keep_disk_faults_of_helpers_quiet()
    try:
        code = main() or DONE
    except (UserError, ShardError) as error:
        _say_once(f"error: {one_line(str(error))}")
        code = MISTAKE
    except OSError as error:
        fault = disk_fault(error)
        if fault is None:
            raise
        _say_once(f"error: {one_line(fault)}")
        code = MISTAKE
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    sys.stdout.flush()
    _leave_code(code)
    sys.exit(code)


def _give_caches_a_place() -> None:
    # In a container a user may have neither a name, which torch's compiler asks for, nor a home.
    base = Path(os.environ.get("XDG_CACHE_HOME") or tempfile.gettempdir())
    own = f"-{os.getuid()}" if hasattr(os, "getuid") else ""
    try:
        getpass.getuser()
    except (KeyError, ImportError, OSError):
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(base / f"torchinductor{own}"))
    if os.path.expanduser("~") == "~":
        os.environ.setdefault("TRITON_HOME", str(base / f"triton{own}"))
        os.environ.setdefault("MPLCONFIGDIR", str(base / f"matplotlib{own}"))


def leave(code: int, line: str) -> NoReturn:
    """End in the middle of anything, as from a signal's handler, without an exception.

    One raised at any moment can be swallowed, in a __del__ for example.
    """
    _ignore_signals()
    with contextlib.suppress(RuntimeError, OSError):  # it may be writing just now
        sys.stdout.flush()
    if (os.environ.get("RANK") or "0") == "0":
        with contextlib.suppress(OSError):
            os.write(1, f"{line}\n".encode())
    _leave_code(code)
    os._exit(code)


def signals_at_end(restore: Callable[[], object]) -> None:
    """Ignore signals now that all is saved, where `run` ends this process next; else restore."""
    if _ends_process:
        _ignore_signals()
    else:
        restore()


def _ignore_signals() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _keep_disk_faults_of_helpers_quiet() -> None:
    # A tracker's thread, or a file that is closed as it is forgotten, meets a full disk as well as
    # the main thread, which tells of it in one line.
    in_thread, in_del = threading.excepthook, sys.unraisablehook

    def of_thread(args: threading.ExceptHookArgs) -> None:
        if args.exc_value is None or disk_fault(args.exc_value) is None:
            in_thread(args)

    def of_del(args: sys.UnraisableHookArgs) -> None:
        if args.exc_value is None or disk_fault(args.exc_value) is None:
            in_del(args)

    threading.excepthook, sys.unraisablehook = of_thread, of_del


def _leave_code(code: int) -> None:
    # Who started several processes learns from them one code only, or that of one it killed.
    path = os.environ.get("DGM_EXIT_CODES")
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"{code}\n")


def _say_once(line: str) -> None:
    # Most mistakes are met by all processes alike: the first says it, and as it ends the launcher
    # ends the others. One that another process met alone is still there after a while.
    if (os.environ.get("RANK") or "0") != "0":
        time.sleep(5)
    print(line, file=sys.stderr, flush=True)


def one_line(text: str) -> str:
    """Join the lines of a message."""
    return " ".join(part.strip() for part in text.splitlines() if part.strip())


def _say_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print our own warnings in one line, without the source line that raised them."""
    ours = Path(filename).resolve().is_relative_to(Path(__file__).resolve().parents[1])
    if ours and ".venv" not in filename:
        print(f"warning: {one_line(str(message))}", file=sys.stderr)
