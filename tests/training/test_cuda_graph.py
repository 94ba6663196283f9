"""Captured and replayed steps train the same bits as eager ones."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from array_images import ArrayImages
from small_loop import BOTH, Folder, TwoPhases, assert_same, job, left_by, train
from tape import CompiledCapturer, TapeCapturer
from torch import Tensor, nn

from dgm.cli.parser import TRAINERS, family_module, parse
from dgm.common.errors import UserError
from dgm.diffusion import forward_process
from dgm.objective import Batch, Nets, Phase
from dgm.rng import Draws
from dgm.training.cuda_graph import WARM_UP, CudaCapturer
from dgm.training.engine import Engine
from dgm.training.job import Job, TrainConfig, captures_steps
from dgm.training.launch_env import Launch, ZeroConfig
from dgm.training.optimizer import AdamW, OptimConfig
from dgm.training.sampler import BatchSampler
from dgm.training.trainer import Trainer

SHAPE, CLASSES, BATCH, STEPS = (8, 8, 3), 10, 8, 16
PIXELS = np.random.default_rng(5).integers(0, 256, (50, *SHAPE), dtype=np.uint8)
KEYS: dict[str, Any] = {
    "train.mixed_precision": "no",
    "train.kernels": False,  # as the update is torch's on a GPU
    "train.global_batch": BATCH,
    "train.total_images": BATCH * STEPS,
    "train.log_every_images": 3 * BATCH,
    "train.save_every_images": 0,
    "optim.warmup_images": 5 * BATCH,
    "optim.decay": "cosine",
    "optim.weight_decay": 0.1,
}
OF_FAMILY: dict[str, dict[str, Any]] = {
    "diffusion": {"diffusion.learned_variance": True},
    "gan": {"gan.r1_interval": 2},
    "vae": {"vae.kl_warmup_images": 6 * BATCH + 3},
}


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the device record gradients that are not finite, as on a GPU."""
    monkeypatch.setattr(Engine, "norms_on_host", False)


def train_captured(made: Job, kind: type[TapeCapturer] = TapeCapturer) -> TapeCapturer:
    """Train with captured steps; return the capturer."""
    trainer = Trainer(made)
    capturer = kind(trainer)
    trainer.capturer = capturer  # type: ignore[assignment]
    trainer.train(Folder(made.folder))
    return capturer


def assert_replays_are_plain_steps(
    folder: Path, make: Callable[[Path], Job], kind: type[TapeCapturer] = TapeCapturer
) -> TapeCapturer:
    """Train two runs, one with captured steps, to the same bytes; return the capturer."""
    capturer = train_captured(make(folder / "replayed"), kind)
    train(make(folder / "plain"))
    assert_same(folder / "replayed", folder / "plain")
    return capturer


def family_job(folder: Path, family: str, **train: Any) -> Job:
    """Return the job of a family's smallest run on images of noise."""
    keys = KEYS | OF_FAMILY.get(family, {}) | {f"train.{k}": value for k, value in train.items()}
    words = [f"--{key}={value}" for key, value in keys.items()]
    module = family_module(family)
    config = parse(module.Config, f"{TRAINERS[family]}_tiny.yaml", words)
    parts = module.make_parts(config, SHAPE, CLASSES)
    return replace(
        job(folder, mixed_precision=config.train.mixed_precision),
        config=config.train,
        optim={name: parts.optim.get(name, config.optim) for name in parts.nets},
        objective=parts.objective,
        nets=parts.nets,
        data=ArrayImages(PIXELS, np.arange(len(PIXELS)) % CLASSES),
        image_shape=SHAPE,
        classes=tuple(map(str, range(CLASSES))),
    )


def micro_batch(family: str) -> int:
    return BATCH if family == "gan" else BATCH // 2  # BatchNorm needs the whole batch


