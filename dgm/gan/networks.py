"""Generators and discriminators: DCGAN and SN-GAN's residual networks.

    generator:      latent [B, L] -> 4x4 -> 8x8 -> ... -> image [B, C, H, W] in [-1, 1]
    discriminator:  image [B, C, H, W] -> ... -> 4x4 -> logit [B]

Classes condition the generator by class-conditional BatchNorm and the discriminator by projection
(Miyato and Koyama 2018). Labels concatenated to the latent dominate it: each class collapses to
one image. Labels are int64 [B], None for unconditional networks. Images have sides 4 * 2^doublings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm

from dgm.common.errors import UserError
from dgm.common.validation import check_range
from dgm.gan.batch_norm import BatchNorm
from dgm.nn.layers import Embedding, upsample


@dataclass(frozen=True)
class GanNetConfig:
    """Generator and discriminator; the defaults are DCGAN's for images of 32 x 32."""

    architecture: Literal["dcgan", "residual"] = "dcgan"
    """dcgan (Radford et al. 2016), or residual with spectral norm (Miyato et al. 2018)."""
    latent: int = 100
    """Size of the latent vector."""
    generator_channels: int = 128
    """Channels at the generator's highest resolution; dcgan doubles them with each halving."""
    discriminator_channels: int = 128
    """Channels at the discriminator's highest resolution; dcgan doubles them with each halving."""
    discriminator_batch_norm: bool = True
    """BatchNorm in dcgan's discriminator; must be false for gan.r1. residual has none."""

    @property
    def discriminator_sees_batch(self) -> bool:
        """Return whether the discriminator's logit of an image depends on the rest of its batch."""
        return self.architecture == "dcgan" and self.discriminator_batch_norm


def make_nets(
    config: GanNetConfig, image_shape: tuple[int, int, int], num_classes: int | None
) -> dict[str, nn.Module]:
    """Return both networks for images (H, W, C); raise UserError for other image sizes."""
    sizes = ("latent", "generator_channels", "discriminator_channels")
    check_range(config, "model.", *sizes, min=1)
    height, width, channels = image_shape
    doublings = round(math.log2(height / 4)) if height >= 8 else 0
    if height != width or height != 4 << doublings or doublings < 1:
        raise UserError(
            f"the images are {height} x {width}, but the GAN needs a side of 8, 16, 32 ...: "
            "give data.resize 32"
        )
    args = (config, doublings, channels, num_classes)
    if config.architecture == "dcgan":
        return {"generator": DCGANGenerator(*args), "discriminator": DCGANDiscriminator(*args)}
    return {"generator": ResidualGenerator(*args), "discriminator": ResidualDiscriminator(*args)}


