"""Metrics during training: means between logs, `metrics.jsonl`, throughput, the progress bar."""

from __future__ import annotations

import contextlib
import json
import math
import resource
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dgm.common.atomic_io import append, write_whole
from dgm.common.metric_registry import higher_is_better
from dgm.common.run_files import scan_metrics
from dgm.training.engine import Engine
from dgm.training.watchdog import Watchdog

Item = TypeVar("Item")

_LINE_EVERY_S = 10.0  # progress is printed in lines where there is no terminal
_PRINT_AFTER_S = 2.0  # longer interruptions of training are printed


class Meter:
    """Sums named values on the device between logs, in float64, without making the host wait."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, names: Sequence[str], values: Tensor) -> None:
        """Add one value for each name; values: [len(names)]."""
        values = values.detach().double()
        for name in names:
            if name not in self.sums:
                self.sums[name], self.counts[name] = values.new_zeros(()), 0
            self.counts[name] += 1
        # One kernel launch for all.
        torch._foreach_add_([self.sums[name] for name in names], list(values.unbind()))

    def means(self, engine: Engine) -> dict[str, float]:
        """Return means over steps and processes, and reset. Collective."""
        if not self.sums:
            return {}
        names = list(self.sums)
        own = torch.stack([self.sums[n] / self.counts[n] for n in names])
        means = engine.gather(own[None]).mean(0).tolist()
        self.sums, self.counts = {}, {}
        return dict(zip(names, means, strict=True))

    def state(self, engine: Engine) -> dict[str, object]:
        """Return the sums so far, of each process, for a checkpoint. Collective."""
        names = list(self.sums)
        rows: list[list[float]] = []
        if names:
            rows = engine.gather(torch.stack(list(self.sums.values()))[None]).tolist()
        return {"names": names, "sums": rows, "counts": [self.counts[n] for n in names]}

    def restore(self, state: Mapping[str, list], engine: Engine) -> None:
        """Continue from a checkpoint; with another number of processes each gets the mean."""
        rows = state["sums"]
        if not rows:
            return
        sums = rows[engine.rank] if len(rows) == engine.world_size else np.mean(rows, 0).tolist()
        for name, value, count in zip(state["names"], sums, state["counts"], strict=True):
            self.sums[name] = torch.tensor(value, dtype=torch.float64, device=engine.device)
            self.counts[name] = count


class MetricsFile:
    """`metrics.jsonl`: one JSON object per log, no step twice; and `minima.json`."""

    def __init__(self, path: Path, images_seen: int):
        """Open; drop damaged lines, and those after `images_seen`, which will be written again."""
        self.path = path
        lines, damaged = scan_metrics(path)
        if damaged:
            numbers = ", ".join(map(str, damaged[:10])) + (", ..." if len(damaged) > 10 else "")
            warnings.warn(
                f"{path} is damaged in {len(damaged)} of its lines, which are dropped: {numbers}",
                stacklevel=2,
            )
        kept = [line for line in lines if line["images_seen"] <= images_seen]
        write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))
        self.best: dict[str, dict[str, Any]] = {}  # minimum or maximum, by metric
        for line in kept:
            self._improve(line)
        if self.best:
            self._write_best()
        self.file = open(path, "ab", buffering=0)  # noqa: SIM115 - held for the whole run

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one object; update the best values."""
        append(self.file, json.dumps(line))
        if self._improve(line):
            self._write_best()

    def _improve(self, line: Mapping[str, Any]) -> bool:
        better = {}
        for name, value in line.items():
            higher = higher_is_better(name) if name.startswith(("train/", "eval/")) else None
            if higher is None or not math.isfinite(value):
                continue
            before = self.best.get(name)
            if before and not (value > before["value"] if higher else value < before["value"]):
                continue
            best = "max" if higher else "min"
            better[name] = {"value": value, "images_seen": line["images_seen"], "best": best}
        self.best.update(better)
        return bool(better)

    def _write_best(self) -> None:
        write_whole(self.path.with_name("minima.json"), json.dumps(self.best, indent=1) + "\n")


