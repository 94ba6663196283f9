"""How the running command spells the options of `python -m shards.build`."""

from collections.abc import Callable

_spelling: Callable[[str], str] = str


def spell_options(spelling: Callable[[str], str]) -> None:
    """Set how this process's command spells `--skip-bad`, an option of `python -m shards.build`."""
    global _spelling
    _spelling = spelling


def option(name: str, value: str = "") -> str:
    """Return an option of `python -m shards.build` as the running command takes it."""
    return _spelling(f"--{name} {value}".strip())
