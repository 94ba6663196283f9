"""Run folders and folders of sweeps, read while they may still be written to."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from statistics import median
from typing import Any, TypeGuard

from dgm.common.errors import UserError, check_readable
from dgm.common.json_files import as_object, read_object
from dgm.common.run_files import newest_saved, read_config, read_lines

LOGGED = ("train/", "eval/", "time/", "memory/", "energy/")
ENERGY = {
    "energy/gpu_kwh": "GPU of the first process",
    "energy/packages_kwh": "processor packages of its machine",
}
"""Metrics of the energy used since the run began, and what each covers."""
SPREAD = "spread_over_seeds"
"""Key of evaluation.json: standard deviations over seeds, by metric."""
_MAX_VALUE = 1e100  # larger ones are damage, and arithmetic with them overflows
_ACTIVE_S = 120.0  # a run that wrote less than this ago is taken to be training
_JOBS = "slurm"  # folder of the jobs, in a run folder or a sweep's folder
_ERROR = re.compile(r"(error: .*|\w*(Error|Exception|Interrupt)\b.*|srun: error: .*)")


@dataclass(frozen=True)
class Curve:
    """A metric over images seen; finite values only."""

    seen: list[float]
    values: list[float]

    def best(self, higher: bool | None = False) -> tuple[float, float]:
        """Return the minimum, or if `higher` the maximum, and the images seen where it is first."""
        value = max(self.values) if higher else min(self.values)
        return value, self.seen[self.values.index(value)]


@dataclass(frozen=True)
class Run:
    """The content of a run folder."""

    folder: Path
    name: str
    family: str
    config: dict[str, Any]  # flat
    defaults: dict[str, Any]  # the family's, flat
    lines: list[dict[str, Any]]  # of metrics.jsonl
    saved: int | None  # images seen at the newest checkpoint
    state: str
    environment: dict[str, Any] = field(default_factory=dict)
    starts: list[dict[str, Any]] = field(default_factory=list)
    evaluation: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # on files that could not be read

    @property
    def images_seen(self) -> int:
        """Images seen by the last log or the newest checkpoint, whichever is later."""
        logged = self.lines[-1]["images_seen"] if self.lines else 0
        return max(logged, self.saved or 0)

    @property
    def total_images(self) -> int | None:
        """Images after which training ends."""
        total = self.config.get("train.total_images")
        return total if isinstance(total, int) else None

    @property
    def keys(self) -> list[str]:
        """Metrics with a finite value, in the order of the log."""
        found: dict[str, None] = {}
        for line in self.lines:
            new = (k for k in line if k not in found and k.startswith(LOGGED))
            found.update({key: None for key in new if _finite(line[key])})
        return list(found)

    @property
    def losses(self) -> list[str]:
        """Keys of the losses that are minimized, one for each phase."""
        return [key for key in self.keys if key.startswith("train/") and key.endswith("/loss")]

    def curve(self, key: str) -> Curve:
        """Return a metric over images seen."""
        points = [(x["images_seen"], x[key]) for x in self.lines if _finite(x.get(key))]
        return Curve([seen for seen, _ in points], [value for _, value in points])

    def median(self, key: str) -> float | None:
        """Return the median of a metric over all logs; None if it was not logged."""
        values = self.curve(key).values
        return median(values) if values else None

    def wall_s(self) -> float | None:
        """Return the seconds from the start to the last log, pauses included."""
        wall = self.lines[-1].get("wall_s") if self.lines else None
        return wall if _finite(wall) else None

    def energy_kwh(self, key: str) -> float | None:
        """Return the energy used until the last log that has `key`; None if no log has it."""
        values = self.curve(key).values
        return values[-1] if values else None

    def spent_s(self) -> dict[str, float]:
        """Return seconds of waiting (`data_wait`) and of each pause: `save`, `sample`, `eval`."""
        keys = [k for k in self.keys if k.startswith("time/") and k.endswith("_s")]
        return {
            key.removeprefix("time/").removesuffix("_s"): sum(self.curve(key).values)
            for key in keys
            if not key.endswith("_per_s")
        }

    def results(self) -> dict[str, float]:
        """Return the metrics of `evaluation.json` by `name/part`, without those by class."""
        return dict(flatten_metrics(self.evaluation))


def read_run(folder: Path, name: str, family: str, defaults: dict[str, Any]) -> Run:
    """Read a run folder; raise UserError naming a file that is damaged."""
    notes: list[str] = []
    config = _without_unread_source(read_config(folder / "config.yaml"))
    lines = read_log(folder / "metrics.jsonl")
    saved = newest_saved(folder)
    return Run(
        folder=folder,
        name=name,
        family=family,
        config=config,
        defaults=defaults,
        lines=lines,
        saved=saved,
        state=_state(folder, config.get("train.total_images"), lines, saved),
        environment=_read_json(folder / "environment.json", notes),
        starts=read_lines(folder / "starts.jsonl"),
        evaluation=_read_json(folder / "evaluation.json", notes),
        notes=tuple(notes),
    )


def _without_unread_source(config: dict[str, Any]) -> dict[str, Any]:
    """Return the config without `data.source` if the shards were not built from it."""
    source, shards = config.get("data.source"), config.get("data.shards")
    if not isinstance(shards, str):
        return config
    kind, _, path = str(source).partition(":")
    if PurePath(shards).name.startswith(f"{kind}-{PurePath(path).name}-" if path else kind):
        return config
    return {key: value for key, value in config.items() if key != "data.source"}


def state_of(folder: Path) -> str:
    """Return whether a run is finished, stopped, or still being written."""
    total = read_config(folder / "config.yaml").get("train.total_images")
    return _state(folder, total, read_log(folder / "metrics.jsonl"), newest_saved(folder))


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read `metrics.jsonl`, without a last line that is cut off because it is being written.

    Raise UserError naming any other line that is damaged.
    """
    check_readable(path)
    if not path.exists():
        return []
    try:
        texts = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): restore it") from None
    lines = []
    for number, text in enumerate(texts, 1):
        line = as_object(text)
        if line is not None and _finite(line.get("images_seen")):
            lines.append(line)
        elif number < len(texts):
            raise UserError(
                f"{path} is damaged in line {number} (no JSON object with images_seen): "
                "repair or remove that line"
            )
    return lines


