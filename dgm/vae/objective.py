"""The VAE objective: training loss, sampling, bounds and visualizations."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor

from dgm.common.errors import UserError
from dgm.common.progress import advance
from dgm.common.validation import check_range
from dgm.objective import Batch, Nets, Phase
from dgm.preprocessing import DEQUANTIZED, STANDARD, draw_flips, flip_images
from dgm.rng import Draws
from dgm.vae.likelihood import LikelihoodName, reconstruction_nll, sample_pixels
from dgm.vae.networks import VAE
from dgm.vae.posterior import Posterior, apply_free_bits, kl_weight
from dgm.vae.visualization import interpolation, reconstructions, traversal


@dataclass(frozen=True)
class VAEConfig:
    """Terms of the loss; the defaults are those of vae_1_plain.yaml."""

    likelihood: LikelihoodName = "discretized_logistic"
    """p(x | z): the mass of a logistic in each grey level, or a Gaussian on dequantized pixels."""
    scale: Literal["pixel", "channel"] = "pixel"
    """The likelihood's scale: predicted for each pixel, or learned for each channel."""
    beta: float = 1.0
    """Weight of the KL in the loss; with 1 the loss is the bound on -log p."""
    kl_warmup_images: int = 500_000
    """Images over which the weight of the KL rises from 0 to `beta`."""
    free_bits: float = 0.0
    """KL below which a latent dimension of an image is not penalized, nats."""
    flip: bool = True
    """Mirror each image with probability 1/2."""


@dataclass(frozen=True)
class VAESampleConfig:
    """How images are sampled from a trained network."""

    temperature: float = 1.0
    """Standard deviation of the latents; below 1 for more typical, less varied images."""
    add_noise: bool = False
    """Draw each pixel from the likelihood instead of taking its mean."""
    batch: int = 250
    """Images per forward pass of each process; has no effect on the images."""


