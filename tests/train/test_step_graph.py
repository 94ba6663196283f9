"""Steps that are recorded and replayed train the same bits as steps that are not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from array_images import ArrayImages
from small_loop import BOTH, TwoPhases, left_by, train
from small_loop import job as small_job
from tape import NotRecordable, TapeRecorder
from tiny import TINY

from dgm.errors import UserError
from dgm.objective import Batch
from dgm.train import loop
from dgm.train.engine import Engine
from dgm.train.job import Job
from dgm.train.step_graph import WARM_UP, StepGraphs
from launch.command import parse
from launch.families import FAMILIES

SHAPE, CLASSES, BATCH, STEPS = (8, 8, 3), 10, 8, 16
PIXELS = np.random.default_rng(5).integers(0, 256, (50, *SHAPE), dtype=np.uint8)
# A warm-up that ends and a cosine; every kind of draw is on.
COMMON = {
    **{"kernels": False, "global_batch": BATCH, "total_images": BATCH * STEPS},
    **{"log_every_images": 3 * BATCH, "save_every_images": 0},
}
OF_FAMILY: dict[str, dict[str, Any]] = {
    "diffusion": {"diffusion": {"learned_variance": True}},
    "gan": {"gan": {"r1": 0.1, "r1_interval": 2}},
    "vae": {"vae": {"kl_warmup_images": 6 * BATCH + 3}},
    "flow": {},
}


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the device note gradients that are not finite, as it does where the host would wait."""
    monkeypatch.setattr(Engine, "host_knows_norms", False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> list[TapeRecorder]:
    """Let runs record; return their recorders."""
    made: list[TapeRecorder] = []

    def graphs(config: Any, step: Any, batches: Any) -> StepGraphs:
        made.append(TapeRecorder(step))
        return StepGraphs(step, batches, made[-1])

    monkeypatch.setattr(loop, "step_graphs", graphs)
    return made


def job(family: str, folder: Path, train: dict[str, Any]) -> Job:
    """Make the smallest run of a family on images of noise."""
    given = {**TINY[family], **{k: {**TINY[family].get(k, {}), **v} for k, v in OF_FAMILY[family].items()}}
    given["optim"] = {**given["optim"], "warmup_images": 5 * BATCH, "decay": "cosine", "weight_decay": 0.1}
    given["train"] = {**given["train"], **COMMON, **train}
    path = folder.with_suffix(".json")
    path.write_text(json.dumps(given))
    module = FAMILIES[family]
    config = parse(module.Config, "", ["--config", str(path)])
    parts = module.make_parts(config, SHAPE, CLASSES)
    return Job(
        folder=folder,
        seed=3,
        config=config.train,
        optim={name: parts.optim.get(name, config.optim) for name in parts.nets},
        engine=Engine("no", [], str(folder)),
        objective=parts.objective,
        nets=parts.nets,
        data=ArrayImages(PIXELS, np.arange(50) % CLASSES),
        data_id="noise",
        image_shape=SHAPE,
        classes=tuple(map(str, range(CLASSES))),
        settings={},
    )


def assert_same(one: Path, other: Path) -> None:
    (first, log), (second, other_log) = left_by(one), left_by(other)
    for a, b in (
        (first.full.model, second.full.model),
        (first.full.optimizer, second.full.optimizer),
        (first.ema, second.ema),
    ):
        assert a.keys() == b.keys()
        assert [key for key in a if not torch.equal(a[key], b[key])] == []
    assert log == other_log


@pytest.mark.parametrize("resident", [True, False], ids=["stored", "sent"])
@pytest.mark.parametrize("family", OF_FAMILY)
def test_replayed_steps_train_the_same_bits(
    tmp_path: Path, record: list[TapeRecorder], family: str, resident: bool, monkeypatch: pytest.MonkeyPatch
):
    micro = BATCH if family == "gan" else BATCH // 2
    settings = {"images_on_device": resident, "micro_batch": micro}
    assert train(job(family, tmp_path / "replayed", settings))
    kinds = 3 if family == "gan" else 1
    steps = STEPS + STEPS // 2 if family == "gan" else STEPS
    assert (record[0].recorded, record[0].replayed) == (kinds, steps - kinds * WARM_UP)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "step_graphs", lambda *_: None)
        assert train(job(family, tmp_path / "plain", settings))
    assert_same(tmp_path / "replayed", tmp_path / "plain")
