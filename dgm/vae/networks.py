"""The net of a VAE: encoder and decoder, each plain or an encoder-decoder of its own.

Sizes of features for images of side 32 and four levels:

                  encoder                          decoder
plain             32 16 8 4 -> latent              latent -> 4 8 16 32
encoder_decoder   32 16 8 4 8 16 32 -> latent      latent -> 32 16 8 4 8 16 32

No skip leads past the smallest features. Only residual branches hold what is not linear, so that
an image and its latent have to do with each other from the first step on, and brightness and colour
pass unhurt where no GroupNorm takes them for a scale to be undone.

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
from dgm.vae.likelihood import Pixels
from dgm.vae.posterior import Posterior

Side = Literal["plain", "encoder_decoder"]

LOG_VAR_BOUNDS = (-12.0, 6.0)
# A scale of e^-7 is a ninth of a grey level: what is smaller makes no level more probable.
LOG_SCALE_BOUNDS = (-7.0, 2.0)
# What the net says at first: pixels spread around grey about as far as they do, and latents that
# lie close to their means, so that learning to encode does not begin in noise.
_FIRST_LOG_SCALE = -1.0
_FIRST_LOG_VAR = -4.0
# Adam moves a number by about the learning rate at each step. A scale of its own for each channel
# has to fall by e^3 or more while the first things are learned.
_PACE = 10.0


@dataclass(frozen=True)
class VAENetConfig:
    """Shape of the VAE's net; the defaults are those of vae_1_plain.yaml."""

    encoder: Side = "plain"
    """plain: features shrink up to the latent; encoder_decoder: they shrink and grow again."""
    decoder: Side = "plain"
    """plain: features grow from the latent on; encoder_decoder: they shrink first."""
    latent: int = 256
    """Dimensions of the latent."""
    encoder_channels: int = 64
    """Width of the encoder's first level."""
    decoder_channels: int = 64
    """Width of the decoder's first level, the one of the image's size."""
    channel_mult: list[int] = field(default_factory=lambda: [1, 2, 4, 4])
    """Width of each level, as a multiple of the first; each level halves the image."""
    num_blocks: list[int] = field(default_factory=lambda: [2, 2, 2, 2])
    """Residual blocks of each level, each time that features pass it; 0 only resizes."""
    norm: Literal["none", "group"] = "none"
    """What comes before each SiLU of a residual block: nothing or GroupNorm."""


class ResidualBlock(nn.Module):
    """Add to features what SiLU and convolution, twice, make of them: nothing at first."""

    recomputable = True

    def __init__(self, channels: int, norm: bool = False):
        """Prepare for [B, channels, H, W]; `norm` puts a GroupNorm before each SiLU."""
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
    """Say q(z | x) of images."""

    def __init__(self, config: VAENetConfig, image_shape: tuple[int, int, int]):
        """Build for images of shape (H, W, C)."""
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
        mu, log_var = _precisely(self.exit, h.flatten(1)).chunk(2, dim=1)
        return Posterior(mu, soft_clamp(log_var + _FIRST_LOG_VAR, *LOG_VAR_BOUNDS))


class Decoder(nn.Module):
    """Say p(x | z) of latents, pixel by pixel."""

    def __init__(
        self, config: VAENetConfig, image_shape: tuple[int, int, int], pixel_scale: bool = True
    ):
        """Build for images (H, W, C); a scale for each pixel, else one learned for each channel."""
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

    def forward(self, z: Tensor) -> Pixels:
        """Map latents to the distribution of each pixel of an image in [-1, 1]."""
        h = self.widen(self.entry(z).reshape(-1, *self.first_shape))
        said = _precisely(self.exit, self.path(h))
        if self.log_scale is None:
            mean, log_scale = said.chunk(2, dim=1)
        else:
            mean, log_scale = said, (_PACE * self.log_scale).expand_as(said)
        return Pixels(mean, soft_clamp(log_scale + _FIRST_LOG_SCALE, *LOG_SCALE_BOUNDS))


class VAE(nn.Module):
    """Encoder and decoder behind one forward pass."""

    def __init__(
        self, config: VAENetConfig, image_shape: tuple[int, int, int], pixel_scale: bool = True
    ):
        """Build for images of shape (H, W, C); raises UserError where sizes do not divide."""
        super().__init__()
        _check(config, image_shape)
        self.encoder = Encoder(config, image_shape)
        self.decoder = Decoder(config, image_shape, pixel_scale)

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Posterior, Pixels]:
        """Encode images in [-1, 1], draw z by standard normal noise [B, latent], and decode it."""
        posterior = self.encoder(x)
        return posterior, self.decoder(posterior.at(noise))


def soft_clamp(x: Tensor, low: float, high: float) -> Tensor:
    """Hold x between `low` and `high` smoothly: the identity between, flat beyond."""
    x = high - functional.softplus(high - x)
    return low + functional.softplus(x - low)


def _levels(side: Side, count: int) -> list[int]:
    """Number the levels in the encoder's order; 0 is the image's size, each further one half."""
    down = list(range(count))
    return down if side == "plain" else down + down[-2::-1]


def _path(levels: list[int], widths: list[int], config: VAENetConfig) -> nn.Sequential:
    norm = config.norm == "group"
    layers: list[nn.Module] = []
    for k, here in enumerate(levels):
        if k:
            layers.append(_resize(widths[levels[k - 1]], widths[here], here > levels[k - 1]))
        layers += [ResidualBlock(widths[here], norm) for _ in range(config.num_blocks[here])]
    return nn.Sequential(*layers)


def _resize(inputs: int, outputs: int, shrink: bool) -> nn.Module:
    layer = (nn.Conv2d if shrink else nn.ConvTranspose2d)(inputs, outputs, 2, stride=2)
    # Features keep their size through all levels, and biases do not drown them: so what an image
    # and its latent have to do with each other shows at once, before any block has learned.
    nn.init.normal_(layer.weight, std=(inputs * (4 if shrink else 1)) ** -0.5)
    assert layer.bias is not None, "layers here have a bias"
    nn.init.zeros_(layer.bias)
    return layer


def _narrow_width(widths: list[int], level: int) -> int:
    # As many numbers as the smallest features hold, so that the linear layer beside the latent is
    # equally large in all architectures.
    return max(1, widths[-1] >> 2 * (len(widths) - 1 - level))


def _pointwise(inputs: int, outputs: int) -> nn.Module:
    return nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)


def _precisely(layer: nn.Linear | nn.Conv2d, h: Tensor) -> Tensor:
    # Without autocast: bfloat16 would round the means of bright pixels to half a grey level.
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
    if len(config.num_blocks) != levels or min(config.num_blocks) < 0:
        raise UserError(
            f"model.num_blocks is {config.num_blocks}: give {levels} numbers of 0 or more, one for "
            f"each of model.channel_mult {config.channel_mult}"
        )
    factor = 2 ** (levels - 1)
    if image_shape[0] % factor or image_shape[1] % factor:
        raise UserError(
            f"images of {image_shape[0]} x {image_shape[1]} do not divide by {factor}, which the "
            f"{levels} levels of model.channel_mult {config.channel_mult} ask for: resize them or "
            "use fewer levels"
        )
    for name in ("encoder", "decoder"):
        if getattr(config, name) == "encoder_decoder" and levels == 1:
            raise UserError(
                f"model.{name} is encoder_decoder, but model.channel_mult {config.channel_mult} "
                "has one level, so that nothing shrinks: give two levels or more"
            )
