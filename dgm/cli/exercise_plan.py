"""Files of exercises: which runs answer a question, what is expected of them, what is shown.

title, asks       of the page
trainer           ddpm, gan, vae or flow
groups            by name: `set` (keys of the trainer), or `like: FILE` and `group` to take a group
                  of another file; `trainer` and `scales` of its own where it needs them
scales            by name: `config` (in launch/configs), `set`, `seeds` (runs of each group),
                  `measure` (words for launch/evaluate.py), `then` (for the first run of each
                  group: a script of launch/ and its words)
expect            `says`, `lower` or `higher` (a measure), `of` (a group), `than` (one, or a number)
compare, rank_by  measures of groups; by the latter the best is named
least, show       the least of each loss; pictures
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dgm.cli import denoise, evaluate, explore, sample
from dgm.cli.families import FAMILIES
from dgm.cli.parser import CONFIGS, parse_options
from dgm.common.errors import UserError
from dgm.common.yaml_io import read_yaml
from dgm.report.exercise import PICTURES, Exercise
from dgm.report.figure_names import Measure, read_measure
from dgm.report.hypothesis_check import Expectation

FOLDER = CONFIGS / "exercises"
TRAINERS = {module.__name__.rpartition("train_")[2]: module for module in FAMILIES.values()}
"""Modules of the training scripts, by what follows train_ in their names."""
_SCRIPTS = {"evaluate": evaluate, "sample": sample, "denoise": denoise, "explore": explore}

_FILE = (
    "title", "asks", "trainer", "groups", "scales", "expect", "compare", "rank_by", "least", "show",
)  # fmt: skip
_GROUP = ("trainer", "set", "scales", "like", "group")
_SCALE = ("config", "set", "seeds", "measure", "then", "like", "group")
_EXPECT = ("says", "lower", "higher", "of", "than")


@dataclass(frozen=True)
class PlannedRun:
    """A run of an exercise: how it is trained, and what is done with it then."""

    name: str
    group: str
    trainer: str
    config: Path
    settings: dict[str, Any]
    then: tuple[tuple[str, ...], ...]  # a script's name and its words


@dataclass(frozen=True)
class Plan:
    """An exercise, and its runs at one scale."""

    name: str
    exercise: Exercise
    runs: list[PlannedRun]


def names_of_exercises(folder: Path = FOLDER) -> list[str]:
    """Name the exercises that there are."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def read_plan(path: Path, scale: str) -> Plan:
    """Read an exercise at a scale; raises UserError naming the file and what is wrong in it."""
    told = _read(path)
    groups = _object(path, told, "groups")
    if not groups:
        raise UserError(f"{path} has no groups: name one at least")
    runs = [run for name in groups for run in _plan_group(path, told, name, scale)]
    exercise = Exercise(
        title=_text(path, told, "title"),
        asks=_text(path, told, "asks"),
        expectations=[_expectation(path, found, groups) for found in _list(path, told, "expect")],
        compare=_measures(path, told, "compare"),
        rank_by=_measures(path, told, "rank_by"),
        least=bool(told.get("least", False)),
        show=_list(path, told, "show"),
    )
    for kind in exercise.show:
        if kind not in PICTURES:
            raise UserError(f"{path} shows '{kind}': choose of {', '.join(PICTURES)}")
    return Plan(path.stem, exercise, runs)


def _plan_group(
    path: Path, told: dict[str, Any], name: str, scale: str, wanted_seeds: int | None = None
) -> list[PlannedRun]:
    """Plan the runs of a group; with `wanted_seeds` for another file, which takes it."""
    group = _object(path, told["groups"], name)
    _check_keys(path, f"groups.{name}", group, _GROUP)
    whole, own = _scale(path, told, scale), _scale(path, group, scale)
    at = {**whole, **own}
    seeds = wanted_seeds or at.get("seeds", 1)
    if isinstance(seeds, bool) or not isinstance(seeds, int) or seeds < 1:
        raise UserError(f"{path} has seeds {seeds} at scale {scale}: give 1 or more")
    taken = {**group, **own}
    if "like" in taken:
        other = path.parent / _text(path, taken, "like")
        theirs, wanted = _read(other), _text(path, taken, "group")
        if wanted not in _object(other, theirs, "groups"):
            raise UserError(f"{path} takes group {wanted} of {other.name}, which has none")
        if wanted_seeds is not None:  # or two files could send each other round for ever
            raise UserError(f"{path} takes group {name} of {other.name} itself: take it from there")
        return [replace(r, group=name) for r in _plan_group(other, theirs, wanted, scale, seeds)]
    trainer = group.get("trainer", told.get("trainer"))
    if trainer not in TRAINERS:
        raise UserError(
            f"{path} has trainer {trainer} for group {name}: choose of {', '.join(TRAINERS)}"
        )
    config = CONFIGS / _text(path, at, "config")
    settings = {k: v for part in (whole, own, group) for k, v in _object(path, part, "set").items()}
    measure, then = _then(path, at)
    runs = []
    for seed in range(seeds):
        # The first run has the seed of its configuration.
        given = {**settings, "run.seed": seed} if seed else settings
        folder = (trainer if name == trainer else f"{trainer}-{name}") + f"-seed{seed}" * (seed > 0)
        words = measure if seed else [*measure, *then]
        runs.append(PlannedRun(folder, name, trainer, config, given, tuple(words)))
    return runs


