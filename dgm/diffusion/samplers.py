"""Samplers: pure functions `(denoiser, x, schedule, draws, steps, **knobs) -> x`.

x is pure noise [B, C, H, W] at the last timestep; the result is an image in about [-1, 1]. Image i
of a batch depends on its own draws only, so batches may be cut as one likes. All work at any number
of steps from 1 to T, on the timesteps that `Schedule.levels` chooses.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dgm.common.progress import advance
from dgm.diffusion.parameterization import Denoised
from dgm.diffusion.schedule import Schedule
from dgm.rng import Draws

Denoiser = Callable[[Tensor, int], Denoised]
"""Given x_t [B, C, H, W] and the timestep, say what x_0 and eps are."""

SamplerName = Literal["ddpm", "ddim", "dpmpp_2m", "heun"]


class Level(NamedTuple):
    """One noise level that a sampler visits."""

    t: int  # -1 stands for the clean image
    alpha: float
    sigma: float

    @property
    def log_snr_half(self) -> float:
        """Give lambda = log(alpha / sigma), infinite at either end."""
        if self.alpha == 0:
            return -math.inf
        return math.log(self.alpha / self.sigma) if self.sigma else math.inf


CLEAN = Level(-1, 1.0, 0.0)


def _pairs(schedule: Schedule, steps: int, num_images: int) -> Iterator[tuple[int, Level, Level]]:
    """Go through (number, from, to) until the clean image; counts progress of so many images."""
    alphas, sigmas = schedule.alphas.tolist(), schedule.sigmas.tolist()
    levels = [Level(t, alphas[t], sigmas[t]) for t in schedule.levels(steps)] + [CLEAN]
    for number, (here, there) in enumerate(itertools.pairwise(levels)):
        yield number, here, there
        advance(num_images / (len(levels) - 1))


def ddpm(
    denoiser: Denoiser,
    x: Tensor,
    schedule: Schedule,
    draws: Draws,
    steps: int,
    variance: Literal["small", "large", "learned"] = "large",
) -> Tensor:
    """Sample ancestrally from q(x_s | x_t, x_0) (Ho et al. 2020, equations 6 and 7).

    `small` takes beta_tilde as the variance, `large` beta, `learned` what the network says
    (Nichol and Dhariwal 2021, equation 15). With fewer than T steps, betas are those of the
    chosen timesteps (same paper, equation 19).
    """
    for number, here, there in _pairs(schedule, steps, len(x)):
        x_0, _, fraction = denoiser(x, here.t)
        mean_x_0, mean_x_t, beta, beta_tilde = posterior(here, there)
        x = mean_x_0 * x_0 + mean_x_t * x
        if there is CLEAN:
            break
        noise = _noise_like(x, draws, "ancestral", number)
        if variance == "learned":
            assert fraction is not None, "variance 'learned' needs a network that learned it"
            log_variance = fraction * math.log(beta) + (1 - fraction) * math.log(beta_tilde)
            x = x + torch.exp(0.5 * log_variance) * noise
        else:
            x = x + math.sqrt(beta if variance == "large" else beta_tilde) * noise
    return x


def posterior(here: Level, there: Level) -> tuple[float, float, float, float]:
    """Give q(x_s | x_t, x_0): factors of x_0 and of x_t in its mean, beta and beta_tilde."""
    alpha = here.alpha / there.alpha  # of the one step
    beta = 1 - alpha**2
    mean_x_0 = there.alpha * beta / here.sigma**2
    mean_x_t = alpha * there.sigma**2 / here.sigma**2
    return mean_x_0, mean_x_t, beta, beta * there.sigma**2 / here.sigma**2


def ddim(
    denoiser: Denoiser,
    x: Tensor,
    schedule: Schedule,
    draws: Draws,
    steps: int,
    eta: float = 0.0,
) -> Tensor:
    """Sample by DDIM (Song et al. 2021, equations 12 and 16); eta 0 draws no noise, 1 is DDPM's."""
    for number, here, there in _pairs(schedule, steps, len(x)):
        x_0, eps, _ = denoiser(x, here.t)
        noise_sigma = eta * math.sqrt(posterior(here, there)[3])
        x = there.alpha * x_0 + math.sqrt(max(there.sigma**2 - noise_sigma**2, 0.0)) * eps
        if noise_sigma:
            x = x + noise_sigma * _noise_like(x, draws, "ddim", number)
    return x


