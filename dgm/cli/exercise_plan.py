"""Exercise files: the runs that answer a question, the hypotheses, and the content of the page.

title, question   of the page
trainer           ddpm, gan, vae or flow
groups            by name: `set` (keys of the trainer), or `like: FILE` and `group` for a group of
                  another file; optionally its own `trainer` and `scales`
scales            by name: `config` (in launch/configs), `set`, `seeds` (runs of each group),
                  `measure` (options of launch/evaluate.py), `post` (for the first run of each
                  group: a script of launch/ with its options)
expect            `hypothesis` (text), `lower` or `higher` (a metric), `of` (a group), `baseline`
                  (a group, or a number)
compare, rank_by  metrics of groups to list, and those by which the best group is chosen
min, show         whether to list the minimum of each loss; pictures to show
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dgm.cli import denoise, evaluate, explore, sample
from dgm.cli.parser import CONFIGS, TRAINERS, parse_options
from dgm.common.errors import UserError
from dgm.common.yaml_io import read_yaml
from dgm.report.exercise import PICTURES, Exercise
from dgm.report.hypothesis_check import Hypothesis, RunMetric, parse_metric

FOLDER = CONFIGS / "exercises"
_SCRIPTS = {"evaluate": evaluate, "sample": sample, "denoise": denoise, "explore": explore}

_FILE = (
    "title", "question", "trainer", "groups", "scales", "expect", "compare", "rank_by", "min",
    "show",
)  # fmt: skip
_GROUP = ("trainer", "set", "scales", "like", "group")
_SCALE = ("config", "set", "seeds", "measure", "post", "like", "group")
_EXPECT = ("hypothesis", "lower", "higher", "of", "baseline")


@dataclass(frozen=True)
class PlannedRun:
    """A run of an exercise: its training, and the commands after it."""

    name: str
    group: str
    trainer: str
    config: Path
    settings: dict[str, Any]
    commands: tuple[tuple[str, ...], ...]  # a script's name and its options


@dataclass(frozen=True)
class Plan:
    """An exercise, and its runs at one scale."""

    name: str
    exercise: Exercise
    runs: list[PlannedRun]


def names_of_exercises(folder: Path = FOLDER) -> list[str]:
    """Return the names of the exercises in a folder."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def read_plan(path: Path, scale: str) -> Plan:
    """Read an exercise at a scale; raise UserError with the file and the mistake."""
    content = _read(path)
    groups = _get(path, content, "groups", dict)
    if not groups:
        raise UserError(f"{path} has no groups: name at least one")
    runs = [run for name in groups for run in _plan_group(path, content, name, scale)]
    exercise = Exercise(
        title=_text(path, content, "title"),
        question=_text(path, content, "question"),
        hypotheses=[
            _hypothesis(path, entry, groups) for entry in _get(path, content, "expect", list)
        ],
        compare=[_metric(path, text) for text in _get(path, content, "compare", list)],
        rank_by=[_metric(path, text) for text in _get(path, content, "rank_by", list)],
        min_losses=bool(content.get("min", False)),
        show=_get(path, content, "show", list),
    )
    for kind in exercise.show:
        if kind not in PICTURES:
            raise UserError(f"{path} shows '{kind}': choose from {', '.join(PICTURES)}")
    return Plan(path.stem, exercise, runs)


def _plan_group(
    path: Path, content: dict[str, Any], name: str, scale: str, num_seeds: int | None = None
) -> list[PlannedRun]:
    """Return the runs of a group; `num_seeds` is given by another file that refers to the group."""
    group = _get(path, content["groups"], name, dict)
    _check_keys(path, f"groups.{name}", group, _GROUP)
    common, own = _scale(path, content, scale), _scale(path, group, scale)
    at = {**common, **own}
    seeds = num_seeds or at.get("seeds", 1)
    if isinstance(seeds, bool) or not isinstance(seeds, int) or seeds < 1:
        raise UserError(f"{path} has seeds {seeds} at scale {scale}: give 1 or more")
    taken = {**group, **own}
    if "like" in taken:
        other = path.parent / _text(path, taken, "like")
        source, source_name = _read(other), _text(path, taken, "group")
        if source_name not in _get(other, source, "groups", dict):
            raise UserError(
                f"{path} takes group {source_name} from {other.name}, which has none of this name"
            )
        if num_seeds is not None:  # two files could refer to each other endlessly
            raise UserError(
                f"{path} itself takes group {name} from {other.name}: take it from there"
            )
        planned = _plan_group(other, source, source_name, scale, seeds)
        return [replace(run, group=name) for run in planned]
    trainer = group.get("trainer", content.get("trainer"))
    if trainer not in TRAINERS.values():
        known = ", ".join(TRAINERS.values())
        raise UserError(f"{path} has trainer {trainer} for group {name}: choose from {known}")
    config = CONFIGS / _text(path, at, "config")
    settings = {
        k: v for part in (common, own, group) for k, v in _get(path, part, "set", dict).items()
    }
    for_all, for_first = _commands(path, at)
    runs = []
    for seed in range(seeds):
        # The first run has the seed of its configuration.
        keys = {**settings, "run.seed": seed} if seed else settings
        folder = (trainer if name == trainer else f"{trainer}-{name}") + f"-seed{seed}" * (seed > 0)
        commands = for_all if seed else [*for_all, *for_first]
        runs.append(PlannedRun(folder, name, trainer, config, keys, tuple(commands)))
    return runs