def _then(path: Path, at: dict[str, Any]) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """Give the commands for every run of a group, and those for its first."""
    lines = at.get("measure", [])
    lines = [lines] if isinstance(lines, str) else _list(path, at, "measure")
    measure = [("evaluate", *_words(path, line)) for line in lines]
    then = [_words(path, line) or ("",) for line in _list(path, at, "then")]
    for script, *words in [*measure, *then]:
        if script not in _SCRIPTS:
            raise UserError(f"{path} then runs '{script}': choose of {', '.join(_SCRIPTS)}")
        try:
            parse_options(_SCRIPTS[script].make_parser(), ["RUN", *words])
        except UserError as error:
            raise UserError(f"{path} runs {shlex.join([script, *words])}: {error}") from None
    return measure, then


def _scale(path: Path, told: dict[str, Any], scale: str) -> dict[str, Any]:
    scales = _object(path, told, "scales")
    if scales and scale not in scales:
        raise UserError(f"{path} has no scale {scale}: choose of {', '.join(map(str, scales))}")
    found = _object(path, scales, scale)
    _check_keys(path, f"scales.{scale}", found, _SCALE)
    return found


def _expectation(path: Path, found: Any, groups: Collection[str]) -> Expectation:
    if not isinstance(found, dict):
        raise UserError(f"{path} expects '{found}': give says, lower or higher, of and than")
    _check_keys(path, "expect", found, _EXPECT)
    if ("lower" in found) == ("higher" in found):
        raise UserError(f"{path} expects neither lower nor higher, or both: give one")
    lower = "lower" in found
    measure = _measure(path, found["lower" if lower else "higher"])
    of, than = _text(path, found, "of"), found.get("than")
    for group in (of, than):
        if isinstance(group, str) and group not in groups:
            raise UserError(f"{path} expects something of group {group}, which it does not have")
    if isinstance(than, bool) or not isinstance(than, str | int | float):
        raise UserError(f"{path} expects something than '{than}': name a group or a number")
    return Expectation(_text(path, found, "says"), measure, lower, of, than)


def _measures(path: Path, told: dict[str, Any], key: str) -> list[Measure]:
    return [_measure(path, text) for text in _list(path, told, key)]


def _measure(path: Path, text: object) -> Measure:
    try:
        return read_measure(str(text))
    except ValueError:
        raise UserError(
            f"{path} names the measure '{text}', which is none: see dgm/report/figure_names.py"
        ) from None


def _read(path: Path) -> dict[str, Any]:
    told = read_yaml(path)
    _check_keys(path, "the file", told, _FILE)
    return told


def _check_keys(path: Path, where: str, found: dict[str, Any], known: Iterable[str]) -> None:
    for key in found:
        if key not in known:
            raise UserError(f"{path} has an unknown key {key} in {where}: use {', '.join(known)}")


def _object(path: Path, told: dict[str, Any], key: str) -> dict[str, Any]:
    found = told.get(key)
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise UserError(f"{path} has {key} '{found}': give keys and values")
    return found


def _list(path: Path, told: dict[str, Any], key: str) -> list[Any]:
    found = told.get(key)
    if not isinstance(found, list | None):
        raise UserError(f"{path} has {key} '{found}': give a list")
    return found or []


def _text(path: Path, told: dict[str, Any], key: str) -> str:
    found = told.get(key)
    if not isinstance(found, str) or not found.strip():
        raise UserError(f"{path} has {key} '{found}': give a text")
    return found


def _words(path: Path, line: object) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(line if isinstance(line, str) else ""))
    except ValueError as error:
        raise UserError(f"{path} has '{line}', which is no command ({error}): mend it") from None