class VAEObjective:
    """Train one network to encode and decode; sample from its decoder."""

    phases = (Phase("autoencode", "vae"),)
    num_classes = None
    exact = False

    def __init__(
        self,
        config: VAEConfig,
        sample: VAESampleConfig,
        latent: int,
        dtype: torch.dtype = torch.float32,
    ):
        """Set up for `latent` dimensions; raise UserError for invalid settings."""
        _check(config, sample)
        self.config, self.sample_config = config, sample
        self.latent, self.dtype = latent, dtype
        # The Gaussian is a density of dequantized pixels.
        self.pixels = DEQUANTIZED if config.likelihood == "gaussian" else STANDARD

    def loss(self, nets: Nets, batch: Batch, phase: Phase, draws: Draws) -> dict[str, Tensor]:
        """Return the loss of a micro-batch; every named value is a mean over images, [].

        `loss` is (reconstruction_nll + beta KL) / (D ln 2), in bits per dimension, with free bits.
        `elbo` and `bits_per_dim_bound` have beta 1 and no free bits; nats are per image.
        """
        config = self.config
        images = batch.images
        if config.flip:
            images = flip_images(images, draw_flips(draws))
        posterior, pixels = nets[phase.net](
            self.pixels.scale(images, self.dtype), self._noise(draws)
        )
        reconstruction = reconstruction_nll(config.likelihood, images, pixels, draws)
        per_dimension = posterior.kl()
        kl, kl_loss = per_dimension.sum(1), apply_free_bits(per_dimension, config.free_bits)
        beta = kl_weight(config.beta, batch.images_seen, config.kl_warmup_images)
        bits = images[0].numel() * math.log(2)
        return {
            "loss": (reconstruction + beta * kl_loss).mean() / bits,
            "reconstruction_nll": reconstruction.mean(),
            "kl": kl.mean(),
            "elbo": -(reconstruction + kl).mean(),
            "bits_per_dim_bound": (reconstruction + kl).mean() / bits,
            "beta": kl.new_zeros(()).add_(beta),
        }

    def latents(self, draws: Draws) -> Tensor:
        """Draw latents from the prior, [B, latent]."""
        return draws.normal("latent", (self.latent,), self.dtype)

    def encode(self, nets: Nets, batch: Batch, draws: Draws) -> Tensor:
        """Return the means of q(z | x), [B, latent]; `draws` is unused."""
        return self._encode(nets, batch).mu

    def decode(self, nets: Nets, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the decoder's means, clipped to [-1, 1]; `labels` is unused."""
        return cast(VAE, nets["vae"]).decoder(z).mean.clamp(-1, 1)

    def kl_by_latent(self, nets: Nets, batch: Batch) -> Tensor:
        """Return KL(q(z | x) || N(0, 1)) of each latent dimension, nats [B, latent]."""
        return self._encode(nets, batch).kl()

    @torch.no_grad()
    def sample(
        self, nets: Nets, count: int, labels: Tensor | None, draws: Draws, **knobs: Any
    ) -> Tensor:
        """Sample `count` images, [count, C, H, W] in [-1, 1]; image i by the draws of index i.

        `knobs` replace fields of the run's VAESampleConfig.
        """
        config = VAESampleConfig(**{**vars(self.sample_config), **knobs})
        _check(self.config, config)
        parts = []
        for start in range(0, count, config.batch):
            part = slice(start, min(start + config.batch, count))
            part_draws = draws.part(part)
            z = config.temperature * self.latents(part_draws)
            if config.add_noise:
                pixels = cast(VAE, nets["vae"]).decoder(z)
                parts.append(sample_pixels(self.config.likelihood, pixels, part_draws))
            else:
                parts.append(self.decode(nets, z))
            advance(len(z))
        return torch.cat(parts)

    @torch.no_grad()
    def nats(self, nets: Nets, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """Return the terms of the bound on -log p of stored images, by one draw of z, nats [B]."""
        posterior = self._encode(nets, batch)
        pixels = cast(VAE, nets["vae"]).decoder(posterior.sample(self._noise(draws)))
        nll = reconstruction_nll(self.config.likelihood, batch.images, pixels, draws)
        return {"reconstruction_nll": nll, "kl": posterior.kl().sum(1)}

    @torch.no_grad()
    def importance_weighted_nats(
        self, nets: Nets, batch: Batch, draws: Draws, num_samples: int
    ) -> Tensor:
        """Return the importance-weighted bound on -log p, nats [B] (Burda et al. 2016).

        -log mean_k p(x | z_k) p(z_k) / q(z_k | x), z_k from the draws of step k; one decoder pass
        per sample, so memory does not grow with `num_samples`. For one sample its mean is the sum
        of `nats`; for many it converges to -log p. The Gaussian's dequantization noise is drawn per
        sample too, which keeps it a bound.
        """
        if num_samples < 1:
            raise UserError(f"num_samples is {num_samples}: choose 1 or more")
        posterior = self._encode(nets, batch)
        decoder = cast(VAE, nets["vae"]).decoder
        log_sum = posterior.mu.new_full((len(batch.images),), -math.inf)
        for k in range(num_samples):
            sample_draws = draws.at(k)
            noise = self._noise(sample_draws)
            pixels = decoder(posterior.sample(noise))
            nll = reconstruction_nll(self.config.likelihood, batch.images, pixels, sample_draws)
            log_sum = torch.logaddexp(log_sum, posterior.log_ratio(noise) - nll)
        return math.log(num_samples) - log_sum

    @torch.no_grad()
    def visualize(self, nets: Nets, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """Return reconstructions, interpolations and a traversal of two or more images."""
        decode, posterior = partial(self.decode, nets), self._encode(nets, batch)
        x = self.pixels.scale(batch.images, self.dtype)
        return {
            "reconstructions": reconstructions(decode, x, posterior.mu),
            "interpolation": interpolation(decode, posterior.mu),
            "traversal": traversal(decode, posterior),
        }

    def _encode(self, nets: Nets, batch: Batch) -> Posterior:
        return cast(VAE, nets["vae"]).encoder(self.pixels.scale(batch.images, self.dtype))

    def _noise(self, draws: Draws) -> Tensor:
        return draws.normal("posterior", (self.latent,), self.dtype)


def _check(config: VAEConfig, sample: VAESampleConfig) -> None:
    check_range(config, "vae.", "beta", "kl_warmup_images", "free_bits", min=0)
    check_range(sample, "sample.", "temperature", above=0)
    check_range(sample, "sample.", "batch", min=1)
