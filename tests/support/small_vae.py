"""A small VAE objective, nets and batches for it, and nets whose likelihood is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from dgm.objective import Batch
from dgm.rng import Draws
from dgm.vae.likelihood import PixelDistribution
from dgm.vae.networks import VAE, VAENetConfig
from dgm.vae.objective import VAEConfig, VAEObjective, VAESampleConfig
from dgm.vae.posterior import Posterior

SHAPE = (8, 8, 3)
TINY = VAENetConfig(
    latent=6, encoder_channels=8, decoder_channels=8, channel_mult=[1, 2, 2], num_blocks=[1, 1, 1]
)
SMALL = VAEConfig(kl_warmup_images=0)
ARCHITECTURES = {
    "plain": ("plain", "plain"),
    "encoder": ("encoder_decoder", "plain"),
    "decoder": ("plain", "encoder_decoder"),
    "both": ("encoder_decoder", "encoder_decoder"),
}


def objective(
    config: VAEConfig = SMALL,
    sample: VAESampleConfig | None = None,
    latent: int = TINY.latent,
    dtype: torch.dtype = torch.float64,
) -> VAEObjective:
    return VAEObjective(config, sample or VAESampleConfig(), latent, dtype)


def architecture(name: str, config: VAENetConfig = TINY) -> VAENetConfig:
    encoder, decoder = ARCHITECTURES[name]
    return replace(config, encoder=encoder, decoder=decoder)


def net(name: str = "plain", pixel_scale: bool = True, norm: str = "none") -> VAE:
    made = VAE(replace(architecture(name), norm=norm), SHAPE, pixel_scale)
    with torch.no_grad():  # some weights start at zero and would hide others
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return made.double()


def batch(count: int, images_seen: int = 0) -> tuple[Batch, Draws]:
    index = torch.arange(count)
    images = Draws.of(9, index).uniform("images", SHAPE).mul(256).byte()
    return Batch(images, index % 5, images_seen), Draws.of(0, index)


def loss(made: VAEObjective, vae: nn.Module, given: tuple[Batch, Draws]) -> dict[str, Tensor]:
    return made.loss({"vae": vae}, given[0], made.phases[0], given[1])


def colours(count: int) -> Tensor:
    """Return images uint8 [count, H, W, C] of two random colours side by side.

    They are learned quickly; noise would have to be learned pixel by pixel.
    """
    halves = Draws.of(9, torch.arange(count)).uniform("colours", (1, 2, 3)).mul(256).byte()
    return halves.repeat_interleave(SHAPE[1] // 2, dim=2).expand(-1, SHAPE[0], -1, -1)


def fit(made: VAEObjective, vae: VAE, images: Tensor, steps: int, lr: float) -> list[float]:
    """Train on the same images with a decaying learning rate; return bits per dimension."""
    optimizer = torch.optim.Adam(vae.parameters(), lr=lr)
    labels = torch.zeros(len(images), dtype=torch.int64)
    bits = []
    for step in range(steps):
        whole = Batch(images, labels, step * len(images))
        found = loss(made, vae, (whole, Draws.of(0, torch.arange(len(images)), step)))
        optimizer.zero_grad()
        found["loss"].backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        optimizer.step()
        bits.append(float(found["bits_per_dim_bound"].detach()))
    return bits


class Known(nn.Module):
    """A VAE of images of two grey pixels, each determined by its own latent.

    Pixel i has mean `slope z_i + offset` and one scale; the posterior is a guess, the same for
    all images.
    """

    def __init__(self, slope: float, offset: float, log_scale: float):
        super().__init__()
        self.slope, self.offset, self.log_scale = slope, offset, log_scale
        self.encoder: Callable[[Tensor], Posterior] = self.encode
        self.decoder: Callable[[Tensor], PixelDistribution] = self.decode

    def encode(self, x: Tensor) -> Posterior:
        mu = 0.5 * (x.flatten(1) - self.offset) / self.slope
        return Posterior(mu, torch.full_like(mu, -0.5))

    def decode(self, z: Tensor) -> PixelDistribution:
        mean = (self.slope * z + self.offset)[:, None, None, :]
        return PixelDistribution(mean, torch.full_like(mean, self.log_scale))
