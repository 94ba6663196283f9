"""Parse configuration files and `--section.key VALUE` options to dataclasses, with hints."""

from __future__ import annotations

import argparse
import importlib
import itertools
import re
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from types import ModuleType, NoneType
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin

import yaml
from jsonargparse import (
    ArgumentError,
    ArgumentParser,
    Namespace,
    set_loader,
    set_parsing_settings,
)
from jsonargparse.typing import restricted_string_type

from dgm.cli.suggestions import suggest_key, suggest_option
from dgm.common.command_line import expand_home, remedy_for
from dgm.common.config_keys import PATH, flatten, flatten_nested, marked_keys, nested
from dgm.common.errors import UserError, one_line
from dgm.common.run_files import read_config
from dgm.common.yaml_io import read_value, read_yaml

_TYPE_NAMES = {
    int: "a whole number (int)", float: "a number (float)", bool: "true or false",
    str: "text", NoneType: "null",
}  # fmt: skip
CONFIGS = Path(__file__).parents[2] / "launch" / "configs"
"""The published configurations; an installed package holds a copy of launch/."""
TRAINERS = {"diffusion": "ddpm", "gan": "gan", "vae": "vae", "flow": "flow"}
"""The name in `train_NAME.py`, by the section of the configuration that only this family has."""
_LOADER = "dgm"  # the name under which jsonargparse knows our YAML loader
_MAX_EXACT = 2**53  # a float holds every whole number up to it
_FLOAT = re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?")
path_word = restricted_string_type("path", r"(?s).*")
"""Type of an option whose value is a path, for `parse_options`."""

Config = TypeVar("Config")
Number = TypeVar("Number", int, float)


def family_module(family: str) -> ModuleType:
    """Return the module `dgm.cli.train_*` of a family, imported here because it imports torch."""
    return importlib.import_module(f"dgm.cli.train_{TRAINERS[family]}")


def parse(config_class: type[Config], default_config: str, arguments: list[str]) -> Config:
    """Return the configuration of `--config FILE` (or the default one) and `--section.key VALUE`.

    FILE is a path, or the name of a file in launch/configs. Later files override earlier ones, and
    options override all files, in any position. Raise a one-line UserError for an unknown key or a
    value of the wrong type.
    """
    parser = make_options_parser((config_class.__doc__ or "").strip())
    parser.add_argument("--config", action="config", help="YAML file of keys")
    parser.add_class_arguments(config_class)
    files, words = _split_files(arguments)
    defaults = flatten(config_class())
    kinds = _kinds(parser)
    given: dict[str, Any] = {}
    for file in files or [str(CONFIGS / default_config)]:
        given |= _read_file(expand_home("--config", file), defaults.keys(), kinds)
    found = _parse(parser, _spell_out_flags(words, defaults), given)
    for key in marked_keys(config_class(), PATH):
        if isinstance(found[key], str):
            found[key] = expand_home(key, found[key])
    del found.config
    config = config_class(**vars(parser.instantiate(found)))
    for key, value in flatten(config).items():
        if value is None and defaults[key] is not None:
            raise UserError(f"{key} is null: give a value or leave it out")
        _check_value(key, value)
    return config


def family_of(path: Path) -> str:
    """Return the family of a run's config.yaml; raise UserError if there is not exactly one."""
    sections = {key.split(".")[0] for key in read_config(path)}
    found = [name for name in TRAINERS if name in sections]
    if len(found) != 1:
        raise UserError(
            f"{path} has {len(found)} of the sections {', '.join(TRAINERS)}: a run has one"
        )
    return found[0]


def open_config(path: Path) -> Any:
    """Read a run's config.yaml as the configuration of its family."""
    return parse(family_module(family_of(path)).Config, "", ["--config", str(path)])


def _split_files(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Return the files of all --config options, and the other words."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", action="append", nargs="?", const="", default=[])
    found, words = parser.parse_known_args(arguments)
    return found.config, words


