"""Energy from counters that wrap, fail or are missing."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pynvml
import pytest
import torch
from small_loop import job, left_by, train

from dgm.common.run_files import read_metrics
from dgm.training import energy, trainer
from dgm.training.energy import GPU, PACKAGES, EnergyMeter, find_counters, gpu

CPU = torch.device("cpu")
RANGE_UJ = 262_143_328_850
KWH_UJ = 3.6e12


def write(zone: Path, microjoules: int) -> None:
    (zone / "energy_uj").write_text(f"{microjoules}\n")


@pytest.fixture
def powercap(tmp_path: Path) -> Path:
    """Return a powercap folder of a machine with two sockets."""
    root = tmp_path / "powercap"
    names = {
        "intel-rapl": None, "intel-rapl:0": "package-0", "intel-rapl:0:0": "core",
        "intel-rapl:0:1": "dram", "intel-rapl:1": "package-1", "intel-rapl:2": "psys",
        "intel-rapl-mmio:0": "package-0",  # the first socket through another interface
    }  # fmt: skip
    for folder, name in names.items():
        (root / folder).mkdir(parents=True)
        if name:
            (root / folder / "name").write_text(f"{name}\n")
            (root / folder / "max_energy_range_uj").write_text(f"{RANGE_UJ}\n")
            write(root / folder, 1_000_000)
    return root


def test_only_packages_are_counted(powercap: Path):
    meter = EnergyMeter(find_counters(CPU, powercap))
    assert meter.read() == {PACKAGES: 0.0}
    for zone in powercap.iterdir():
        if (zone / "name").exists():
            write(zone, 1_000_000 + 36_000_000)
    assert meter.read() == {PACKAGES: pytest.approx(2 * 36e6 / KWH_UJ)}


def test_a_counter_that_wrapped_adds_its_whole_range(powercap: Path):
    zone = powercap / "intel-rapl:0"
    write(zone, RANGE_UJ - 5_000_000)
    meter = EnergyMeter(find_counters(CPU, powercap))
    write(zone, 2_000_000)
    assert meter.read()[PACKAGES] == pytest.approx(7e6 / KWH_UJ)
    write(zone, 1_000_000)  # once more
    assert meter.read()[PACKAGES] == pytest.approx((7e6 + RANGE_UJ - 1e6) / KWH_UJ)


def test_counters_are_read_before_they_wrap_twice(powercap: Path, monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr(energy.time, "monotonic", lambda: now[0])
    meter, zone = EnergyMeter(find_counters(CPU, powercap)), powercap / "intel-rapl:1"
    half = RANGE_UJ // 2
    for expected in (half, 2 * half, 3 * half, 4 * half):
        now[0] += 61.0
        write(zone, (1_000_000 + expected) % RANGE_UJ)
        meter.read_if_due()
    assert meter.read()[PACKAGES] == pytest.approx(4 * half / KWH_UJ)
    write(zone, 0)
    meter.read_if_due()  # at once: nothing is read
    assert meter.total[PACKAGES] == pytest.approx(4 * half / KWH_UJ)


def test_without_readable_counters_there_is_no_metric(powercap: Path, tmp_path: Path):
    assert EnergyMeter(find_counters(CPU, tmp_path / "none")).read() == {}
    for zone in ("intel-rapl:0", "intel-rapl:1"):
        (powercap / zone / "energy_uj").unlink()  # as for all but root on most machines
    meter = EnergyMeter(find_counters(CPU, powercap))
    assert meter.read() == {} and meter.state() == {}


def test_a_failing_counter_ends_the_metric_but_its_sum_is_kept(powercap: Path):
    meter, zone = EnergyMeter(find_counters(CPU, powercap)), powercap / "intel-rapl:0"
    write(zone, 37_000_000)
    assert meter.read()[PACKAGES] > 0
    (zone / "energy_uj").write_text("")
    assert meter.read() == {} and meter.read() == {}
    assert meter.state() == {"energy_kwh": {PACKAGES: pytest.approx(36e6 / KWH_UJ)}}


def test_a_resumed_run_counts_from_its_checkpoint(
    powercap: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(trainer, "find_counters", lambda device: find_counters(device, powercap))
    zone, train_step = powercap / "intel-rapl:0", trainer.Trainer.train_step

    def spend(run: trainer.Trainer) -> None:
        write(zone, int((zone / "energy_uj").read_text()) + 3_600_000)  # 1e-6 kWh a step
        train_step(run)

    monkeypatch.setattr(trainer.Trainer, "train_step", spend)
    folder = tmp_path / "run"
    assert train(job(folder, total_images=48))
    write(zone, 90_000_000_000)  # by others, in between
    assert train(job(folder))
    lines = read_metrics(folder / "metrics.jsonl")
    assert [line[PACKAGES] for line in lines] == pytest.approx([3e-6, 6e-6, 9e-6, 12e-6])
    assert left_by(folder)[0].state["energy_kwh"] == {PACKAGES: pytest.approx(12e-6)}
    assert not any("energy" in name for name in (folder / "minima.json").read_text().split('"'))


NVML = """
#include <string.h>
static unsigned long long spent = 5000;
int nvmlInitWithFlags(unsigned flags) { return 0; }
int nvmlInit_v2(void) { return 0; }
const char *nvmlErrorString(int code) { return "an error"; }
int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) {
    static int one;
    *device = &one;
    return strcmp(uuid, "GPU-1234") ? 6 : 0;
}
int nvmlDeviceGetTotalEnergyConsumption(void *device, unsigned long long *energy) {
    *energy = spent += 3600;
    return spent > 17000 ? 3 : 0;
}
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_a_gpu_is_read_through_the_library_of_the_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "nvml.c").write_text(NVML)
    library = tmp_path / "libnvml.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "nvml.c"], check=True)

    def load(path: str) -> None:
        monkeypatch.setattr(pynvml, "nvmlLib", ctypes.CDLL(path))
        monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})

    load(str(library))
    counter = gpu("GPU-1234")
    assert counter is not None and counter() == 8.6
    meter = EnergyMeter({GPU: [counter]})  # which reads twice, at 12.2 and 15.8 J
    assert meter.read() == {}  # at 19.4 J it returns an error
    assert gpu("GPU-other") is None
    load("libc.so.6")  # a library without these functions
    assert gpu("GPU-1234") is None


def test_a_counter_that_was_reset_adds_nothing():
    values = iter([100.0, 200.0, 236.0, 10.0, 46.0])
    meter = EnergyMeter({GPU: [lambda: next(values)]})
    assert [meter.read()[GPU] for _ in range(3)] == pytest.approx([1e-5, 1e-5, 2e-5])
