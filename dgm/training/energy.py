"""Energy of a run, from the counters of the GPU (NVML) and of the processor packages (RAPL)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pynvml
import torch

GPU, PACKAGES = "energy/gpu_kwh", "energy/packages_kwh"
POWERCAP = Path("/sys/class/powercap")
_JOULES_PER_KWH = 3.6e6
_READ_EVERY_S = 60.0  # a package's counter wraps within minutes at full power

Counter = Callable[[], float]
"""Returns joules since an arbitrary time; raises OSError if it cannot be read."""


class EnergyMeter:
    """Sums the energy spent since `start`, in kWh by metric, from the counters that can be read."""

    def __init__(self, counters: Mapping[str, list[Counter]]):
        """Start with those of each metric's counters that can be read."""
        readable = {
            name: [counter for counter in own if _read(counter) is not None]
            for name, own in counters.items()
        }
        self.counters = {name: own for name, own in readable.items() if own}
        self.start({})

    def start(self, before: Mapping[str, float]) -> None:
        """Count from now on; `before` is the energy spent so far."""
        self.total = dict(before)
        self.last = {name: [_read(c) for c in own] for name, own in self.counters.items()}
        self.read_at = time.monotonic()

    def read_if_due(self) -> None:
        """Read the counters often enough that none wraps unnoticed."""
        if time.monotonic() - self.read_at > _READ_EVERY_S:
            self.read()

    def read(self) -> dict[str, float]:
        """Return the kWh spent so far by metric; drop metrics with a failing counter."""
        self.read_at = time.monotonic()
        for name, counters in list(self.counters.items()):
            now = [_read(counter) for counter in counters]
            pairs = zip(self.last[name], now, strict=True)
            spent = [b - a for a, b in pairs if a is not None and b is not None]
            if len(spent) < len(counters):
                del self.counters[name]
                continue
            # A counter that decreased was reset, as by a new driver.
            joules = sum(max(0.0, s) for s in spent)
            self.total[name] = self.total.get(name, 0.0) + joules / _JOULES_PER_KWH
            self.last[name] = now
        return {name: self.total[name] for name in self.counters}

    def state(self) -> dict[str, dict[str, float]]:
        """Return the state for a checkpoint; empty if nothing was ever read."""
        self.read()
        return {"energy_kwh": self.total} if self.total else {}


def find_counters(device: torch.device, powercap: Path = POWERCAP) -> dict[str, list[Counter]]:
    """Return the counters of a process's GPU, if any, and of the machine's packages."""
    found: dict[str, list[Counter]] = {PACKAGES: packages(powercap)}
    if device.type == "cuda":
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        counter = gpu(uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}")
        found[GPU] = [] if counter is None else [counter]
    return found


class Package:
    """The energy of an Intel or AMD processor package (Linux, powercap/powercap.rst)."""

    def __init__(self, folder: Path):
        """Take a zone like intel-rapl:0; its counter wraps at `max_energy_range_uj`."""
        self.folder, self.wrapped, self.last = folder, 0, 0

    def __call__(self) -> float:
        """Return joules."""
        now = int((self.folder / "energy_uj").read_text(encoding="utf-8"))
        if now < self.last:
            self.wrapped += int((self.folder / "max_energy_range_uj").read_text(encoding="utf-8"))
        self.last = now
        return (self.wrapped + now) / 1e6


def packages(powercap: Path) -> list[Counter]:
    """Return a counter for each processor package, not for zones within (core, dram) or psys."""
    zones = sorted(powercap.glob("intel-rapl:*"))  # AMD's have this name too
    return [Package(zone) for zone in zones if _name(zone).startswith("package")]


def _name(zone: Path) -> str:
    try:
        return (zone / "name").read_text(encoding="utf-8")
    except OSError:
        return ""


def gpu(uuid: str) -> Counter | None:
    """Return NVML's energy counter of a GPU, which starts with the driver; None without one."""
    try:
        pynvml.nvmlInit()
        device = pynvml.nvmlDeviceGetHandleByUUID(uuid)
    except pynvml.NVMLError:  # no driver, or a device that it does not know
        return None

    def read() -> float:
        try:
            return pynvml.nvmlDeviceGetTotalEnergyConsumption(device) / 1e3  # from millijoules
        except pynvml.NVMLError as error:
            raise OSError(f"NVML: {error}") from error

    return read


def _read(counter: Counter) -> float | None:
    try:
        return counter()
    except (OSError, ValueError):
        return None
