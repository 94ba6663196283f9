"""Settings of a diffusion model and of sampling from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dgm.common.errors import UserError
from dgm.common.validation import check_range
from dgm.diffusion.parameterization import PredictionKind, Weighting
from dgm.diffusion.samplers import SamplerName
from dgm.diffusion.schedule import ScheduleKind

_MAX_TIMESTEPS = 100_000


@dataclass(frozen=True)
class DiffusionConfig:
    """Forward process and training target; the defaults are DDPM's."""

    schedule: ScheduleKind = "linear"
    """Noise schedule."""
    num_timesteps: int = 1000
    """Number of noise levels T."""
    zero_terminal_snr: bool = False
    """Rescale the schedule so that the last level is pure noise; needs prediction v or x_0."""
    prediction: PredictionKind = "eps"
    """What the network predicts."""
    weighting: Weighting = "simple"
    """Weight of each timestep in the loss."""
    min_snr_gamma: float = 5.0
    """Signal-to-noise ratio at which `min_snr` clamps the weight."""
    learned_variance: bool = False
    """Learn the variance of each step too (improved DDPM's hybrid loss)."""
    vlb_weight: float = 0.001
    """Weight of the variational bound (bits per dimension) where the variance is learned."""
    class_conditional: bool = True
    """Condition the network on the class."""
    label_drop: float = 0.1
    """Fraction of images trained without their class, which guidance needs."""
    flip: bool = True
    """Mirror each image with probability 1/2."""
    dequantize: bool = False
    """Add uniform noise of one grey level to the pixels."""


@dataclass(frozen=True)
class DiffusionSampleConfig:
    """How images are sampled from a trained network."""

    sampler: SamplerName = "ddim"
    """ddpm (ancestral), ddim, dpmpp_2m or heun."""
    steps: int = 50
    """Number of steps, 1 to diffusion.num_timesteps."""
    guidance: float = 1.0
    """Scale of classifier-free guidance: 1 is the conditional model, 0 the unconditional one."""
    eta: float = 0.0
    """Noise of DDIM: 0 none, 1 as much as DDPM."""
    variance: Literal["small", "large", "learned"] = "large"
    """Variance of the ddpm sampler."""
    clip: bool = True
    """Clip the predicted image to [-1, 1] at each step."""
    batch: int = 250
    """Images per forward pass of each process; has no effect on the images."""


def check_settings(config: DiffusionConfig, sample: DiffusionSampleConfig) -> None:
    """Raise UserError for settings out of range or in conflict."""
    check_range(config, "diffusion.", "num_timesteps", min=2, max=_MAX_TIMESTEPS)
    if config.zero_terminal_snr and config.prediction == "eps":
        raise UserError(
            "diffusion.zero_terminal_snr true leaves diffusion.prediction 'eps' nothing to learn "
            "at the last timestep: choose v or x_0"
        )
    check_range(config, "diffusion.", "label_drop", min=0, max=1)
    check_range(config, "diffusion.", "min_snr_gamma", above=0)
    check_range(config, "diffusion.", "vlb_weight", min=0)
    check_range(sample, "sample.", "guidance", min=0)
    if sample.guidance != 1 and (config.label_drop == 0 or not config.class_conditional):
        raise UserError(
            f"sample.guidance is {sample.guidance}, but the run trains without "
            "diffusion.class_conditional or with diffusion.label_drop 0: set it to 1"
        )
    if sample.variance == "learned" and not config.learned_variance:
        raise UserError(
            "sample.variance is 'learned', but diffusion.learned_variance is false: "
            "choose small or large"
        )
    if not 1 <= sample.steps <= config.num_timesteps:
        raise UserError(
            f"sample.steps is {sample.steps}: choose 1 to {config.num_timesteps}, "
            "which is diffusion.num_timesteps"
        )
    check_range(sample, "sample.", "eta", min=0, max=1)
    check_range(sample, "sample.", "batch", min=1)
