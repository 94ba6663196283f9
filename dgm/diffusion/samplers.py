"""Samplers: pure functions `(denoiser, x, schedule, draws, steps, **knobs) -> x`.

x is pure noise [B, C, H, W] at the last timestep; the result is an image in about [-1, 1]. Image i
of a batch depends on its own draws only, so batches can be split. All work at any number of steps
from 1 to T, on the timesteps of `Schedule.timesteps`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dgm.common.progress import advance
from dgm.diffusion.parameterization import Denoised, q_sample, to_prediction
from dgm.diffusion.schedule import Schedule
from dgm.rng import Draws

Denoiser = Callable[[Tensor, int], Denoised]
"""Map x_t [B, C, H, W] and its timestep to estimates of x_0 and eps."""

SamplerName = Literal["ddpm", "ddim", "dpmpp_2m", "heun"]


class NoiseLevel(NamedTuple):
    """One noise level that a sampler visits."""

    t: int  # -1 for the clean image
    alpha: float
    sigma: float

    @property
    def half_log_snr(self) -> float:
        """Return lambda = log(alpha / sigma), which is infinite at either end."""
        if self.alpha == 0:
            return -math.inf
        return math.log(self.alpha / self.sigma) if self.sigma else math.inf

    @property
    def angle(self) -> float:
        """Return phi with alpha = cos(phi), sigma = sin(phi)."""
        return math.atan2(self.sigma, self.alpha)


CLEAN = NoiseLevel(-1, 1.0, 0.0)


def _transitions(
    schedule: Schedule, steps: int, num_images: int
) -> Iterator[tuple[int, NoiseLevel, NoiseLevel]]:
    """Yield (number, level, next level) down to the clean image; report progress."""
    alphas, sigmas = schedule.alphas.tolist(), schedule.sigmas.tolist()
    levels = [NoiseLevel(t, alphas[t], sigmas[t]) for t in schedule.timesteps(steps)] + [CLEAN]
    for number, (level, next_level) in enumerate(itertools.pairwise(levels)):
        yield number, level, next_level
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

    `small` takes beta_tilde as the variance, `large` beta, `learned` the network's
    (Nichol and Dhariwal 2021, equation 15). With fewer than T steps, betas are those of the
    chosen timesteps (same paper, equation 19).
    """
    for number, level, next_level in _transitions(schedule, steps, len(x)):
        x_0, _, fraction = denoiser(x, level.t)
        mean_x_0, mean_x_t, beta, beta_tilde = posterior_coefficients(level, next_level)
        x = mean_x_0 * x_0 + mean_x_t * x
        if next_level is CLEAN:
            break
        noise = _noise_like(x, draws, "ancestral", number)
        if variance == "learned":
            assert fraction is not None, "variance 'learned' needs a network that learned it"
            log_variance = fraction * math.log(beta) + (1 - fraction) * math.log(beta_tilde)
            x = x + torch.exp(0.5 * log_variance) * noise
        else:
            x = x + math.sqrt(beta if variance == "large" else beta_tilde) * noise
    return x


def posterior_coefficients(
    level: NoiseLevel, next_level: NoiseLevel
) -> tuple[float, float, float, float]:
    """Return coefficients of q(x_s | x_t, x_0): of x_0 and x_t in its mean, beta and beta_tilde."""
    alpha = level.alpha / next_level.alpha  # sqrt(1 - beta) of this step
    beta = 1 - alpha**2
    mean_x_0 = next_level.alpha * beta / level.sigma**2
    mean_x_t = alpha * next_level.sigma**2 / level.sigma**2
    return mean_x_0, mean_x_t, beta, beta * next_level.sigma**2 / level.sigma**2


def ddim(
    denoiser: Denoiser, x: Tensor, schedule: Schedule, draws: Draws, steps: int, eta: float = 0.0
) -> Tensor:
    """Sample by DDIM (Song et al. 2021, equations 12 and 16); eta 0 draws no noise, 1 is DDPM's."""
    for number, level, next_level in _transitions(schedule, steps, len(x)):
        x_0, eps, _ = denoiser(x, level.t)
        noise_sigma = eta * math.sqrt(posterior_coefficients(level, next_level)[3])
        sigma = math.sqrt(max(next_level.sigma**2 - noise_sigma**2, 0.0))
        x = q_sample(x_0, eps, next_level.alpha, sigma)
        if noise_sigma:
            x = x + noise_sigma * _noise_like(x, draws, "ddim", number)
    return x


def ddim_inverse(
    denoiser: Denoiser, x: Tensor, schedule: Schedule, steps: int, repeats: int = 3
) -> Tensor:
    """Return the noise that `ddim` (eta 0) maps to x, by inverting it step by step.

    A step is x_s = cos(d) x_t - sin(d) v(x_t) with the angle difference d of `heun`, hence
    x_t = (x_s + sin(d) v(x_t)) / cos(d), which is solved by `repeats` fixed-point iterations from
    x_s. One iteration is the approximate inverse of Song et al. 2021 (section 4.3).
    """
    for _, level, next_level in reversed(list(_transitions(schedule, steps, 0))):
        angle = level.angle - next_level.angle
        known = x
        for _ in range(repeats):
            x_0, eps, _ = denoiser(x, level.t)
            v = to_prediction("v", x_0, eps, level.alpha, level.sigma)
            x = (known + math.sin(angle) * v) / math.cos(angle)
    return x


def dpmpp_2m(denoiser: Denoiser, x: Tensor, schedule: Schedule, draws: Draws, steps: int) -> Tensor:
    """Sample by DPM-Solver++(2M) (Lu et al. 2022, algorithm 2); the last step is of first order."""
    previous_x_0, previous_h = None, 0.0
    for _, level, next_level in _transitions(schedule, steps, len(x)):
        x_0 = denoiser(x, level.t).x_0
        h = next_level.half_log_snr - level.half_log_snr
        data = x_0
        if previous_x_0 is not None and next_level is not CLEAN:
            half_inverse_ratio = h / (2 * previous_h)  # 0 after a first step from pure noise
            data = (1 + half_inverse_ratio) * x_0 - half_inverse_ratio * previous_x_0
        x = (next_level.sigma / level.sigma) * x - next_level.alpha * math.expm1(-h) * data
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
    for _, level, next_level in _transitions(schedule, steps, len(x)):
        x_0, eps, _ = denoiser(x, level.t)
        predicted = q_sample(x_0, eps, next_level.alpha, next_level.sigma)
        if next_level is CLEAN:
            return predicted
        corrector = denoiser(predicted, next_level.t)
        mean_x_0, mean_eps = (x_0 + corrector.x_0) / 2, (eps + corrector.eps) / 2
        v = to_prediction("v", mean_x_0, mean_eps, level.alpha, level.sigma)
        angle = level.angle - next_level.angle
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
    """Sample by name; `eta` is used by ddim only, `variance` by ddpm only."""
    if name == "ddpm":
        return ddpm(denoiser, x, schedule, draws, steps, variance)
    if name == "ddim":
        return ddim(denoiser, x, schedule, draws, steps, eta)
    return {"dpmpp_2m": dpmpp_2m, "heun": heun}[name](denoiser, x, schedule, draws, steps)


def _noise_like(x: Tensor, draws: Draws, purpose: str, number: int) -> Tensor:
    _, channels, height, width = x.shape
    noise = draws.at(number).normal(purpose, (height, width, channels), x.dtype)
    return noise.permute(0, 3, 1, 2)
