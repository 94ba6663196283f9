"""The command line of `python -m slurm.submit`."""

from __future__ import annotations

import dataclasses
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from dgm.common.command_line import expand_home, remedy_for
from dgm.common.config_keys import PATH
from dgm.common.errors import UserError
from dgm.common.suggestions import nearest
from dgm.common.validation import check_range
from dgm.common.yaml_io import read_yaml
from slurm.resources import Resources, profile_path
from slurm.sweep import words_of

NOT_SLURM = ("local", "debug")
_TYPES = {
    "int": "a whole number (int)", "bool": "true or false", "str": "text",
    "list": "a list such as [a, b]", "dict": "keys and values such as {a: b}",
}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """What to submit, and how."""

    config: str | None = field(default=None, metadata=PATH)
    """The trainer's YAML configuration; null is the trainer's default."""
    sweep: str | None = field(default=None, metadata=PATH)
    """YAML file with sets of keys (sets:, grid:); each set becomes a task of an array."""
    cluster: str = field(default="default", metadata=PATH)
    """Name of a profile in slurm/clusters/, a YAML file, local (this machine) or debug (this
    process)."""
    accelerate_config: str = field(default="accelerate_config.yaml", metadata=PATH)
    """File that chooses the engine, as for accelerate launch."""
    max_parallel: int | None = None
    """Tasks of an array that run at once; null is 64, or 1 on this machine."""
    max_faults: int = 3
    """Failed starts in a row, without a new checkpoint, after which a run is given up."""
    only_failed: bool = False
    """Leave out runs that are done, queued or running."""
    dry_run: bool = False
    """Show the batch script, commands and run folders, and submit nothing."""


@dataclass(frozen=True)
class Request:
    """A parsed command line."""

    script: str
    options: Options
    resources: Resources
    overrides: list[str]  # options of the trainer, given after --


def read_options(arguments: list[str]) -> Request:
    """Parse the command line; raise UserError where it is not valid."""
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
    values = _parse(parser, words)
    if values.cluster not in NOT_SLURM:
        path = profile_path(values.cluster)
        values = _parse(parser, [*_read_profile(path), *words], f"{path}, or the command line: ")
    elif values.gpus_per_node == Resources().gpus_per_node:
        has_gpu = Path("/proc/driver/nvidia").is_dir() or sys.platform == "darwin"
        values.gpus_per_node = int(has_gpu)
    request = Request(
        values.script,
        Options(**{f.name: values[f.name] for f in dataclasses.fields(Options)}),
        Resources(**{f.name: values[f.name] for f in dataclasses.fields(Resources)}),
        arguments[cut + 1 :],
    )
    _check(request)
    return request


def _check(request: Request) -> None:
    request.resources.check()
    options = request.options
    if not Path(request.script).is_file():
        raise UserError(f"there is no trainer {request.script}: choose one of launch/train_*.py")
    check_range(options, "--", "max-parallel", "max-faults", min=1)
    if options.cluster in NOT_SLURM and request.resources.node_range[0] > 1:
        raise UserError(f"--cluster {options.cluster} is one node: leave out --nodes")
    if options.cluster == "debug" and (options.sweep or request.resources.processes > 1):
        raise UserError(
            "--cluster debug is one process of one run: leave out --sweep, --processes-per-node "
            "and --gpus-per-node"
        )


def _parse(parser: ArgumentParser, words: list[str], prefix: str = "") -> Namespace:
    try:
        values = parser.instantiate(parser.parse_args(words))
    except ArgumentError as error:
        message = " ".join(str(error).split())
        known = [option for action in parser._actions for option in action.option_strings]
        raise UserError(f"{prefix}{_explain(message, known)}") from None
    paths = ("script", *(f.name for f in dataclasses.fields(Options) if f.metadata))
    for name, value in vars(values).items():
        flag = name if name == "script" else _dashed(f"--{name}")
        for each in value if isinstance(value, list) else [value]:
            if remedy := remedy_for(each, name):
                shown = f"'{each}'" if isinstance(each, str) else each
                raise UserError(f"{flag} is {shown}: {remedy}")
        if name in paths and isinstance(value, str):
            values[name] = expand_home(flag, value)
    return values


def _underscored(word: str) -> str:
    """Return --gpus-per-node as --gpus_per_node, and a flag such as --dry-run as --dry_run=true."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    name = "--" + name[2:].replace("-", "_")
    flags = [f"--{f.name}" for f in dataclasses.fields(Options) if f.default is False]
    return f"{name}=true" if name in flags and not equals else f"{name}{equals}{value}"


def _read_profile(path: Path) -> list[str]:
    """Return a profile's keys as options, which those of the command line override."""
    keys = read_yaml(path, as_text=True)  # in YAML 12:00:00 is a number
    known = [f.name for f in dataclasses.fields(Resources)]
    known += ["accelerate_config", "max_parallel", "max_faults"]
    for key in keys:
        if key not in known:
            raise UserError(f"{path} has an unknown key {key}: choose from {', '.join(known)}")
    return words_of(keys)


def _explain(message: str, known: list[str]) -> str:
    """Return an error of jsonargparse as a one-line message with a remedy."""
    mistyped = re.fullmatch(
        r'Parser key "([^"]+)": Expected an? <class \'(\w+)\'>\. Got value: (.*)', message
    )
    if mistyped:
        key, kind, value = mistyped.groups()
        return f"--{_dashed(key)} is {value}: give {_TYPES.get(kind, kind)}"
    unknown = re.search(r"unrecognized arguments: (--[^ =]+)", message)
    near = nearest(_dashed(unknown[1]), map(_dashed, known)) if unknown else None
    return f"{message}: did you mean {near}?" if near else f"{message}: see --help"


def _dashed(option: str) -> str:
    return option.replace("_", "-")
