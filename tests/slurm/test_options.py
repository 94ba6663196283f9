"""The command line of slurm.submit: flags, profiles, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from dgm.common.errors import UserError
from slurm.accelerate_env import read_accelerate
from slurm.options import read_options
from slurm.resources import PROFILES, Resources

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "launch" / "train_ddpm.py")


def test_options_override_the_profile(tmp_path: Path) -> None:
    profile = tmp_path / "mine.yaml"
    profile.write_text(
        "partition: gpu\ntime: 12:00:00\nnodes: 4\ngpus_per_node: 8\nmax_parallel: 3\n"
        "setup:\n  - module load cuda\nsbatch: {mail-type: FAIL}\n"
    )
    request = read_options(
        [SCRIPT, "--cluster", str(profile), "--nodes", "2-3", "--dry-run", "--", "--optim.lr", "1"]
    )
    found = request.resources
    assert (found.partition, found.nodes, found.gpus_per_node) == ("gpu", "2-3", 8)
    assert (found.time, found.time_s, found.setup) == ("12:00:00", 43200, ["module load cuda"])
    assert found.processes == 8 and found.node_range == (2, 3)
    assert request.options.dry_run and request.options.max_parallel == 3
    assert request.overrides == ["--optim.lr", "1"]
    options = found.sbatch_options()
    assert options["mail-type"] == "FAIL" and options["time"] == "12:00:00"
    assert options["requeue"] is True and options["signal"] == "B:USR2@120"
    # With ntasks-per-node Slurm would allocate the minimum only.
    assert options["mincpus"] == 8 and "ntasks-per-node" not in options


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("30", 1800), ("10:30", 630), ("4:00:00", 14400), ("2-00", 172800), ("1-02:30", 95400)],
)
def test_time_limits_are_in_slurms_notation(time: str, seconds: int) -> None:
    assert Resources(time=time).time_s == seconds


def test_included_profiles_can_be_read() -> None:
    for path in PROFILES.glob("*.yaml"):
        read_options([SCRIPT, "--cluster", path.stem])


def test_engine_is_read_from_accelerates_configuration() -> None:
    engines = ROOT / "launch" / "configs" / "accelerate"
    assert "ACCELERATE_USE_DEEPSPEED" not in read_accelerate(engines / "ddp.yaml")
    found = read_accelerate(engines / "zero3_offload.yaml")
    assert found["ACCELERATE_USE_DEEPSPEED"] == "true"
    assert found["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "3"
    assert found["ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE"] == "cpu"


def test_an_unsupported_engine_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "accelerate.yaml"
    path.write_text("distributed_type: FSDP\n")
    with pytest.raises(UserError, match=r"accelerate\.yaml has distributed_type FSDP"):
        read_accelerate(path)
