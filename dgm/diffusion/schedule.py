"""Noise schedules: alpha and sigma of each timestep."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

ScheduleKind = Literal["linear", "cosine"]
_OFFSET = 0.008  # the s of the cosine schedule, so that the first betas are not too small


@dataclass(frozen=True)
class Schedule:
    """Noise levels of a discrete-time diffusion, float64 [T] on the CPU.

    `x_t = alpha(t) x_0 + sigma(t) eps` with alpha^2 = alphas_cumprod and sigma^2 = 1 - alpha^2.
    """

    alphas_cumprod: Tensor

    @property
    def num_timesteps(self) -> int:
        """Return T."""
        return len(self.alphas_cumprod)

    @property
    def betas(self) -> Tensor:
        """Return the variance added at each step, [T]."""
        before = torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod[:-1]])
        return 1 - self.alphas_cumprod / before

    @property
    def alphas(self) -> Tensor:
        """Return the factor of the signal, [T]."""
        return self.alphas_cumprod.sqrt()

    @property
    def sigmas(self) -> Tensor:
        """Return the factor of the noise, [T]."""
        return (1 - self.alphas_cumprod).sqrt()

    @property
    def snr(self) -> Tensor:
        """Return alpha^2 / sigma^2, [T]."""
        return self.alphas_cumprod / (1 - self.alphas_cumprod)

    def timesteps(self, steps: int) -> list[int]:
        """Return `steps` timesteps, evenly spaced from T - 1 down ("trailing", Lin et al. 2024)."""
        total = self.num_timesteps
        return [round(total * (steps - i) / steps) - 1 for i in range(steps)]


def linear(num_timesteps: int) -> Schedule:
    """Return the linear schedule of Ho et al. 2020, scaled to T as by Nichol and Dhariwal 2021."""
    scale = 1000 / num_timesteps
    betas = torch.linspace(1e-4 * scale, 0.02 * scale, num_timesteps, dtype=torch.float64)
    return Schedule(torch.cumprod(1 - betas.clamp(max=0.999), 0))


def cosine(num_timesteps: int) -> Schedule:
    """Return the cosine schedule (Nichol and Dhariwal 2021, equation 17); betas <= 0.999."""
    time = torch.linspace(0, 1, num_timesteps + 1, dtype=torch.float64)
    signal = torch.cos((time + _OFFSET) / (1 + _OFFSET) * math.pi / 2) ** 2
    betas = (1 - signal[1:] / signal[:-1]).clamp(max=0.999)
    return Schedule(torch.cumprod(1 - betas, 0))


SCHEDULES = {"linear": linear, "cosine": cosine}
"""Functions of the number of timesteps, by the names of ScheduleKind."""


def make_schedule(
    kind: ScheduleKind, num_timesteps: int, zero_terminal_snr: bool = False
) -> Schedule:
    """Return a schedule of at least 2 timesteps.

    zero_terminal_snr: shift and scale alphas to 0 at the last one (Lin et al. 2024, algorithm 1).
    """
    schedule = SCHEDULES[kind](num_timesteps)
    if not zero_terminal_snr:
        return schedule
    alphas = schedule.alphas
    return Schedule(((alphas - alphas[-1]) * alphas[0] / (alphas[0] - alphas[-1])) ** 2)