def ddim_inverse(
    denoiser: Denoiser, x: Tensor, schedule: Schedule, steps: int, repeats: int = 3
) -> Tensor:
    """Find the noise of which `ddim` without noise of its own makes x: undo it step by step.

    A step is x_s = cos(d) x_t - sin(d) v(x_t), d the difference of the levels' angles (as in
    `heun`), hence x_t = (x_s + sin(d) v(x_t)) / cos(d), which is solved by fixed-point iteration
    from x_s. One repeat is the encoding of Song et al. 2021 (section 4.3), which the sampler does
    not quite undo; more come closer to its inverse.
    """
    for _, here, there in reversed(list(_pairs(schedule, steps, 0))):
        angle = math.atan2(here.sigma, here.alpha) - math.atan2(there.sigma, there.alpha)
        known = x
        for _ in range(repeats):
            said = denoiser(x, here.t)
            v = here.alpha * said.eps - here.sigma * said.x_0
            x = (known + math.sin(angle) * v) / math.cos(angle)
    return x


def dpmpp_2m(denoiser: Denoiser, x: Tensor, schedule: Schedule, draws: Draws, steps: int) -> Tensor:
    """Sample by DPM-Solver++(2M) (Lu et al. 2022, algorithm 2); the last step is of first order."""
    previous_x_0, previous_h = None, 0.0
    for _, here, there in _pairs(schedule, steps, len(x)):
        x_0 = denoiser(x, here.t).x_0
        h = there.log_snr_half - here.log_snr_half
        data = x_0
        if previous_x_0 is not None and there is not CLEAN:
            half_inverse_ratio = h / (2 * previous_h)  # 0 after a first step from pure noise
            data = (1 + half_inverse_ratio) * x_0 - half_inverse_ratio * previous_x_0
        x = (there.sigma / here.sigma) * x - there.alpha * math.expm1(-h) * data
        previous_x_0, previous_h = x_0, h
    return x


def heun(denoiser: Denoiser, x: Tensor, schedule: Schedule, draws: Draws, steps: int) -> Tensor:
    """Sample with Heun's method on the probability-flow ODE, in exponential form.

    With alpha = cos(phi) and sigma = sin(phi) the ODE is dx / dphi = v = cos(phi) eps - sin(phi)
    x_0 (Salimans and Ho 2022, appendix D), which has no singularity at either end. For constant
    x_0 and eps its solution is a rotation, x_s = cos(d) x_t - sin(d) v_t with d = phi_t - phi_s.
    The predictor is that rotation (it is DDIM's step); the corrector is the same rotation with the
    mean of v_t and v'_t = cos(phi_t) eps' - sin(phi_t) x_0', where x_0' and eps' are the
    predictions at the predicted point. A step is therefore exact for constant x_0 and eps, and the
    method is of second order. Karras et al. 2022 (algorithm 1) step linearly in the noise level
    instead. Two evaluations per step; the last step, to the clean image, takes only the predictor.
    """
    for _, here, there in _pairs(schedule, steps, len(x)):
        x_0, eps, _ = denoiser(x, here.t)
        predicted = there.alpha * x_0 + there.sigma * eps
        if there is CLEAN:
            return predicted
        ahead = denoiser(predicted, there.t)
        mean_x_0, mean_eps = (x_0 + ahead.x_0) / 2, (eps + ahead.eps) / 2
        v = here.alpha * mean_eps - here.sigma * mean_x_0
        angle = math.atan2(here.sigma, here.alpha) - math.atan2(there.sigma, there.alpha)
        x = math.cos(angle) * x - math.sin(angle) * v
    return x


def run_sampler(
    name: SamplerName,
    denoiser: Denoiser,
    x: Tensor,
    schedule: Schedule,
    draws: Draws,
    steps: int,
    eta: float = 0.0,
    variance: Literal["small", "large", "learned"] = "large",
) -> Tensor:
    """Sample by the sampler of that name; the knobs go to those that have them."""
    if name == "ddpm":
        return ddpm(denoiser, x, schedule, draws, steps, variance)
    if name == "ddim":
        return ddim(denoiser, x, schedule, draws, steps, eta)
    return {"dpmpp_2m": dpmpp_2m, "heun": heun}[name](denoiser, x, schedule, draws, steps)


def _noise_like(x: Tensor, draws: Draws, purpose: str, number: int) -> Tensor:
    _, channels, height, width = x.shape
    noise = draws.at(number).normal(purpose, (height, width, channels), x.dtype)
    return noise.permute(0, 3, 1, 2)
