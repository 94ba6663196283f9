"""A batch that does not fit into memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_loop
import torch
from torch import Tensor, nn

from dgm.errors import UserError
from dgm.objective import Batch, Phase
from dgm.rng import Draws
from dgm.train.checkpoint import newest


class Greedy(small_loop.TwoPhases):
    """An objective that asks for more memory than there is where it gets many images."""

    whole_batch = False

    def __init__(self, at_most: int):
        super().__init__(small_loop.BOTH)
        self.at_most, self.trials = at_most, 2  # what a run says at its start takes one a phase

    def loss(
        self, nets: Mapping[str, nn.Module], batch: Batch, phase: Phase, draws: Draws
    ) -> dict[str, Tensor]:
        if len(batch.images) > self.at_most and self.calls >= self.trials:
            torch.empty(2**50, dtype=torch.uint8)
        return super().loss(nets, batch, phase, draws)


def mistake(folder: Path, objective: Greedy, **changes: Any) -> str:
    with pytest.raises(UserError) as caught:
        small_loop.train(small_loop.job(folder, objective, **changes))
    return str(caught.value)


def test_largest_micro_batch_that_fits_is_named_and_serves(tmp_path: Path):
    said = mistake(tmp_path / "a", Greedy(5), global_batch=24, total_images=72)
    assert said.startswith("24 images at a time do not fit into the memory of cpu: ")
    assert "set train.micro_batch 4, the largest that was seen to fit" in said  # 24 = 6 * 4
    assert newest(tmp_path / "a" / "checkpoints") is None
    made = small_loop.job(tmp_path / "a", Greedy(5), global_batch=24, total_images=72)
    assert small_loop.train(replace(made, config=replace(made.config, micro_batch=4)))


def test_one_image_that_does_not_fit_is_said(tmp_path: Path):
    assert "nor fewer: choose a smaller model" in mistake(tmp_path / "a", Greedy(0))


def test_a_batch_that_must_not_be_split_is_to_be_smaller(tmp_path: Path):
    objective = Greedy(5)
    objective.whole_batch = True
    assert mistake(tmp_path / "a", objective).endswith(
        "lower train.global_batch, or take more processes"
    )


def test_other_errors_pass(tmp_path: Path):
    class Broken(Greedy):
        def loss(self, *given: Any) -> dict[str, Tensor]:
            raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        small_loop.train(small_loop.job(tmp_path / "a", Broken(5)))
