"""What every script here does the same way: parse, and end with the contract's exit codes."""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TextIO, TypeVar

from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from dgm.errors import UserError
from dgm.train.run_folder import flatten
from shards.errors import ShardError

DONE, FAULT, MISTAKE, STOPPED = 0, 1, 2, 75
CONFIGS = Path(__file__).parent / "configs"

Config = TypeVar("Config")


def parse(config_class: type[Config], default_config: str, arguments: list[str]) -> Config:
    """Make a configuration from `--config FILE` (or the default one) and `--section.key VALUE`.

    Raises UserError in one line where a key is unknown or a value does not fit.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(exit_on_error=False, description=(config_class.__doc__ or "").strip())
    parser.add_argument("--config", action="config", help="YAML file of keys")
    parser.add_class_arguments(config_class)
    if not any(a == "--config" or a.startswith("--config=") for a in arguments):
        arguments = ["--config", str(CONFIGS / default_config), *arguments]
    found = parse_options(parser, _spell_out_flags(arguments, config_class))
    del found.config
    return config_class(**vars(found))


def parse_options(parser: ArgumentParser, arguments: list[str]) -> Namespace:
    """Parse by a parser that does not exit on errors; raises UserError in one line."""
    try:
        return parser.instantiate(parser.parse_args(arguments))
    except ArgumentError as error:
        raise UserError(f"{one_line(str(error))}: see --help") from None


def _spell_out_flags(arguments: list[str], config_class: type) -> list[str]:
    """Let `--train.overfit_one_batch` alone mean true."""
    flags = {f"--{key}" for key, value, _ in flatten(config_class()) if isinstance(value, bool)}
    spelled = []
    for here, following in zip(arguments, [*arguments[1:], "--"], strict=True):
        alone = here in flags and following.startswith("--")
        spelled.append(f"{here}=true" if alone else here)
    return spelled


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run a script: 0 done, 75 stopped after saving, 2 the user's mistake, 1 anything else."""
    warnings.showwarning = _say_warning
    # Without a GPU it warns of a CUDA toolkit that lies about unused.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    try:
        code = main() or DONE
    except (UserError, ShardError) as error:
        if os.environ.get("RANK", "0") == "0":  # on several processes once
            print(f"error: {one_line(str(error))}", file=sys.stderr, flush=True)
        code = MISTAKE
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    sys.stdout.flush()
    sys.exit(code)


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
