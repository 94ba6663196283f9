"""The VAE's network: encoder and decoder, each plain or itself an encoder-decoder.

Feature sizes for images of side 32 and four levels:

                  encoder                          decoder
plain             32 16 8 4 -> latent              latent -> 4 8 16 32
encoder_decoder   32 16 8 4 8 16 32 -> latent      latent -> 32 16 8 4 8 16 32

No skip connection bypasses the smallest features. Only the residual branches are nonlinear, so that
image and latent are related from the first step on. GroupNorm, which would remove
brightness and colour, is off by default.

Shapes: images [B, C, H, W], latents [B, latent].
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from dgm.common.errors import UserError
from dgm.common.validation import check_range
from dgm.nn.layers import group_norm, zeroed
from dgm.vae.likelihood import PixelDistribution
from dgm.vae.posterior import Posterior

Shape = Literal["plain", "encoder_decoder"]

LOG_VAR_BOUNDS = (-12.0, 6.0)
# A scale of e^-7 is a ninth of a grey level; smaller ones make no level more probable.
LOG_SCALE_BOUNDS = (-7.0, 2.0)
# At initialization the pixel scale is about the spread of pixels around grey, and the posterior is
# narrow, so that learning to encode does not begin in noise.
_INITIAL_LOG_SCALE = -1.0
_INITIAL_LOG_VAR = -4.0
# Multiplies the learned scale per channel: Adam moves a parameter by about the learning rate per
# step, but this scale has to fall by a factor of e^3 or more early in training.
_LOG_SCALE_GAIN = 10.0


@dataclass(frozen=True)
class VAENetConfig:
    """Shape of the VAE's network; the defaults are those of vae_1_plain.yaml."""

    encoder: Shape = "plain"
    """plain: features shrink up to the latent; encoder_decoder: they shrink and grow again."""
    decoder: Shape = "plain"
    """plain: features grow from the latent; encoder_decoder: they shrink first."""
    latent: int = 256
    """Dimensions of the latent."""
    encoder_channels: int = 64
    """Width of the encoder's first level."""
    decoder_channels: int = 64
    """Width of the decoder's level at full resolution."""
    channel_mult: list[int] = field(default_factory=lambda: [1, 2, 4, 4])
    """Width of each level, as a multiple of the first; each further level halves the image."""
    num_blocks: list[int] = field(default_factory=lambda: [2, 2, 2, 2])
    """Residual blocks per level, for each pass through it; 0 only resizes."""
    norm: Literal["none", "group"] = "none"
    """Normalization before each SiLU of a residual block."""