def _commands(
    path: Path, at: dict[str, Any]
) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """Return the commands for every run of a group, and those for its first."""
    lines = at.get("measure", [])
    lines = [lines] if isinstance(lines, str) else _get(path, at, "measure", list)
    measure = [("evaluate", *_words(path, line)) for line in lines]
    post = [_words(path, line) or ("",) for line in _get(path, at, "post", list)]
    for script, *words in [*measure, *post]:
        if script not in _SCRIPTS:
            raise UserError(f"{path} runs '{script}': choose from {', '.join(_SCRIPTS)}")
        try:
            parse_options(_SCRIPTS[script].make_parser(), ["RUN", *words])
        except UserError as error:
            raise UserError(f"{path} runs {shlex.join([script, *words])}: {error}") from None
    return measure, post


def _scale(path: Path, content: dict[str, Any], scale: str) -> dict[str, Any]:
    scales = _get(path, content, "scales", dict)
    if scales and scale not in scales:
        raise UserError(f"{path} has no scale {scale}: choose from {', '.join(map(str, scales))}")
    found = _get(path, scales, scale, dict)
    _check_keys(path, f"scales.{scale}", found, _SCALE)
    return found


def _hypothesis(path: Path, entry: Any, groups: Collection[str]) -> Hypothesis:
    if not isinstance(entry, dict):
        raise UserError(
            f"{path} expects '{entry}': give hypothesis, lower or higher, of and baseline"
        )
    _check_keys(path, "expect", entry, _EXPECT)
    if ("lower" in entry) == ("higher" in entry):
        raise UserError(f"{path} expects neither lower nor higher, or both: give one")
    lower = "lower" in entry
    metric = _metric(path, entry["lower" if lower else "higher"])
    of, baseline = _text(path, entry, "of"), entry.get("baseline")
    for group in (of, baseline):
        if isinstance(group, str) and group not in groups:
            raise UserError(f"{path} has a hypothesis on group {group}, which it does not define")
    if isinstance(baseline, bool) or not isinstance(baseline, str | int | float):
        raise UserError(f"{path} has baseline '{baseline}': name a group or a number")
    return Hypothesis(_text(path, entry, "hypothesis"), metric, lower, of, baseline)


def _metric(path: Path, text: object) -> RunMetric:
    try:
        return parse_metric(str(text))
    except ValueError:
        raise UserError(
            f"{path} names the metric '{text}', which is unknown: see "
            "dgm/report/hypothesis_check.py"
        ) from None


def _read(path: Path) -> dict[str, Any]:
    content = read_yaml(path)
    _check_keys(path, "the file", content, _FILE)
    return content


def _check_keys(path: Path, where: str, found: dict[str, Any], known: Iterable[str]) -> None:
    for key in found:
        if key not in known:
            raise UserError(f"{path} has an unknown key {key} in {where}: use {', '.join(known)}")


def _get(path: Path, parent: dict[str, Any], key: str, kind: type) -> Any:
    """Return a mapping or a list, an empty one where the key is missing."""
    found = parent.get(key)
    if found is None:
        return kind()
    if not isinstance(found, kind):
        expected = "keys and values" if kind is dict else "a list"
        raise UserError(f"{path} has {key} '{found}': give {expected}")
    return found


def _text(path: Path, parent: dict[str, Any], key: str) -> str:
    found = parent.get(key)
    if not isinstance(found, str) or not found.strip():
        raise UserError(f"{path} has {key} '{found}': give text")
    return found


def _words(path: Path, line: object) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(line if isinstance(line, str) else ""))
    except ValueError as error:
        raise UserError(
            f"{path} has '{line}', which is not a command ({error}): correct it"
        ) from None
