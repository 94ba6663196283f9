"""A job of two phases that trains in milliseconds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dgm.common.run_files import read_metrics
from dgm.objective import Batch, Phase
from dgm.preprocessing import STANDARD
from dgm.rng import Draws
from dgm.training import checkpoint
from dgm.training.checkpoint import Checkpoint
from dgm.training.engine import Engine
from dgm.training.job import Job, TrainConfig
from dgm.training.optimizer import OptimConfig
from dgm.training.run_folder import RunFolder
from dgm.training.trainer import Trainer

SHAPE = (2, 2, 3)
CONFIG = TrainConfig(
    global_batch=8,
    total_images=96,
    log_every_images=24,
    sample_every_images=0,
    save_every_images=32,
    samples_per_class=2,
    keep_checkpoints=100,
    ema_halflife_images=20,
    compile="none",
    mixed_precision="no",
)


class Pixels:
    """Fifty images of noise, two classes."""

    def __len__(self) -> int:
        return 50

    def images(self, index: np.ndarray) -> np.ndarray:
        rows = [np.random.default_rng(i).integers(0, 256, SHAPE, dtype=np.uint8) for i in index]
        return np.stack(rows)

    def labels(self, index: np.ndarray) -> np.ndarray:
        return index % 2


class TwoPhases:
    """The loss of both nets depends on images and draws."""

    num_classes = None
    sample_config = None
    pixels = STANDARD

    def __init__(self, phases: tuple[Phase, ...]):
        self.phases, self.calls = phases, 0

    def loss(
        self, nets: Mapping[str, nn.Module], batch: Batch, phase: Phase, draws: Draws
    ) -> dict[str, Tensor]:
        self.calls += 1
        x = batch.images.flatten(1) / 255 + draws.normal("noise", (12,))
        error = (nets["first"](x) - nets["second"](x)).square().mean()
        return {"loss": error, "labels": batch.labels.double().mean()}

    def sample(
        self, nets: Mapping[str, nn.Module], count: int, labels: Tensor | None, draws: Draws
    ) -> Tensor:
        made = nets["first"](draws.normal("latent", (12,))).reshape(count, *SHAPE)
        return made.permute(0, 3, 1, 2).tanh()


BOTH = (Phase("a", "first"), Phase("b", "second", every=2))
"""Updates `first` in each step, `second` in every other."""


def job(folder: Path, objective: TwoPhases | None = None, lr: float = 0.01, **changes: Any) -> Job:
    torch.manual_seed(0)
    config = TrainConfig(**{**vars(CONFIG), **changes})
    return Job(
        folder=folder,
        seed=3,
        config=config,
        optim=dict.fromkeys(("first", "second"), OptimConfig(lr=lr, warmup_images=16)),
        engine=Engine(config.mixed_precision),
        objective=objective or TwoPhases(BOTH),
        nets={"first": nn.Linear(12, 12), "second": nn.Linear(12, 12)},
        data=Pixels(),
        data_id="noise",
        image_shape=SHAPE,
        classes=("even", "odd"),
        settings={},
    )


class Folder(RunFolder):
    """A run folder without a configuration."""

    def __init__(self, path: Path):
        super().__init__(None, path)

    def open(self) -> dict[str, list[Any]]:
        self.path.mkdir(parents=True, exist_ok=True)
        return {}

    def write_config(self) -> None:
        pass


def train(made: Job) -> bool:
    return Trainer(made).train(Folder(made.folder))


def left_by(folder: Path) -> tuple[Checkpoint, list[dict[str, float]]]:
    """Return the last checkpoint, and the log without times."""
    newest = checkpoint.newest(folder / "checkpoints")
    assert newest is not None
    lines = [
        {
            k: v
            for k, v in line.items()
            if k.startswith(("train/", "eval/")) or k in ("step", "images_seen")
        }
        for line in read_metrics(folder / "metrics.jsonl")
    ]
    return checkpoint.read(newest), lines


def assert_same(one: Path, other: Path) -> None:
    """Compare weights, moments and averages of two runs' last checkpoints, and their logs."""
    (first, log), (second, other_log) = left_by(one), left_by(other)
    for a, b in (
        (first.model, second.model),
        (first.optimizer, second.optimizer),
        (first.ema, second.ema),
    ):
        assert a.keys() == b.keys()
        assert not [key for key in a if not torch.equal(a[key], b[key])]
    assert log == other_log
