"""The settings of a diffusion model, and of making images with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dgm.diffusion.parameterization import PredictionKind, Weighting
from dgm.diffusion.samplers import SamplerName


@dataclass(frozen=True)
class DiffusionConfig:
    """What is noised how, and what the network learns of it; the defaults are DDPM's."""

    schedule: Literal["linear", "cosine"] = "linear"
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
    """Where `min_snr` clamps the signal-to-noise ratio."""
    learned_variance: bool = False
    """Learn the variance of each step too (improved DDPM's hybrid loss)."""
    vlb_weight: float = 0.001
    """Weight of the variational bound (bits per dimension) where the variance is learned."""
    class_conditional: bool = True
    """Tell the network the class."""
    label_drop: float = 0.1
    """Share of images whose class is withheld, which is what guidance needs."""
    flip: bool = True
    """Mirror each image with probability 1/2."""
    dequantize: bool = False
    """Add uniform noise of one grey level to the pixels."""


@dataclass(frozen=True)
class SampleConfig:
    """How images are made from a trained network."""

    sampler: SamplerName = "ddim"
    """ddpm (ancestral), ddim, dpmpp_2m or heun."""
    steps: int = 50
    """Number of steps, 1 to diffusion.num_timesteps."""
    guidance: float = 1.0
    """Classifier-free guidance: 1 is the conditional model, more is closer to the class."""
    eta: float = 0.0
    """Noise of DDIM: 0 none, 1 as much as DDPM."""
    variance: Literal["small", "large", "learned"] = "large"
    """Variance of the ddpm sampler."""
    clip: bool = True
    """Hold the predicted image within [-1, 1] at each step."""
    batch: int = 250
    """Images per forward pass of each process; has no effect on the images."""