class DCGANGenerator(nn.Module):
    """Transposed convolutions with BatchNorm and ReLU, and a tanh."""

    def __init__(
        self, config: GanNetConfig, doublings: int, image_channels: int, num_classes: int | None
    ):
        super().__init__()
        widths = [config.generator_channels << i for i in reversed(range(doublings))]
        self.first = nn.Linear(config.latent, widths[0] * 16, bias=False)
        self.norms = nn.ModuleList(BatchNorm(width, num_classes) for width in widths)
        self.convolutions = nn.ModuleList(
            nn.ConvTranspose2d(a, b, 4, 2, 1, bias=False)
            for a, b in zip(widths, [*widths[1:], image_channels], strict=True)
        )
        self.bias = nn.Parameter(torch.zeros(image_channels, 1, 1))
        _init_weights(self)

    def forward(self, latent: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the images of latents."""
        x = _unfold(self.first(latent))
        for norm, convolution in zip(self.norms, self.convolutions, strict=True):
            x = convolution(norm(x, labels).relu())
        return (x + self.bias).tanh()


class DCGANDiscriminator(nn.Module):
    """Strided convolutions with BatchNorm (or biases in its place) and leaky ReLU."""

    def __init__(
        self, config: GanNetConfig, doublings: int, image_channels: int, num_classes: int | None
    ):
        super().__init__()
        widths = [config.discriminator_channels << i for i in range(doublings)]
        normalized = config.discriminator_batch_norm
        self.convolutions = nn.ModuleList(
            nn.Conv2d(a, b, 4, 2, 1, bias=i == 0 or not normalized)
            for i, (a, b) in enumerate(zip([image_channels, *widths], widths, strict=False))
        )
        # None after the first convolution (Radford et al. 2016, section 3).
        self.norms = nn.ModuleList(
            BatchNorm(width) if i > 0 and normalized else nn.Identity()
            for i, width in enumerate(widths)
        )
        self.out = nn.Linear(widths[-1] * 16, 1)
        _init_weights(self)
        self.classes = None
        if num_classes is not None:
            self.classes = Embedding(num_classes, widths[-1])
            nn.init.normal_(self.classes.weight, 0, 0.02)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the logits of images."""
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = functional.leaky_relu(norm(convolution(x)), 0.2)
        logits = self.out(x.permute(0, 2, 3, 1).flatten(1))[:, 0]
        if self.classes is not None:
            logits = logits + (self.classes(labels) * x.mean((2, 3))).sum(1)
        return logits


class ResidualGenerator(nn.Module):
    """Residual blocks that each double the side (Miyato et al. 2018, table 4)."""

    def __init__(
        self, config: GanNetConfig, doublings: int, image_channels: int, num_classes: int | None
    ):
        super().__init__()
        width = config.generator_channels
        self.first = nn.Linear(config.latent, width * 16)
        self.blocks = nn.ModuleList(_UpBlock(width, num_classes) for _ in range(doublings))
        self.norm = BatchNorm(width)
        self.out = nn.Conv2d(width, image_channels, 3, padding=1)
        _init_weights(self, xavier=True)

    def forward(self, latent: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the images of latents."""
        x = _unfold(self.first(latent))
        for block in self.blocks:
            x = block(x, labels)
        return self.out(self.norm(x).relu()).tanh()


class _UpBlock(nn.Module):
    def __init__(self, width: int, num_classes: int | None):
        super().__init__()
        self.norm1, self.norm2 = BatchNorm(width, num_classes), BatchNorm(width, num_classes)
        # The next BatchNorm cancels a bias: its gradient would be rounding noise, which Adam
        # normalizes to full steps.
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(width, width, 1, bias=False)

    def forward(self, x: Tensor, labels: Tensor | None) -> Tensor:
        h = self.conv1(upsample(self.norm1(x, labels).relu()))
        h = self.conv2(self.norm2(h, labels).relu())
        # A 1x1 convolution commutes with the upsampling and costs a quarter before it.
        return h + upsample(self.shortcut(x))


class ResidualDiscriminator(nn.Module):
    """Residual blocks with spectral norm, which needs no BatchNorm (Miyato et al. 2018, table 4).

    All blocks but the last two halve the side; for 32 x 32 there are four.
    """

    def __init__(
        self, config: GanNetConfig, doublings: int, image_channels: int, num_classes: int | None
    ):
        super().__init__()
        width, halvings = config.discriminator_channels, max(1, doublings - 1)
        self.blocks = nn.ModuleList(
            _DownBlock(image_channels if i == 0 else width, width, i < halvings, first=i == 0)
            for i in range(halvings + 2)
        )
        self.out = nn.Linear(width, 1)
        self.classes = None if num_classes is None else Embedding(num_classes, width)
        _init_weights(self, xavier=True)
        for module in list(self.modules()):
            if isinstance(module, nn.Conv2d | nn.Linear | nn.Embedding):
                spectral_norm(module)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the logits of images."""
        for block in self.blocks:
            x = block(x)
        x = x.relu().sum((2, 3))
        logits = self.out(x)[:, 0]
        return logits if self.classes is None else logits + (self.classes(labels) * x).sum(1)


class _DownBlock(nn.Module):
    def __init__(self, inputs: int, width: int, downsamples: bool, first: bool):
        super().__init__()
        self.downsamples, self.first = downsamples, first
        self.conv1 = nn.Conv2d(inputs, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, width, 1) if downsamples else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        # No ReLU on the pixels themselves.
        h = self.conv2(self.conv1(x if self.first else x.relu()).relu())
        if not self.downsamples:
            return h + self.shortcut(x)
        # A 1x1 convolution commutes with average pooling.
        return functional.avg_pool2d(h, 2) + self.shortcut(functional.avg_pool2d(x, 2))


def _unfold(x: Tensor) -> Tensor:
    """Reshape [B, 16 C] to [B, C, 4, 4], channels_last."""
    return x.reshape(len(x), 4, 4, -1).permute(0, 3, 1, 2)


def _init_weights(net: nn.Module, xavier: bool = False) -> None:
    """Initialize weights from N(0, 0.02^2) (Radford et al. 2016, section 4) or by Xavier."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            if xavier:
                nn.init.xavier_uniform_(module.weight, gain=math.sqrt(2))
            else:
                nn.init.normal_(module.weight, 0, 0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