def _read_file(path: str, known: Collection[str], kinds: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of a YAML file, flat, with values converted to the keys' types."""
    if not path:
        raise UserError("--config is '': name a YAML file")
    if not Path(path).exists() and (CONFIGS / path).is_file():
        path = str(CONFIGS / path)
    try:
        keys = read_yaml(Path(path))
        texts = dict(flatten_nested(read_yaml(Path(path), as_text=True)))
    except UserError as error:
        raise UserError(f"--config {error}") from None
    sections = {key.split(".")[0] for key in known}
    for section, name in TRAINERS.items():
        if section in keys and section not in sections:
            raise UserError(
                f"{path} is for another family (it has the section {section}): train it by "
                f"launch/train_{name}.py"
            )
    found = {}
    for key, value in flatten_nested(keys):
        if key not in known:
            _raise_unknown_key(path, key, value, known, texts.keys())
        found[key] = _convert(value, texts[key], kinds.get(key))
    return found


def _raise_unknown_key(
    path: str, key: str, value: object, known: Collection[str], all_keys: Iterable[str]
) -> NoReturn:
    """Raise UserError for an unknown key of a file with `all_keys`."""
    inside = [name for name in known if name.startswith(f"{key}.")]
    if inside and value is None:
        raise UserError(f"{path} has an empty section {key}: add keys or remove it")
    if inside:
        raise UserError(
            f"{path} gives the section {key} the value '{value}': write its keys below it, as "
            f"{inside[0].removeprefix(key + '.')}: VALUE"
        )
    if name := _only_trainer_of(all_keys):
        raise UserError(
            f"{path} is for another family (it has the key {key}): train it by "
            f"launch/train_{name}.py"
        )
    hint = suggest_key(str(key), known) or "see --help for the keys"
    raise UserError(f"{path} has an unknown key {key}: {hint}")


def _only_trainer_of(keys: Iterable[str]) -> str | None:
    """Return the name of the only trainer that has all these keys; None if several do, or none."""
    keys = set(keys)
    able = [
        name
        for family, name in TRAINERS.items()
        if keys <= flatten(family_module(family).Config()).keys()
    ]
    return able[0] if len(able) == 1 else None


def _kinds(parser: ArgumentParser) -> dict[str, Any]:
    """Return the types of a parser's values, by key."""
    return {action.dest: getattr(action, "_typehint", None) for action in parser._actions}


def _is_whole(kind: Any) -> bool:
    """Return whether a type takes int but not float: int, int | None."""
    kinds = get_args(kind) or (kind,)
    return int in kinds and float not in kinds


def _convert(value: Any, text: str, kind: Any) -> Any:
    """Convert a YAML value to its key's type: 1e5 to an int, `no` to a string."""
    if isinstance(value, float) and _is_whole(kind):
        return _as_whole(value, value)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is str or (kind == str | None and is_number):
        return value if value is None or isinstance(value, list) else text
    return text if isinstance(value, bool) and text in get_args(kind) else value


def _with_whole_numbers(words: list[str], kinds: dict[str, Any]) -> list[str]:
    """Replace 1e5 by 100000 where the type is int, for which jsonargparse refuses the former."""
    whole = {f"--{key}" for key, kind in kinds.items() if _is_whole(kind)}
    found: list[str] = []
    for word in words:
        option, equals, value = word.rpartition("=") if word.startswith("--") else ("", "", word)
        name = option or (found[-1] if found else "")
        if name in whole and _FLOAT.fullmatch(value):
            word = f"{option}{equals}{_as_whole(float(value.replace('_', '')), value)}"
        found.append(word)
    return found


def _as_whole(value: float, otherwise: Any) -> Any:
    return int(value) if value.is_integer() and abs(value) <= _MAX_EXACT else otherwise


def make_options_parser(description: str | None) -> ArgumentParser:
    """Return a parser of options for `parse_options`, or of the keys of a class."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    set_loader(_LOADER, read_value, (yaml.YAMLError, ValueError))
    return ArgumentParser(
        exit_on_error=False, allow_abbrev=False, description=description, parser_mode=_LOADER
    )


def parse_options(parser: ArgumentParser, arguments: list[str]) -> Namespace:
    """Parse by a parser that does not exit on errors; raise a one-line UserError."""
    found = _parse(parser, arguments)
    positional = {action.dest for action in parser._actions if not action.option_strings}
    for key, value in vars(found).items():
        name = key if key in positional else f"--{key}"
        _check_value(name, value)
        if isinstance(value, path_word):
            found[key] = expand_home(name, value)
        elif isinstance(value, list):
            found[key] = [expand_home(name, v) if isinstance(v, path_word) else v for v in value]
    return found


def _parse(
    parser: ArgumentParser, arguments: list[str], given: dict[str, Any] | None = None
) -> Namespace:
    """Parse words, which override values `given` by key; raise a one-line UserError."""
    try:
        before = None if given is None else parser.parse_object(nested(given))
        words = _with_whole_numbers(arguments, _kinds(parser))
        return parser.parse_args(words, namespace=before)
    except ArgumentError as error:
        raise UserError(_explain(one_line(str(error)), parser)) from None


def _explain(message: str, parser: ArgumentParser) -> str:
    """Return jsonargparse's message in terms of keys and values, with the remedy."""
    known = [option for action in parser._actions for option in action.option_strings]
    if unknown := re.match(r"unrecognized arguments: ([^ =]+)", message):
        word = unknown[1]
        if word.startswith("--"):
            return f"{message}: {_hint(word, known) or 'see --help'}"
        if word.endswith((".yaml", ".yml")) and "--config" in known:
            return f"{message}: write --config {word}"
    # For a union, as in `int | None`, the message lists an error for each type before the value.
    elif wrong := re.match(r'Parser key "([^"]+)": .*(?:Got|Given) value: (.*)', message):
        key, value = wrong.groups()
        return f"{key} is {value}: give {_describe(_kinds(parser).get(key))}"
    return f"{message}: see --help"


def _describe(kind: Any) -> str:
    """Describe the values of a type."""
    arguments = get_args(kind)
    if get_origin(kind) is Literal:
        return f"one of {list(arguments)}"
    if get_origin(kind) is tuple:
        return f"a list of {len(arguments)} elements, each {_describe(arguments[0])}"
    if get_origin(kind) is list:
        example = "[a, b]" if arguments[0] is str else "[1, 2]"
        return f"a list such as {example}, each {_describe(arguments[0])}"
    if arguments:
        return " or ".join(map(_describe, arguments))
    return _TYPE_NAMES.get(kind, "another value, see --help")


def _hint(option: str, known: list[str]) -> str | None:
    """Return a hint for an unknown option; None without one."""
    keys = [name.removeprefix("--") for name in known if "." in name]
    if not keys:
        return suggest_option(option, known)
    section = option.removeprefix("--").split(".")[0]
    if section in TRAINERS and not any(key.startswith(f"{section}.") for key in keys):
        script = f"launch/train_{TRAINERS[section]}.py"
        return f"the section {section} belongs to {script}; see --help for the keys"
    if option in ("--conf", "--cfg", "--config_file", "--config-file", "--config_path", "--yaml"):
        return "did you mean --config?"
    hint = suggest_key(option.removeprefix("--"), keys)
    return None if hint is None else re.sub(r"did you mean (?!one of)", "did you mean --", hint)


def _check_value(name: str, value: Any) -> None:
    """Raise UserError for an empty string, and for a number that is NaN or far too large."""
    for each in value if isinstance(value, list | tuple) else [value]:
        if remedy := remedy_for(each, name.removeprefix("--")):
            shown = f"'{each}'" if isinstance(each, str) else each
            raise UserError(f"{name} is {shown}: {remedy}")


def read_list(option: str, text: str, kind: Callable[[str], Number]) -> list[Number]:
    """Return comma-separated numbers without repeats; raise UserError naming the option."""
    try:
        return list(dict.fromkeys(kind(part) for part in text.split(",")))
    except ValueError:
        which = "whole numbers" if kind is int else "numbers"
        raise UserError(
            f"{option} is '{text}': give comma-separated {which}, as {option} 5,10"
        ) from None


def _spell_out_flags(arguments: list[str], defaults: dict[str, Any]) -> list[str]:
    """Add `=true` to a flag that stands alone, as `--train.overfit_one_batch`."""
    flags = {f"--{key}" for key, value in defaults.items() if isinstance(value, bool)}
    spelled = []
    for word, following in itertools.pairwise([*arguments, "--"]):
        is_alone = word in flags and following.startswith("--")
        spelled.append(f"{word}=true" if is_alone else word)
    return spelled
