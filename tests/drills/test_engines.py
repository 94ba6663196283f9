"""Train under DDP and DeepSpeed ZeRO: same losses as one process, same bytes after a kill."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from processes import free_port, kill_all
from safetensors.torch import load_file
from tiny import BATCH, SCRIPTS

from tests.drills.run_contents import assert_same_tensors

SIGNAL_AT = Path(__file__).with_name("signal_at.py")
STEPS = 25

pytestmark = pytest.mark.slow

LONG = [pytest.param(f, marks=pytest.mark.long) for f in SCRIPTS if f != "diffusion"]
ENGINES: list[Any] = [("diffusion", "1", []), ("diffusion", "3", []), ("gan", "2", [])]
ENGINES += [
    pytest.param(family, stage, [], marks=pytest.mark.long)
    for family, stage in (("diffusion", "2"), ("gan", "3"), ("vae", "2"), ("flow", "2"))
]
# With micro-batches: gradients add up, and are averaged in the last one of a step.
ENGINES += [
    ("diffusion", "0", ["--train.micro_batch=4"]),
    pytest.param("vae", "2_offload", ["--train.micro_batch=4"], marks=pytest.mark.long),
    pytest.param("flow", "3_offload", ["--train.micro_batch=4"], marks=pytest.mark.long),
]


@pytest.mark.parametrize(("family", "zero", "options"), ENGINES)
def test_losses_under_zero_are_those_of_one_process(
    losses: Callable,
    losses_alone: Callable,
    largest_difference: Callable,
    tmp_path: Path,
    family: str,
    zero: str,
    options: list[str],
) -> None:
    found = losses(family, 2, *options, folder=tmp_path / "run", zero=zero)
    difference = largest_difference(found, losses_alone(family))
    print(f"{family}: ZeRO-{zero} on 2 processes differs from one by {difference:.1e}")
    assert difference < 1e-5
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    where = {
        "2_offload": ", optimizer on the CPU",
        "3_offload": ", optimizer and weights on the CPU",
    }
    engine = f"DeepSpeed ZeRO-{zero[0]}{where.get(zero, '')} on 2 processes"
    assert environment["engine"] == engine


@pytest.mark.long
def test_zero_computes_in_bf16_as_ddp_does(
    losses: Callable, losses_alone: Callable, largest_difference: Callable
) -> None:
    # With torch's AdamW in both: ours rounds differently, which grows to 4e-4 in bf16.
    in_bf16 = ("--train.mixed_precision=bf16", "--train.kernels=false")
    under_zero = losses("diffusion", 2, *in_bf16, zero="2")
    # Both send gradients and keep weights in fp32.
    assert largest_difference(under_zero, losses("diffusion", 2, *in_bf16)) < 1e-5
    assert largest_difference(under_zero, losses_alone("diffusion")) > 1e-5


@pytest.mark.parametrize("family", ["diffusion", *LONG])
def test_run_moves_between_engines_with_the_same_losses(
    losses: Callable, largest_difference: Callable, tmp_path: Path, family: str
) -> None:
    moves: list[tuple[int, str | None]] = [(1, None), (2, None), (2, "3"), (4, "1"), (1, None)]
    for number, (processes, zero) in enumerate(moves, 1):
        found = losses(family, processes, zero=zero, steps=5 * number, folder=tmp_path / "run")
    difference = largest_difference(found, losses(family, 1, folder=tmp_path / "alone"))
    print(f"{family}: one process, DDP, ZeRO-3, ZeRO-1, one process differ by {difference:.1e}")
    assert difference < (1e-4 if family == "gan" else 1e-5)
    average = f"checkpoints/{STEPS * BATCH:09d}/ema.safetensors"
    moved, alone = (load_file(tmp_path / name / average) for name in ("run", "alone"))
    assert moved.keys() == alone.keys()
    # Where a gradient is near zero, AdamW turns its rounding into a step as large as the rate.
    atol = 1e-4 if family == "gan" else 1e-5
    for key, value in alone.items():
        assert moved[key].dtype == torch.float32
        torch.testing.assert_close(moved[key], value, rtol=1e-4, atol=atol, msg=key)
    starts = (tmp_path / "run" / "starts.jsonl").read_text().splitlines()
    assert [json.loads(line)["engine"] for line in starts] == [
        "one process",
        "DDP on 2 processes",
        "DeepSpeed ZeRO-3 on 2 processes",
        "DeepSpeed ZeRO-1 on 4 processes",
        "one process",
    ]


@pytest.mark.parametrize("family", ["diffusion", pytest.param("gan", marks=pytest.mark.long)])
def test_weight_decay_is_the_same_in_every_engine(
    losses: Callable,
    losses_alone: Callable,
    largest_difference: Callable,
    tmp_path: Path,
    family: str,
) -> None:
    # A weight decay strong enough to change the losses measurably within 25 steps.
    decay = f"--optim.weight_decay={20 if family == 'diffusion' else 50}"
    moves: list[tuple[int, str | None]] = [(1, None), (2, "1"), (2, "0"), (2, "3"), (2, "2")]
    for number, (processes, zero) in enumerate(moves, 1):
        steps, folder = 5 * number, tmp_path / "run"
        found = losses(family, processes, decay, zero=zero, steps=steps, folder=folder)
    alone = losses(family, 1, decay)
    assert largest_difference(found, alone) < 1e-5
    assert largest_difference(alone, losses_alone(family)) > 1e-3


@pytest.mark.parametrize(
    ("family", "processes", "zero"),
    [
        ("diffusion", 2, "3"),
        pytest.param("gan", 2, "2", marks=pytest.mark.long),
        pytest.param("vae", 2, "1", marks=pytest.mark.long),
        # On two processes a sum has one order only.
        pytest.param("flow", 4, None, marks=pytest.mark.long),
    ],
)
def test_killed_run_continues_to_the_same_bytes(
    command: Callable,
    run_warm: Callable,
    tmp_path: Path,
    family: str,
    processes: int,
    zero: str | None,
) -> None:
    def train(name: str, *driver: object):
        words = command(tmp_path / name, family=family)
        return run_warm(*driver, *words, processes=processes, zero=zero)

    undisturbed = train("undisturbed")
    assert undisturbed.code == 0, undisturbed.stderr
    # It saves after the 4th, 8th ... step.
    killed = train("run", SIGNAL_AT, "forward:11@1")
    assert killed.code not in (0, 2, 75), killed.stderr
    again = train("run")
    assert again.code == 0, again.stderr
    assert "continues at:" in again.stdout
    assert_same_tensors(tmp_path / "run", tmp_path / "undisturbed")


@pytest.mark.parametrize("engine", [pytest.param("ddp", marks=pytest.mark.long), "zero3"])
def test_fault_of_one_process_ends_all_within_a_minute_and_is_shown(
    command: Callable, run_script: Callable, tmp_path: Path, engine: str
) -> None:
    words = [SIGNAL_AT, "fault:7@1", *command(tmp_path / "run")]
    began = time.monotonic()
    ended = run_script(*words, processes=2, engine=engine)  # a hang would run into the timeout
    print(f"{engine}: ended {time.monotonic() - began:.0f} s after its start")
    assert ended.code not in (0, 2, 75)
    assert "RuntimeError: a fault of this process alone" in ended.stderr
    assert (tmp_path / "run" / "checkpoints" / f"{4 * BATCH:09d}").is_dir()


def test_sigterm_while_a_failed_run_ends_is_no_early_stop(
    command: Callable, run_warm: Callable, tmp_path: Path
) -> None:
    ended = run_warm(SIGNAL_AT, "fault:7=TERM", *command(tmp_path / "run"))
    assert ended.code == -signal.SIGTERM
    assert "stopped before its first step" not in ended.stdout


def test_mistake_of_one_process_is_reported_once(
    command: Callable, run_warm: Callable, tmp_path: Path
) -> None:
    ended = run_warm(SIGNAL_AT, "mistake:7@1", *command(tmp_path / "run"), processes=2)
    assert ended.code != 0
    assert ended.stderr.count("error: a mistake of this process alone") == 1


@pytest.mark.parametrize("zero", ["1", "3"])
def test_gradient_that_is_not_finite_ends_a_run_under_zero(
    command: Callable, run_warm: Callable, tmp_path: Path, zero: str
) -> None:
    words = command(tmp_path / "run", "--optim.lr", "1e18")
    ended = run_warm(*words, processes=2, zero=zero)
    assert ended.code == 2
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "the gradient of denoise is not finite at step" in errors[0]
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_checkpoint_that_does_not_fit_is_reported_once(
    command: Callable, run_warm: Callable, tmp_path: Path
) -> None:
    words = command(tmp_path / "run", family="vae")
    assert run_warm(*words).code == 0
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("latent: 8", "latent: 12"))
    starts = (tmp_path / "run" / "starts.jsonl").read_text()
    again = run_warm(*words, "--model.latent=12", processes=2, zero="3")
    assert again.code == 2
    errors = [line for line in again.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "does not fit the model at vae.encoder.exit.weight, vae.encoder.exit.bias" in errors[0]
    assert (tmp_path / "run" / "starts.jsonl").read_text() == starts


def test_run_under_zero_stops_on_request_and_continues(
    command: Callable, run_warm: Callable, tmp_path: Path
) -> None:
    words = command(tmp_path / "run")
    stopped = run_warm(SIGNAL_AT, "term:7@1", *words, processes=2, zero="2_offload")
    assert stopped.code == 75, stopped.stderr
    assert stopped.stdout.count("stopped and saved: run the same command to continue") == 1
    again = run_warm(*words, processes=2, zero="3_offload")
    assert again.code == 0, again.stderr
    assert "continues at:    112 images" in again.stdout.splitlines()
    engine = "engine:          DeepSpeed ZeRO-3, optimizer and weights on the CPU on 2 processes"
    assert engine in again.stdout.splitlines()


@pytest.mark.parametrize("engine", ["ddp_nodes", pytest.param("zero2", marks=pytest.mark.long)])
def test_node_that_dies_ends_the_other_within_a_minute(
    command: Callable, start_script: Callable, tmp_path: Path, engine: str
) -> None:
    words = command(tmp_path / "run", "--train.total_images", 10_000_000)
    port = free_port()
    nodes = []
    for rank in range(2):
        where = f"--num_machines 2 --main_process_ip 127.0.0.1 --main_process_port {port}"
        options = f"{where} --machine_rank {rank}"
        nodes.append(start_script(*words, processes=2, engine=engine, options=options))
    try:
        saved = tmp_path / "run" / "checkpoints" / f"{8 * BATCH:09d}"
        while not saved.is_dir():
            assert all(node.poll() is None for node in nodes), nodes[0].communicate()[1]
            time.sleep(0.1)
        kill_all(nodes[1])
        died = time.monotonic()
        _, output = nodes[0].communicate(timeout=60)
        print(f"{engine}: the other ended after {time.monotonic() - died:.0f} s")
        assert nodes[0].returncode not in (0, 2, 75)
        assert "Connection" in output, output
    finally:
        for node in nodes:
            if node.poll() is None:
                kill_all(node)
            node.communicate()


def test_launcher_that_is_killed_leaves_a_saved_run_and_no_process(
    command: Callable, start_script: Callable, tmp_path: Path
) -> None:
    options = ["--train.total_images", 10_000_000, "--train.save_every_images", 0]
    words = command(tmp_path / "run", *options)
    launcher = start_script(*words, processes=2, engine="ddp")
    workers: list[psutil.Process] = []
    try:
        log = tmp_path / "run" / "metrics.jsonl"
        while not log.exists() or log.stat().st_size == 0:
            assert launcher.poll() is None, launcher.communicate()[1]
            time.sleep(0.1)
        workers = psutil.Process(launcher.pid).children(recursive=True)
        launcher.kill()
        left = psutil.wait_procs(workers, timeout=60)[1]
        assert not left
        assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1
    finally:
        kill_all(launcher, workers)
        launcher.communicate()