def flatten_metrics(found: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """Return the numbers of nested dictionaries by `name/part`, without those by class or seed."""
    metrics = []
    for name, value in found.items():
        if isinstance(value, dict) and not is_detail(name):
            metrics += flatten_metrics(value, f"{prefix}{name}/")
        elif _finite(value):
            metrics.append((prefix + name, value))
    return metrics


def is_detail(name: str) -> bool:
    """Return whether a dictionary splits a metric by class or quartile, or is its spread."""
    return name.endswith(("_by_class", "_by_quartile")) or name == SPREAD


def _state(folder: Path, total: Any, lines: list[dict[str, Any]], saved: int | None) -> str:
    if saved is not None and isinstance(total, int) and saved >= total:
        return "finished"
    log = folder / "metrics.jsonl"
    age = time.time() - (log if log.exists() else folder / "config.yaml").stat().st_mtime
    walls = [wall for line in lines[-2:] if _finite(wall := line.get("wall_s"))]
    active = max(_ACTIVE_S, 3 * (walls[-1] - walls[0])) if walls else _ACTIVE_S
    state = "still being written" if age < active else "stopped"
    return state if saved is not None else f"{state}, no checkpoint yet"


def _read_json(path: Path, notes: list[str]) -> dict[str, Any]:
    check_readable(path)
    if not path.exists():
        return {}
    found = read_object(path)
    if found is None:
        notes.append(f"{path.name} is left out: it cannot be read as a JSON object.")
    return found or {}


def _finite(value: object) -> TypeGuard[float]:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) < _MAX_VALUE  # type: ignore[arg-type]


@dataclass(frozen=True)
class Failure:
    """A run that failed, or has no checkpoint to continue from."""

    name: str
    reason: str
    error: str = ""  # the last one in its log


def sweep_folders(folder: Path) -> list[Path]:
    """Return the run folders of a sweep, including those that failed before they held anything."""
    known = ("config.yaml", f"{_JOBS}/job.json", f"{_JOBS}/history.jsonl")
    inside = sorted(p for p in folder.iterdir() if p.is_dir() and p.name != _JOBS)
    return [p for p in inside if any((p / name).is_file() for name in known)]


def find_failure(folder: Path, name: str) -> Failure | None:
    """Return how a run of a sweep failed; None if it did not."""
    history = read_lines(folder / _JOBS / "history.jsonl")
    last = history[-1] if history else {}
    saved = newest_saved(folder)
    if last.get("event") == "end" and last.get("verdict") in ("fault", "mistake"):
        reason = f"{last['verdict']}, exit code {last.get('code')}, then {last.get('next')}"
    elif not (folder / "config.yaml").is_file():
        reason = "training never began"
    elif saved is None:
        reason = "no checkpoint"
    else:
        return None
    if saved is not None:
        reason += f", after a checkpoint at {saved:,} images"
    starts = sum(line.get("event") == "start" for line in history)
    if starts:
        reason += f", {starts} start{'s' * (starts > 1)}"
    return Failure(name, reason, _last_error(folder / _JOBS / "log.txt"))


def _last_error(log: Path) -> str:
    try:
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - 100_000))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if _ERROR.match(line)), "")
