"""The command line of `python -m slurm.submit`."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from dgm.common.command_line import expand_home
from dgm.common.errors import UserError
from dgm.common.suggestions import nearest
from dgm.common.yaml_io import read_yaml
from slurm.resources import Resources, profile_path

NOT_SLURM = ("local", "debug")
_PATH = {"path": True}  # field metadata of options in which ~ is the home folder


_KINDS = {
    "int": "a whole number (int)", "bool": "true or false", "str": "a text",
    "list": "a list, as [a, b]", "dict": "keys and values, as {a: b}",
}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """What to submit, and how."""

    config: str | None = field(default=None, metadata=_PATH)
    """YAML file of keys, as the trainer has it; null is the trainer's published one."""
    sweep: str | None = field(default=None, metadata=_PATH)
    """YAML file of sets of keys (sets:, grid:), each of which becomes a task of an array."""
    cluster: str = field(default="default", metadata=_PATH)
    """A profile of slurm/clusters/ by name, or a YAML file; or local (this machine), debug (this
    process)."""
    accelerate_config: str = field(default="accelerate_config.yaml", metadata=_PATH)
    """File that chooses the engine, as for accelerate launch."""
    max_parallel: int | None = None
    """Tasks of an array that run at once; null is 64, on this machine 1."""
    max_faults: int = 3
    """Starts in a row that may fail without a new checkpoint before a run is given up."""
    only_failed: bool = False
    """Leave out what is done, queued or running."""
    dry_run: bool = False
    """Show the batch script, commands and run folders, and submit nothing."""


@dataclass(frozen=True)
class Asked:
    """A parsed command line."""

    script: str
    options: Options
    resources: Resources
    overrides: list[str]  # behind --, for the trainer


def read_options(arguments: list[str]) -> Asked:
    """Parse the command line; raises UserError in one line."""
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    words = [_underscored(word) for word in arguments[:cut]]
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="python -m slurm.submit", exit_on_error=False, allow_abbrev=False,
        usage="python -m slurm.submit SCRIPT [--config FILE] [--sweep FILE] [options] "
        "[-- --section.key VALUE ...]",
    )  # fmt: skip
    parser.add_argument("script", help="trainer, such as launch/train_ddpm.py")
    parser.add_class_arguments(Options)
    parser.add_class_arguments(Resources)
    chosen = _parse(parser, words)
    if chosen.cluster not in NOT_SLURM:
        path = profile_path(chosen.cluster)
        chosen = _parse(parser, [*_read_profile(path), *words], f"{path}, or the command line: ")
    elif chosen.gpus_per_node == Resources().gpus_per_node and not _has_gpu():
        chosen.gpus_per_node = 0
    found = vars(chosen)
    asked = Asked(
        found["script"],
        Options(**{f.name: found[f.name] for f in dataclasses.fields(Options)}),
        Resources(**{f.name: found[f.name] for f in dataclasses.fields(Resources)}),
        arguments[cut + 1 :],
    )
    _check(asked)
    return asked


def _check(asked: Asked) -> None:
    asked.resources.check()
    options = asked.options
    if not Path(asked.script).is_file():
        raise UserError(f"there is no trainer {asked.script}: choose one of launch/train_*.py")
    for name in ("max_parallel", "max_faults"):
        value = getattr(options, name)
        if value is not None and value < 1:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} is {value}: choose 1 or more")
    if options.cluster in NOT_SLURM and asked.resources.node_range[0] > 1:
        raise UserError(f"--cluster {options.cluster} is one node: leave out --nodes")
    if options.cluster == "debug" and (options.sweep or asked.resources.processes > 1):
        raise UserError("--cluster debug is one process of one run: leave out --sweep and others")


def _parse(parser: ArgumentParser, words: list[str], where: str = "") -> Namespace:
    try:
        chosen = parser.instantiate(parser.parse_args(words))
    except ArgumentError as error:
        said = " ".join(str(error).split())
        known = [option for action in parser._actions for option in action.option_strings]
        raise UserError(f"{where}{_plainly(said, known)}") from None
    _check_values(chosen)
    for name in ("script", *(f.name for f in dataclasses.fields(Options) if f.metadata)):
        if isinstance(chosen[name], str):
            flag = name if name == "script" else _dashed(f"--{name}")
            chosen[name] = expand_home(flag, chosen[name])
    return chosen


def _check_values(chosen: Namespace) -> None:
    """Raise UserError where a text is empty or a number far too large."""
    for name, value in vars(chosen).items():
        flag = name if name == "script" else _dashed(f"--{name}")
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, str) and not each.strip():
                raise UserError(f"{flag} is '{each}': give a value, or leave it out")
            if isinstance(each, int) and abs(each) >= 2**31:
                raise UserError(f"{flag} is {each}: choose a number below 2**31")


def _underscored(word: str) -> str:
    """Let --gpus-per-node mean --gpus_per_node, and --dry-run alone true."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    name = "--" + name[2:].replace("-", "_")
    flags = [f"--{f.name}" for f in dataclasses.fields(Options) if f.default is False]
    return f"{name}=true" if name in flags and not equals else f"{name}{equals}{value}"


def _read_profile(path: Path) -> list[str]:
    """Write a profile's keys as options; the command line's own come after them and win."""
    keys = read_yaml(path, as_written=True)  # to YAML 12:00:00 would be a number
    known = [f.name for f in dataclasses.fields(Resources)]
    known += ["accelerate_config", "max_parallel", "max_faults"]
    for key in keys:
        if key not in known:
            raise UserError(f"{path} has an unknown key {key}: choose {', '.join(known)}")
    return [f"--{key}={_as_word(value)}" for key, value in keys.items()]


def _as_word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _has_gpu() -> bool:
    return Path("/proc/driver/nvidia").is_dir() or sys.platform == "darwin"


def _plainly(said: str, known: list[str]) -> str:
    """Say in our words what a parser found wrong, with what to do about it."""
    wrong = re.fullmatch(
        r'Parser key "([^"]+)": Expected an? <class \'(\w+)\'>\. Got value: (.*)', said
    )
    if wrong:
        key, kind, value = wrong.groups()
        return f"--{_dashed(key)} is {value}: give {_KINDS.get(kind, kind)}"
    unknown = re.search(r"unrecognized arguments: (--[^ =]+)", said)
    near = nearest(_dashed(unknown[1]), map(_dashed, known)) if unknown else None
    return f"{said}: did you mean {near}?" if near else f"{said}: see --help"


def _dashed(option: str) -> str:
    """Write an option with dashes, as people do."""
    return option.replace("_", "-")
