"""The flow objective: likelihood of dequantized images, sampling and visualizations."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from dgm.common.progress import advance
from dgm.common.validation import check_range
from dgm.flow import actnorm_init
from dgm.flow.networks import Flow, normal_log_prob
from dgm.latent_space import lerp_path
from dgm.objective import Batch, Nets, Phase
from dgm.preprocessing import DEQUANTIZED, draw_flips, flip_images
from dgm.rng import Draws

_LEVEL_BITS = -math.log2(DEQUANTIZED.bin_width)  # 7
_COLUMNS = 10  # columns of an image grid
_MAX_PAIRS = 6
_TEMPERATURES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True)
class FlowConfig:
    """Augmentation of the flow's training images."""

    flip: bool = True
    """Mirror each image with probability 1/2."""


@dataclass(frozen=True)
class FlowSampleConfig:
    """How images are sampled from a trained flow."""

    temperature: float = 0.7
    """Standard deviation of z; below 1 (the prior's) for more typical, less varied images."""
    batch: int = 250
    """Images per pass of each process; has no effect on the images."""


class FlowObjective:
    """Train one network, `flow`, by the likelihood of uniformly dequantized images.

    The likelihood is exact for dequantized data. For stored images it is a bound: the negative log
    density of x + u, averaged over the noise u, is at least the negative log of the mass that the
    model gives x (Theis et al. 2016, section 3.1).
    """

    phases = (Phase("likelihood", "flow"),)
    num_classes: int | None = None
    exact = True
    pixels = DEQUANTIZED

    def __init__(
        self,
        config: FlowConfig,
        sample: FlowSampleConfig,
        image_shape: tuple[int, int, int],
        dtype: torch.dtype = torch.float32,
    ):
        """Set up for images of shape (H, W, C); raise UserError for invalid settings."""
        _check(sample)
        self.config, self.sample_config = config, sample
        self.image_shape, self.dtype = image_shape, dtype

    def loss(self, nets: Nets, batch: Batch, phase: Phase, draws: Draws) -> dict[str, Tensor]:
        """Return the bound on -log2 of the mass of stored images and its terms, each [].

        loss = 7 - log_prob_z - log_det in bits per dimension, exact for dequantized data and a
        bound for stored images; 7 is -log2 of the width of a grey level, 1/128.
        """
        z, log_det = nets[phase.net](self._training_images(batch, draws))
        bits = 1 / (z.shape[1] * math.log(2))
        log_prob_z, log_det = bits * normal_log_prob(z).mean(), bits * log_det.mean()
        return {
            "loss": _LEVEL_BITS - log_prob_z - log_det,
            "log_prob_z_bits_per_dim": log_prob_z,
            "log_det_bits_per_dim": log_det,
        }

    def latents(self, draws: Draws) -> Tensor:
        """Draw z from the prior, [B, D]."""
        return draws.normal("latent", (math.prod(self.image_shape),), self.dtype)

    def encode(self, nets: Nets, batch: Batch, draws: Draws) -> Tensor:
        """Map stored images, dequantized, to z, [B, D]."""
        return nets["flow"](self.pixels.dequantize(batch.images, draws, self.dtype))[0]

    def decode(self, nets: Nets, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Map z to images, clipped to [-1, 1]; `labels` is unused."""
        return cast(Flow, nets["flow"]).inverse(z).clamp(-1, 1)

    @torch.no_grad()
    def sample(
        self, nets: Nets, count: int, labels: Tensor | None, draws: Draws, **knobs: Any
    ) -> Tensor:
        """Sample `count` images, [count, C, H, W] in [-1, 1]; image i by the draws of index i.

        `knobs` replace fields of the run's FlowSampleConfig; `labels` is unused.
        """
        config = FlowSampleConfig(**{**vars(self.sample_config), **knobs})
        _check(config)
        parts = []
        for start in range(0, count, config.batch):
            part_draws = draws.part(slice(start, min(start + config.batch, count)))
            parts.append(self.decode(nets, config.temperature * self.latents(part_draws)))
            advance(len(parts[-1]))
        return torch.cat(parts)

    @torch.no_grad()
    def nats(self, nets: Nets, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """Return the terms of -log(density x volume of a grey level's bin), nats, each [B].

        `prior` is -log N(z), `log_det` the negated log_det, `dequantization` D log 128. Their sum
        is exact for dequantized data; its mean over the noise bounds -log P of the stored image.
        """
        z, log_det = nets["flow"](self.pixels.dequantize(batch.images, draws, self.dtype))
        levels = torch.full_like(log_det, -z.shape[1] * math.log(DEQUANTIZED.bin_width))
        return {"prior": -normal_log_prob(z), "log_det": -log_det, "dequantization": levels}

    @torch.no_grad()
    def visualize(self, nets: Nets, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """Return image grids by name, each [rows, 10, C, H, W] in [-1, 1].

        `interpolation`: linear in z between two images per row; `temperatures`: the same latents
        at temperatures from 0.5 to 1, one per row.
        """
        rows = min(_MAX_PAIRS, max(1, len(batch.images) // 2))
        part = slice(2 * rows)
        z = self.encode(nets, Batch(batch.images[part], batch.labels[part]), draws.part(part))
        lines = lerp_path(z[:rows], z[-rows:], _COLUMNS)
        index = torch.arange(_COLUMNS, device=z.device)
        latents = self.latents(Draws(draws.key, index, torch.zeros_like(index)))
        scaled = torch.stack([temperature * latents for temperature in _TEMPERATURES])

        def decoded(z: Tensor) -> Tensor:
            return self.decode(nets, z.flatten(0, 1)).unflatten(0, tuple(z.shape[:2]))

        return {"interpolation": decoded(lines), "temperatures": decoded(scaled)}

    def initialize(self, nets: Nets, batch: Batch, draws: Draws) -> None:
        """Initialize each actnorm to standardize its output on these images."""
        actnorm_init.initialize(nets["flow"], self._training_images(batch, draws))

    def find_non_finite(self, nets: Nets, batch: Batch, draws: Draws) -> str | None:
        """Return the first layer whose output for these images is not finite; None if all are."""
        return actnorm_init.find_non_finite(nets["flow"], self._training_images(batch, draws))

    def _training_images(self, batch: Batch, draws: Draws) -> Tensor:
        """Return the images flipped and dequantized as in training."""
        images = batch.images
        if self.config.flip:
            images = flip_images(images, draw_flips(draws))
        return self.pixels.dequantize(images, draws, self.dtype)


def _check(sample: FlowSampleConfig) -> None:
    check_range(sample, "sample.", "temperature", above=0)
    check_range(sample, "sample.", "batch", min=1)
