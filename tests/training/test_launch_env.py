"""The engine that the launcher's variables request, and what is refused."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from optional import need
from torch import nn

from dgm.common.errors import UserError
from dgm.training.engine import Engine
from dgm.training.job import TrainConfig, check_config, compile_mode
from dgm.training.launch_env import Launch, ZeroConfig, count_nodes, on_gpu, read_launch
from dgm.training.model_summary import weight_copies
from dgm.training.optimizer import OptimConfig
from dgm.training.zero import import_deepspeed

ROOT = Path(__file__).resolve().parents[2]
ENGINES = sorted((ROOT / "launch" / "configs" / "accelerate").glob("*.yaml"))
STAGE = "ACCELERATE_DEEPSPEED_ZERO_STAGE"
OPTIMIZER = "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE"
WEIGHTS = "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE"
TORCH = ("MASTER_ADDR", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that sets a launcher's variables; all others are unset."""
    for name in os.environ:
        if name.startswith(("ACCELERATE_", "PMI_")) or name in TORCH:
            monkeypatch.delenv(name)

    def set_variables(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_variables


def under_zero(stage: str = "2", **more: str) -> dict[str, str]:
    return {"ACCELERATE_USE_DEEPSPEED": "true", STAGE: stage, **more}


@pytest.mark.parametrize(
    ("variables", "expected", "name"),
    [
        ({}, Launch(1, None), "one process"),
        ({"WORLD_SIZE": "1"}, Launch(1, None), "one process"),
        ({"WORLD_SIZE": "4"}, Launch(4, None), "DDP on 4 processes"),
        ({"ACCELERATE_USE_DEEPSPEED": "false"}, Launch(1, None), "one process"),
        (under_zero("0"), Launch(1, ZeroConfig(0)), "DeepSpeed ZeRO-0 on 1 process"),
        (
            {**under_zero("1", WORLD_SIZE="2"), OPTIMIZER: "none", WEIGHTS: "none"},
            Launch(2, ZeroConfig(1)),
            "DeepSpeed ZeRO-1 on 2 processes",
        ),
        (
            {**under_zero("3", WORLD_SIZE="2"), OPTIMIZER: "cpu", WEIGHTS: "cpu"},
            Launch(2, ZeroConfig(3, True, True)),
            "DeepSpeed ZeRO-3, optimizer and weights on the CPU on 2 processes",
        ),
    ],
)
def test_the_requested_engine_is_read(
    launch: Callable, variables: dict[str, str], expected: Launch, name: str
) -> None:
    launch(ACCELERATE_MIXED_PRECISION="no", ACCELERATE_DYNAMO_BACKEND="NO", **variables)
    assert read_launch("bf16") == expected
    assert str(expected) == name


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "True"}, "--multi_gpu"),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP.*choose distributed_type"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM.*choose distributed_type"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "fp16.*the run has no.*train.mixed_precision"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "train.compile"),
        (under_zero(ACCELERATE_GRADIENT_CLIPPING="0.5"), "optim.clip_norm"),
        (under_zero(ACCELERATE_GRADIENT_ACCUMULATION_STEPS="4"), "train.micro_batch"),
        (under_zero(ACCELERATE_DEEPSPEED_CONFIG_FILE="ds.json"), "ds.json.*zero_stage"),
        (under_zero("4"), "zero_stage is 4: choose 0, 1, 2 or 3"),
        (under_zero("2", **{WEIGHTS: "cpu"}), "ZeRO-2, weights on the CPU.*in stage 3"),
        (under_zero("0", **{OPTIMIZER: "cpu"}), "ZeRO-0, optimizer on the CPU.*in stages 1 to 3"),
        (under_zero("3", **{OPTIMIZER: "nvme"}), "offload_optimizer_device is nvme: choose"),
    ],
)
def test_unsupported_requests_are_refused(
    launch: Callable, variables: dict[str, str], message: str
) -> None:
    launch(**variables)
    with pytest.raises(UserError, match=message) as caught:
        Engine("no")
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "option", "message"),
    [
        (2, "--gradient-accumulation-steps=4", "gradient_accumulation_steps 4: leave it to train."),
        (1, "--gradient_clipping 0.5", "gradient_clipping 0.5: leave it to optim.clip_norm"),
        (1, "--gradient_accumulation_steps 1", None),
    ],
)
def test_options_that_accelerate_drops_without_deepspeed_are_refused(
    run_script: Callable, processes: int, option: str, message: str | None
) -> None:
    words = ["-m", "accelerate.commands.launch", "--num_processes", processes, *option.split()]
    words += ["--multi_gpu", "--main_process_port", "0"] if processes > 1 else []
    # Reading the run folder, which does not exist, comes after the check.
    done = run_script(*words, ROOT / "launch" / "sample.py", "nowhere")
    error = f"accelerate launch requests {message}" if message else "nowhere is not a run folder"
    assert done.code != 0 and done.stderr.count(f"error: {error}") == 1, done.stderr