class VAEBlock(nn.Module):
    """SiLU and convolution, twice, added to the input; the identity at initialization."""

    recomputable = True

    def __init__(self, channels: int, norm: bool = False):
        """Build for [B, channels, H, W]; `norm` puts a GroupNorm before each SiLU."""
        super().__init__()

        def half(conv: nn.Conv2d) -> list[nn.Module]:
            return [group_norm(channels) if norm else nn.Identity(), nn.SiLU(), conv]

        first = nn.Conv2d(channels, channels, 3, padding=1)
        second = zeroed(nn.Conv2d(channels, channels, 3, padding=1))
        self.body = nn.Sequential(*half(first), *half(second))

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, channels, H, W] to the same."""
        return x + self.body(x)


class Encoder(nn.Module):
    """Map images to q(z | x)."""

    def __init__(self, config: VAENetConfig, image_shape: tuple[int, int, int]):
        super().__init__()
        height, width, channels = image_shape
        widths = [config.encoder_channels * m for m in config.channel_mult]
        levels = _levels(config.encoder, len(widths))
        last = levels[-1]
        narrow = _narrow_width(widths, last)
        self.entry = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.path = _path(levels, widths, config)
        self.narrow = _pointwise(widths[last], narrow)
        features = narrow * (height >> last) * (width >> last)
        self.exit = nn.Linear(features, 2 * config.latent)

    def forward(self, x: Tensor) -> Posterior:
        """Map images in [-1, 1] to mu and log_var, each [B, latent]."""
        h = self.narrow(self.path(self.entry(x)))
        mu, log_var = _without_autocast(self.exit, h.flatten(1)).chunk(2, dim=1)
        return Posterior(mu, soft_clamp(log_var + _INITIAL_LOG_VAR, *LOG_VAR_BOUNDS))


class Decoder(nn.Module):
    """Map latents to p(x | z), independent for each pixel."""

    def __init__(
        self, config: VAENetConfig, image_shape: tuple[int, int, int], pixel_scale: bool = True
    ):
        """Build for images (H, W, C); `pixel_scale`: a scale per pixel, else one per channel."""
        super().__init__()
        height, width, channels = image_shape
        widths = [config.decoder_channels * m for m in config.channel_mult]
        levels = _levels(config.decoder, len(widths))[::-1]
        first = levels[0]
        narrow = _narrow_width(widths, first)
        self.first_shape = narrow, height >> first, width >> first
        self.entry = nn.Linear(config.latent, narrow * self.first_shape[1] * self.first_shape[2])
        self.widen = _pointwise(narrow, widths[first])
        self.path = _path(levels, widths, config)
        outputs = 2 * channels if pixel_scale else channels
        self.exit = zeroed(nn.Conv2d(widths[0], outputs, 3, padding=1))
        self.log_scale = None if pixel_scale else nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, z: Tensor) -> PixelDistribution:
        """Map latents to the distribution of images in [-1, 1]."""
        h = self.widen(self.entry(z).reshape(-1, *self.first_shape))
        out = _without_autocast(self.exit, self.path(h))
        if self.log_scale is None:
            mean, log_scale = out.chunk(2, dim=1)
        else:
            mean, log_scale = out, (_LOG_SCALE_GAIN * self.log_scale).expand_as(out)
        return PixelDistribution(
            mean, soft_clamp(log_scale + _INITIAL_LOG_SCALE, *LOG_SCALE_BOUNDS)
        )


class VAE(nn.Module):
    """Encoder and decoder in one forward pass."""

    def __init__(
        self, config: VAENetConfig, image_shape: tuple[int, int, int], pixel_scale: bool = True
    ):
        """Build for images of shape (H, W, C); raise UserError where sizes are not divisible."""
        super().__init__()
        _check(config, image_shape)
        self.encoder = Encoder(config, image_shape)
        self.decoder = Decoder(config, image_shape, pixel_scale)

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Posterior, PixelDistribution]:
        """Encode images in [-1, 1], sample z with standard normal noise [B, latent], decode it."""
        posterior = self.encoder(x)
        return posterior, self.decoder(posterior.sample(noise))


def soft_clamp(x: Tensor, low: float, high: float) -> Tensor:
    """Clamp x to [low, high] smoothly."""
    x = high - functional.softplus(high - x)
    return low + functional.softplus(x - low)


def _levels(shape: Shape, count: int) -> list[int]:
    """Return the levels in the encoder's order; level i has the image's size / 2^i."""
    down = list(range(count))
    return down if shape == "plain" else down + down[-2::-1]


def _path(levels: list[int], widths: list[int], config: VAENetConfig) -> nn.Sequential:
    norm = config.norm == "group"
    layers: list[nn.Module] = []
    for k, level in enumerate(levels):
        if k:
            layers.append(_resize(widths[levels[k - 1]], widths[level], level > levels[k - 1]))
        layers += [VAEBlock(widths[level], norm) for _ in range(config.num_blocks[level])]
    return nn.Sequential(*layers)


def _resize(inputs: int, outputs: int, shrink: bool) -> nn.Module:
    layer = (nn.Conv2d if shrink else nn.ConvTranspose2d)(inputs, outputs, 2, stride=2)
    # Features keep their variance through all levels and biases start at zero, so that image and
    # latent are related before any block has learned.
    nn.init.normal_(layer.weight, std=(inputs * (4 if shrink else 1)) ** -0.5)
    assert layer.bias is not None, "the layer is built with a bias"
    nn.init.zeros_(layer.bias)
    return layer


def _narrow_width(widths: list[int], level: int) -> int:
    # Channels for as many values (channels x positions) as at the deepest level, so that the linear
    # layer at the latent has the same size in all architectures.
    return max(1, widths[-1] >> 2 * (len(widths) - 1 - level))


def _pointwise(inputs: int, outputs: int) -> nn.Module:
    return nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)


def _without_autocast(layer: nn.Linear | nn.Conv2d, h: Tensor) -> Tensor:
    # bfloat16 would round the means of bright pixels to half a grey level.
    with torch.autocast(h.device.type, enabled=False):
        return cast(Tensor, layer(h.to(layer.weight.dtype)))


def _check(config: VAENetConfig, image_shape: tuple[int, int, int]) -> None:
    levels = len(config.channel_mult)
    check_range(config, "model.", "latent", "encoder_channels", "decoder_channels", min=1)
    check_range(config, "model.", "num_blocks", min=0, max=100)
    if levels == 0 or min(config.channel_mult) < 1:
        raise UserError(
            f"model.channel_mult is {config.channel_mult}: give at least one level, with numbers "
            "of 1 or more"
        )
    if len(config.num_blocks) != levels:
        raise UserError(
            f"model.num_blocks is {config.num_blocks}: give {levels} numbers of 0 or more, one for "
            f"each of model.channel_mult {config.channel_mult}"
        )
    factor = 2 ** (levels - 1)
    if image_shape[0] % factor or image_shape[1] % factor:
        raise UserError(
            f"the image size {image_shape[0]} x {image_shape[1]} is not divisible by {factor}, "
            f"which the {levels} levels of model.channel_mult {config.channel_mult} require: "
            "resize the images or use fewer levels"
        )
    for name in ("encoder", "decoder"):
        if getattr(config, name) == "encoder_decoder" and levels == 1:
            raise UserError(
                f"model.{name} is encoder_decoder, but model.channel_mult {config.channel_mult} "
                "has one level, so that nothing shrinks: give two levels or more"
            )