@pytest.mark.parametrize("resident", [True, False], ids=["stored", "sent"])
@pytest.mark.parametrize("family", TRAINERS)
def test_replayed_steps_train_the_same_bits(tmp_path: Path, family: str, resident: bool):
    settings = {"images_on_device": resident, "micro_batch": micro_batch(family)}
    capturer = assert_replays_are_plain_steps(
        tmp_path, lambda folder: family_job(folder, family, **settings)
    )
    # A discriminator with and without a penalty, and a generator in every other step.
    variants, steps = (3, STEPS + STEPS // 2) if family == "gan" else (1, STEPS)
    assert (capturer.captured, capturer.replayed) == (variants, steps - variants * WARM_UP)


@pytest.fixture
def other_precision() -> Iterator[None]:
    """Reset accelerate's precision, which is fixed once per process."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["diffusion", "gan"])
@pytest.mark.usefixtures("other_precision")
def test_copies_of_weights_in_bf16_are_made_in_each_replay(tmp_path: Path, family: str):
    assert_replays_are_plain_steps(
        tmp_path, lambda folder: family_job(folder, family, mixed_precision="bf16")
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gan", "vae"])  # which depend on steps and images seen
def test_resumed_run_captures_again_and_trains_the_same_bits(tmp_path: Path, family: str):
    stopping = family_job(tmp_path / "replayed", family)
    calls = iter(range(STEPS))
    stopping.engine.any_rank = lambda _: next(calls) == 6  # type: ignore[method-assign]
    assert train_captured(stopping).replayed > 0
    assert left_by(tmp_path / "replayed")[0].state["step"] == 7
    resumed = assert_replays_are_plain_steps(tmp_path, lambda folder: family_job(folder, family))
    assert resumed.replayed > 0


@pytest.mark.slow
@pytest.mark.parametrize("family", ["diffusion", "gan"])  # of one phase, of two
def test_nothing_is_compiled_while_a_step_is_captured(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
):
    compile_as_usual = nn.Module.compile
    monkeypatch.setattr(  # without generating code, which takes long
        nn.Module, "compile", lambda net, **_: compile_as_usual(net, backend="aot_eager")
    )
    # On a GPU this is a kernel.
    monkeypatch.setattr(forward_process, "_compiled", lambda function: function)
    settings = {"compile": "all", "micro_batch": micro_batch(family)}
    capturer = assert_replays_are_plain_steps(
        tmp_path, lambda folder: family_job(folder, family, **settings), CompiledCapturer
    )
    assert capturer.captured == (3 if family == "gan" else 1)


class Breaking(TwoPhases):
    """Has a gradient that is not finite where an image is in the batch."""

    def loss(self, nets: Nets, batch: Batch, phase: Phase, draws: Draws) -> dict[str, Tensor]:
        values = super().loss(nets, batch, phase, draws)
        broken = (draws.index == self.image).any()
        return {**values, "loss": values["loss"] * torch.where(broken, math.nan, 1.0)}

    image = 0


@pytest.mark.parametrize("step", [1, 5])  # before and after one is captured
def test_weights_do_not_change_after_a_gradient_that_is_not_finite(tmp_path: Path, step: int):
    left: list[dict[str, Tensor]] = []
    for name, go in (("replayed", train_captured), ("plain", train)):
        objective = Breaking((Phase("a", "first"), Phase("b", "second")))
        made = job(tmp_path / name, objective, kernels=False, log_every_images=64)
        objective.image = int(BatchSampler(made.data, 3, 8, None, 0, 1)._order(0, 0)[8 * step])
        with pytest.raises(UserError, match=rf"gradient of a is not finite at step {step} "):
            go(made)
        weights, moments = made.engine.full_state()
        left.append({**weights, **moments})
        assert all(value.isfinite().all() for value in left[-1].values())
    assert [key for key in left[1] if not torch.equal(left[0][key], left[1][key])] == []


class Waiting(TwoPhases):
    """Reads a number from the device in one of its phases."""

    def loss(self, nets: Nets, batch: Batch, phase: Phase, draws: Draws) -> dict[str, Tensor]:
        values = super().loss(nets, batch, phase, draws)
        if phase.name == "b":
            assert float(values["loss"].detach()) > 0
        return values


class Growing(TwoPhases):
    """Gives a bias its first gradient in the step that is to be captured."""

    def loss(self, nets: Nets, batch: Batch, phase: Phase, draws: Draws) -> dict[str, Tensor]:
        net, x = nets["first"], batch.images.flatten(1) / 255
        bias = net.bias if batch.step >= WARM_UP else net.bias.detach()
        return {"loss": nn.functional.linear(x, net.weight, bias).square().mean()}


@pytest.mark.parametrize(
    ("objective", "reason"),
    [
        (Waiting(BOTH), "makes the host wait"),
        (Growing(BOTH[:1]), "a weight has its first gradient only now"),
    ],
)
def test_a_step_that_cannot_be_captured_warns_once_and_changes_nothing(
    tmp_path: Path, objective: TwoPhases, reason: str
):
    with pytest.warns(UserWarning, match=reason) as warned:
        assert_replays_are_plain_steps(
            tmp_path, lambda folder: job(folder, objective, kernels=False)
        )
    assert len([w for w in warned if "cannot be captured" in str(w.message)]) == 1


def test_two_phases_of_one_net_have_common_counts(tmp_path: Path):
    phases = (Phase("a", "first"), Phase("b", "first", every=2))
    capturer = assert_replays_are_plain_steps(
        tmp_path, lambda folder: job(folder, TwoPhases(phases), kernels=False)
    )
    assert capturer.captured == 2


class Silent(TwoPhases):
    """Depends on the number of the step without declaring it by `variant`."""

    def loss(self, nets: Nets, batch: Batch, phase: Phase, draws: Draws) -> dict[str, Tensor]:
        values = super().loss(nets, batch, phase, draws)
        return {**values, "loss": values["loss"] * (1 + batch.step % 2)}


def test_undeclared_dependence_on_the_step_would_be_detected(tmp_path: Path):
    with pytest.raises(AssertionError):
        assert_replays_are_plain_steps(
            tmp_path, lambda folder: job(folder, Silent(BOTH), kernels=False)
        )


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_rate_and_counts_on_the_device_train_the_same_bits(decay: float):
    nets = [nn.Sequential(nn.Linear(9, 7), nn.Conv2d(3, 5, 3)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    config = OptimConfig(weight_decay=decay)
    plain, captured = (AdamW(net.parameters(), config, decayed=[net[0].weight]) for net in nets)
    for step, missing in enumerate([0, 0, None, 3, None]):  # so numbers of steps differ
        for number, (one, other) in enumerate(zip(*(n.parameters() for n in nets), strict=True)):
            one.grad = None if number == missing else torch.randn_like(one)
            other.grad = None if one.grad is None else one.grad.clone()
        rate = float(np.float32(0.1 / (1 + step)))
        plain.step(rate)
        counts = torch.tensor(captured.counts(), dtype=torch.float32)
        with captured.on_device(torch.tensor(rate), counts) as update:
            captured.step(math.nan)
        for moments in update.updated:
            moments.step += 1
    for one, other in zip(*(n.parameters() for n in nets), strict=True):
        assert torch.equal(one, other)
        assert all(torch.equal(plain.state[one][k], v) for k, v in captured.state[other].items())


@pytest.mark.parametrize(
    ("compiling", "launch", "expected"),
    [
        ("graphs", Launch(1, None), True),
        ("graphs", Launch(2, None), False),
        ("graphs", Launch(1, ZeroConfig(1)), False),
        ("all", Launch(1, None), False),
    ],
)
def test_steps_are_captured_on_one_process(compiling: Any, launch: Launch, expected: bool):
    assert captures_steps(TrainConfig(compile=compiling), launch) == expected
    assert not captures_steps(TrainConfig(compile=compiling, detect_anomaly=True), launch)


class NoGpu:
    """The part of torch.cuda that capturing uses, failing at its end as on torch 2.11."""

    def __init__(self) -> None:
        self.streams, self.ended = ["default"], list[tuple[int, Any]]()

    @contextlib.contextmanager
    def stream(self, stream: str) -> Iterator[None]:
        before = len(self.streams)
        self.streams.append(stream)
        try:
            yield
        finally:
            del self.streams[before:]

    @contextlib.contextmanager
    def graph(self, graph: Any, pool: Any, stream: str) -> Iterator[None]:
        self.streams.append(stream)
        yield
        raise RuntimeError("operation failed due to a previous error during capture")


def test_a_failed_capture_is_ended(monkeypatch: pytest.MonkeyPatch):
    fake = NoGpu()
    for name, part in {
        "Stream": lambda _: "side", "graph_pool_handle": lambda: (0, 1), "stream": fake.stream,
        "graph": fake.graph, "CUDAGraph": object, "current_device": lambda: 2,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, part)
    monkeypatch.setattr(
        torch._C, "_cuda_endAllocateToPool", lambda *of: fake.ended.append(of), raising=False
    )
    with pytest.raises(RuntimeError, match="previous error during capture"):
        CudaCapturer(torch.device("cuda")).capture(lambda: None)
    assert (fake.streams, fake.ended) == (["default"], [(2, (0, 1))])