def test_missing_deepspeed_is_reported(launch: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    launch(**under_zero())
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match=r"DeepSpeed.*pip install deepspeed, or choose"):
        Engine("no")


def test_deepspeed_is_imported_quietly_and_compiles_no_operator_for_inference() -> None:
    need("deepspeed")
    assert import_deepspeed().ops.__compatible_ops__["deepspeed_shm_comm"] is False
    assert logging.getLogger("DeepSpeed").level == logging.ERROR


def test_an_engine_other_than_the_requested_one_is_refused(launch: Callable) -> None:
    Engine("no")  # accelerate keeps its first state, one process
    launch(WORLD_SIZE="2", RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    engine = Engine("no")
    with pytest.raises(UserError, match="requests DDP on 2 processes, but there is one process on"):
        engine.prepare({"net": nn.Linear(2, 2)}, {"net": OptimConfig()})


@pytest.mark.parametrize(
    ("launched", "copies"),
    [
        (Launch(1, None), 5),
        (Launch(4, None), 5),
        (Launch(4, ZeroConfig(0)), 5),
        (Launch(4, ZeroConfig(1)), 3.75),
        (Launch(4, ZeroConfig(2)), 3),
        (Launch(4, ZeroConfig(2, True)), 2.25),
        (Launch(4, ZeroConfig(3)), 2.25),
        (Launch(4, ZeroConfig(3, True, True)), 1.25),
    ],
)
def test_expected_memory_depends_on_the_engine(launched: Launch, copies: float) -> None:
    assert weight_copies(launched) == copies


@pytest.mark.parametrize(
    ("stage", "config", "message"),
    [
        (1, TrainConfig(float64=True), r"train\.float64 is set, but ZeRO keeps fp32 weights"),
        (3, TrainConfig(compile="all"), r"train\.compile is all, but ZeRO-3 .* choose auto"),
    ],
)
def test_settings_that_an_engine_does_not_support_are_refused(
    stage: int, config: TrainConfig, message: str
) -> None:
    check_config(config, Launch(2, None))
    with pytest.raises(UserError, match=message):
        check_config(config, Launch(2, ZeroConfig(stage)))
    check_config(TrainConfig(), Launch(2, ZeroConfig(stage)))


@pytest.mark.parametrize("path", ENGINES, ids=lambda path: path.stem)
def test_configuration_for_accelerate_explains_each_line_and_its_use(path: Path) -> None:
    head, *_ = path.read_text().split("compute_environment")
    assert "# Use:  accelerate launch --config_file " + str(path.relative_to(ROOT)) in head
    for line in path.read_text().removeprefix(head).splitlines():
        plain = line.endswith("config:") or "multinode_launcher" in line
        assert "  # " in line or plain, line
    found = yaml.safe_load(path.read_text())
    zero = found.get("deepspeed_config")
    assert found["distributed_type"] == ("MULTI_GPU" if zero is None else "DEEPSPEED")
    if zero is not None:
        offload = "_offload" in path.stem
        assert path.stem == f"zero{zero['zero_stage']}" + "_offload" * offload
        assert zero["offload_optimizer_device"] == ("cpu" if offload else "none")
        assert (zero["offload_param_device"] == "cpu") == (path.stem == "zero3_offload")


@pytest.mark.parametrize(
    ("variables", "nodes"),
    [
        ({}, 1),
        ({"WORLD_SIZE": "4"}, 1),  # started by hand: unknown
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}, 1),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, 2),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "1"}, 4),
    ],
)
def test_nodes_are_counted(launch: Callable, variables: dict[str, str], nodes: int):
    launch(**variables)
    assert count_nodes() == nodes


@pytest.mark.parametrize(
    ("use_cpu", "used"), [("", True), ("False", True), ("True", False), ("1", False)]
)
def test_no_gpu_is_used_where_accelerate_is_configured_for_cpus(
    use_cpu: str, used: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", use_cpu)
    assert on_gpu() == used
    assert compile_mode(TrainConfig()) == ("all" if used else "noise")