class Clock:
    """Measures images/s between logs, of training and waiting for data but not pauses."""

    def __init__(self, images_seen: int, watchdog: Watchdog):
        """Start an interval; report activities to the watchdog."""
        self.watchdog = watchdog
        self.start(images_seen)

    def start(self, images_seen: int) -> None:
        """Start a new interval."""
        self.began, self.images_seen = time.monotonic(), images_seen
        self.spent_s = {"data": 0.0}  # waiting for data, and in each pause

    def elapsed_s(self) -> float:
        """Return the seconds since the start of the interval, pauses included."""
        return time.monotonic() - self.began

    @contextlib.contextmanager
    def during(self, name: Literal["data", "save", "sample", "eval"]) -> Iterator[None]:
        """Count a block's time as waiting for data, or as a pause; images/s exclude pauses only."""
        self.watchdog.set_activity(name)
        began = time.monotonic()
        yield
        self.watchdog.set_activity("step")
        self.spent_s[name] = self.spent_s.get(name, 0.0) + time.monotonic() - began

    def timed(self, items: Iterator[Item]) -> Iterator[Item]:
        """Yield items; waiting for each counts as waiting for data."""
        while True:
            with self.during("data"):
                item = next(items, None)
            if item is None:
                return
            yield item

    def read(self, images_seen: int) -> dict[str, float]:
        """Return images/s, and the seconds of waiting and of each pause, in the interval."""
        pauses_s = {name: took for name, took in self.spent_s.items() if name != "data"}
        trained_s = self.elapsed_s() - sum(pauses_s.values())
        return {
            "time/images_per_s": round((images_seen - self.images_seen) / trained_s, 2),
            "time/data_wait_s": round(self.spent_s["data"], 4),
            **{f"time/{name}_s": round(took, 3) for name, took in pauses_s.items()},
        }


class ProgressBar:
    """Shows images, loss, images/s and time left: a bar on a terminal, lines elsewhere."""

    def __init__(self, total: int, start: int, shown: bool):
        """Start at `start` of `total` images; display only if `shown`."""
        self.total, self.shown = total, shown
        self.last, self.last_images = time.monotonic(), start
        self.text, self.is_first = "", True
        bar = shown and sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=start, unit="img", unit_scale=True) if bar else None

    def set_losses(self, losses: Mapping[str, float]) -> None:
        """Set the losses to show, by name."""
        self.text = "  ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
        if self.bar:
            self.bar.set_postfix_str(self.text)

    def advance(self, images_seen: int) -> None:
        """Move to `images_seen`."""
        if self.bar:
            self.bar.update(images_seen - self.bar.n)
        elif self.shown and self.is_first:
            # The first step compiles: leave it out of the speed.
            self.last, self.last_images, self.is_first = time.monotonic(), images_seen, False
        elif self.shown and time.monotonic() - self.last >= _LINE_EVERY_S:
            self._line(images_seen)

    def _line(self, images_seen: int) -> None:
        now = time.monotonic()
        speed = (images_seen - self.last_images) / (now - self.last)
        self.last, self.last_images = now, images_seen
        left = (self.total - images_seen) / speed
        time_left = f"{left // 60:.0f}:{left % 60:02.0f} left"
        done = f"{images_seen:,}/{self.total:,} images  {self.text}  {speed:.0f} images/s"
        print(f"{done}  {time_left}", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def during(self, what: str) -> Iterator[None]:
        """Show an interruption of training: on the bar, or afterwards if it took long."""
        began = time.monotonic()
        if self.bar:
            self.bar.set_description_str(what)
        yield
        took = time.monotonic() - began
        self.last += took  # does not count for images/s
        if self.bar:
            self.bar.set_description_str("")
        elif self.shown and took > _PRINT_AFTER_S:
            print(f"{what}: {took:.0f} s", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Close the bar, leaving its last state on the screen."""
        if self.bar:
            self.bar.close()


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory of the GPU, or of this process on a CPU, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    with contextlib.suppress(OSError, IndexError):  # /proc is Linux only
        # Not ru_maxrss, which starts at the peak of the parent process.
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.partition("VmHWM:")[2].split()[0]) / 2**20
    in_bytes = sys.platform == "darwin"
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if in_bytes else 2**20)


def make_profiler(folder: Path, steps: int) -> Any:
    """Return a profiler of `steps` steps after the first two; for 0 a null context."""
    if steps <= 0:
        return contextlib.nullcontext()
    return torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=1, warmup=1, active=steps, repeat=1),
        on_trace_ready=torch.profiler.tensorboard_trace_handler(str(folder)),
    )
