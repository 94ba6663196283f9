"""Noising real images part of the way and denoising them from there (SDEdit)."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from dgm.diffusion.objective import DiffusionConfig, DiffusionObjective, DiffusionSampleConfig
from dgm.diffusion.samplers import SamplerName
from dgm.diffusion.sdedit import denoise, noise
from dgm.preprocessing import STANDARD
from dgm.rng import Draws

T = 40


class ExactNet(nn.Module):
    """Predicts the noise exactly, from the real images."""

    def __init__(self, objective: DiffusionObjective, real: Tensor):
        super().__init__()
        self.objective, self.real, self.seen = objective, real, []

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        alpha, sigma = (
            level[t][:, None, None, None].float()
            for level in (self.objective.schedule.alphas, self.objective.schedule.sigmas)
        )
        self.seen.append(int(t[0]))
        return (x - alpha * self.real) / sigma


@pytest.fixture
def objective() -> DiffusionObjective:
    config = DiffusionConfig(num_timesteps=T, class_conditional=False)
    return DiffusionObjective(config, DiffusionSampleConfig(steps=10), (8, 8, 3), 10)


@pytest.fixture
def images() -> Tensor:
    torch.manual_seed(0)
    return torch.randint(0, 256, (64, 8, 8, 3), dtype=torch.uint8)


def draws(count: int = 64) -> Draws:
    return Draws.of(3, torch.arange(count))


@pytest.mark.parametrize("steps", [1, 7, T])
def test_noise_is_that_of_the_schedule(objective: DiffusionObjective, images: Tensor, steps: int):
    added = noise(objective, images, draws(), steps)
    level = objective.schedule.alphas_cumprod[steps - 1]
    rest = (added - level.sqrt() * STANDARD.scale(images)) / (1 - level).sqrt()
    count = rest.numel()
    assert abs(float(rest.mean())) < 4 / count**0.5
    assert float(rest.var()) == pytest.approx(1, abs=4 * (2 / count) ** 0.5)


@pytest.mark.parametrize("sampler", get_args(SamplerName))
@pytest.mark.parametrize("steps", [1, 7, T])
def test_an_exact_net_returns_the_images(
    objective: DiffusionObjective, images: Tensor, steps: int, sampler
):
    net = ExactNet(objective, STANDARD.scale(images))
    x = noise(objective, images, draws(), steps)
    made = denoise(objective, {"net": net}, x, None, draws(), steps, sampler)
    torch.testing.assert_close(made, STANDARD.scale(images), rtol=0, atol=1e-4)
    assert max(net.seen) == steps - 1 and min(net.seen) == 0
    assert len(set(net.seen)) == steps  # every step of the schedule up to there


def test_fewer_evaluations_skip_steps(objective: DiffusionObjective, images: Tensor):
    net = ExactNet(objective, STANDARD.scale(images))
    x = noise(objective, images, draws(), 20)
    denoise(objective, {"net": net}, x, None, draws(), 20, "ddim", evaluations=5)
    assert net.seen == [19, 15, 11, 7, 3]


def test_an_image_is_the_same_in_any_batch(objective: DiffusionObjective, images: Tensor):
    whole = noise(objective, images, draws(), 9)
    part = noise(objective, images[10:13], draws().part(slice(10, 13)), 9)
    assert torch.equal(whole[10:13], part)
