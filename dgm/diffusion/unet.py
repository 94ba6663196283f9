"""The U-Net of DDPM (Ho et al. 2020, appendix B) and smaller, faster ones from the same class.

Shapes: x [B, C, H, W], t int64 [B], labels int64 [B] (num_classes is the null label).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, cast

from torch import Tensor, nn
from torch.nn import functional

from dgm.common.errors import UserError
from dgm.common.validation import check_range
from dgm.nn.kernels.norm import Dropout
from dgm.nn.layers import (
    Attention,
    DeferredBiasConv2d,
    Embedding,
    PointwiseConv2d,
    Upsample,
    group_norm,
    join,
    timestep_embedding,
    zeroed,
)
from dgm.rng import Draws


@dataclass(frozen=True)
class UNetConfig:
    """Shape of the U-Net; the defaults are DDPM's for CIFAR-10 (35.7 M parameters)."""

    channels: int = 128
    """Width of the first level."""
    channel_mult: list[int] = field(default_factory=lambda: [1, 2, 2, 2])
    """Width of each level, as a multiple of `channels`; each further level halves the image."""
    num_blocks: list[int] = field(default_factory=lambda: [2, 2, 2, 2])
    """Residual blocks of each level on the way down."""
    attention_at: list[int] = field(default_factory=lambda: [16])
    """Image sizes whose blocks are followed by attention; if not [], the middle has it too."""
    num_heads: int = 1
    """Heads of each attention layer."""
    dropout: float = 0.1
    """Fraction of features dropped inside each residual block."""
    patch_size: int = 1
    """Side of the pixel squares folded into channels at the entry (pixel unshuffle)."""
    skips: Literal["concat", "add"] = "concat"
    """`concat`: one skip per block, as DDPM; `add`: one per level, added, which is cheaper."""
    scale_shift: bool = False
    """The embedding of time and class scales and shifts features instead of being added (adaGN)."""
    pyramid: bool = False
    """Progressive skips: downsampled inputs to the smaller levels, outputs from them (NCSN++)."""


class UNetBlock(nn.Module):
    """GroupNorm, SiLU, convolution, twice, with the embedding of time and class in between."""

    recomputable = True

    def __init__(self, inputs: int, outputs: int, config: UNetConfig, name: str):
        """Map `inputs` channels to `outputs`; `name` is the purpose of the dropout's draws."""
        super().__init__()
        self.drop, self.purpose, self.scale_shift = config.dropout, name, config.scale_shift
        self.norm1 = group_norm(inputs, silu=True)
        self.conv1 = DeferredBiasConv2d(inputs, outputs, 3, padding=1)
        width = 2 * outputs if config.scale_shift else outputs
        self.emb = nn.Linear(4 * config.channels, width)
        self.norm2 = group_norm(outputs, silu=True)
        self.conv2 = zeroed(nn.Conv2d(outputs, outputs, 3, padding=1))
        same = inputs == outputs
        self.shortcut = nn.Identity() if same else PointwiseConv2d(inputs, outputs)

    def forward(
        self, x: Tensor, emb: Tensor, draws: Draws | None, skip: Tensor | None = None
    ) -> Tensor:
        """Map [B, inputs, H, W] and emb [B, 4 channels] to [B, outputs, H, W].

        `inputs` counts the channels of x and of `skip`.
        """
        if skip is not None and not self.norm1.reads_separately(x):
            x, skip = join(x, skip), None
        h = self.norm1(x, skip=skip)
        projected = self.emb(emb)
        dropout = None if draws is None else Dropout(self.drop, draws, self.purpose)
        if self.scale_shift:
            h, added = self.conv1(h)
            scale, shift = projected.chunk(2, dim=1)
            h = self.norm2(h, added=added, scale_shift=(scale, shift), dropout=dropout)
        else:
            h, added = self.conv1(h, projected)
            h = self.norm2(h, added=added, dropout=dropout)
        shortcut = self.shortcut(x) if skip is None else self.shortcut(x, skip)
        return shortcut + self.conv2(h)


class UNetLevel(nn.Module):
    """The blocks of one image size, and the layer that changes the size afterwards."""

    def __init__(self, blocks: list[nn.Module], attentions: list[nn.Module], resize: nn.Module):
        """Pass `nn.Identity` where there is no attention or no resizing."""
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.attentions = nn.ModuleList(attentions)
        self.resize = resize

    def pairs(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """Yield (block, its attention)."""
        return zip(self.blocks, self.attentions, strict=True)


class UNet(nn.Module):
    """Predict eps, x_0 or v from a noised image, its timestep and its class."""

    def __init__(
        self,
        config: UNetConfig,
        image_size: int,
        image_channels: int = 3,
        output_channels: int | None = None,
        num_classes: int | None = None,
    ):
        """Build the network; raise UserError where sizes are not divisible."""
        super().__init__()
        _check(config, image_size)
        self.config, self.num_classes = config, num_classes
        width, patch = config.channels, config.patch_size
        self.time = nn.Sequential(
            nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, 4 * width)
        )
        self.label = None if num_classes is None else Embedding(num_classes + 1, 4 * width)
        self.entry = nn.Conv2d(image_channels * patch**2, width, 3, padding=1)
        widths = [width * m for m in config.channel_mult]
        self._build_levels(widths, image_size // patch)
        self.exit_norm = group_norm(widths[0], silu=True)
        outputs = output_channels or image_channels
        self.exit = zeroed(nn.Conv2d(widths[0], outputs * patch**2, 3, padding=1))
        self.pyramid = (
            ProgressiveSkips(widths[:-1], widths[1:], 2 * patch, image_channels, outputs)
            if config.pyramid and len(widths) > 1
            else None
        )

    def _build_levels(self, widths: list[int], size: int) -> None:
        config, last = self.config, len(widths) - 1
        concat = config.skips == "concat"

        def attention(channels: int, at: int) -> nn.Module:
            attends = at in config.attention_at
            return Attention(channels, config.num_heads) if attends else nn.Identity()

        def block(inputs: int, outputs: int, name: str) -> nn.Module:
            return UNetBlock(inputs, outputs, config, f"dropout/{name}")

        sizes = [size >> i for i in range(len(widths))]
        down: list[nn.Module] = []
        now = config.channels
        skips = [now]  # channels of each skip, in the order in which they are stored
        for i, width in enumerate(widths):
            blocks = []
            for k in range(config.num_blocks[i]):
                blocks.append(block(now, width, f"down{i}.{k}"))
                skips.append(width)
                now = width
            attentions = [attention(width, sizes[i]) for _ in blocks]
            shrink: nn.Module = nn.Identity()
            if i < last:
                shrink = nn.Conv2d(width, width, 2 + concat, stride=2, padding=int(concat))
                skips.append(width)
            down.append(UNetLevel(blocks, attentions, shrink))
        middle = Attention(now, config.num_heads) if config.attention_at else nn.Identity()
        ends = [block(now, now, "middle0"), block(now, now, "middle1")]
        self.middle = UNetLevel(ends, [middle, nn.Identity()], nn.Identity())
        up: list[nn.Module] = []
        for i in reversed(range(len(widths))):
            width, blocks = widths[i], []
            for k in range(config.num_blocks[i] + concat):
                inputs = now + skips.pop() if concat else now
                blocks.append(block(inputs, width, f"up{i}.{k}"))
                now = width
            attentions = [attention(width, sizes[i]) for _ in blocks]
            grow: nn.Module = nn.Identity()
            if i > 0 and concat:
                grow = nn.Sequential(Upsample(), nn.Conv2d(width, width, 3, padding=1))
            elif i > 0:
                now = widths[i - 1]
                grow = nn.ConvTranspose2d(width, now, 2, stride=2)
            up.append(UNetLevel(blocks, attentions, grow))
        self.down, self.up = nn.ModuleList(down), nn.ModuleList(up)

    def forward(
        self, x: Tensor, t: Tensor, labels: Tensor | None = None, draws: Draws | None = None
    ) -> Tensor:
        """Return the prediction [B, output_channels, H, W]; dropout is active only with `draws`."""
        emb = self.time(timestep_embedding(t, self.config.channels).to(x.dtype))
        if self.label is not None:
            assert labels is not None, "a class-conditional net needs labels"
            emb = emb + self.label(labels)
        emb = functional.silu(emb)
        patch = self.config.patch_size
        h = self.entry(functional.pixel_unshuffle(x, patch) if patch > 1 else x)
        h, skip_outputs = self._down_and_up(h, x, emb, draws)
        h = self.exit(self.exit_norm(h))
        h = functional.pixel_shuffle(h, patch) if patch > 1 else h
        return sum(skip_outputs, start=h)

    def _down_and_up(
        self, h: Tensor, x: Tensor, emb: Tensor, draws: Draws | None
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the last features, and the outputs of progressive skips at the image's size."""
        concat = self.config.skips == "concat"  # one skip per block and resize, else one per level
        skips = [h] if concat else []
        for i, level in enumerate(cast(Iterable[UNetLevel], self.down)):
            for block, attention in level.pairs():
                h = attention(block(h, emb, draws))
                if concat:
                    skips.append(h)
            if not concat:
                skips.append(h)
            if i < len(self.down) - 1:
                h = level.resize(h)
                if self.pyramid is not None:
                    h = h + self.pyramid.input(i, x)
                if concat:
                    skips.append(h)
        for block, attention in self.middle.pairs():
            h = attention(block(h, emb, draws))
        skip_outputs: list[Tensor] = []
        ups = cast(Iterable[UNetLevel], self.up)
        for i, level in zip(reversed(range(len(self.up))), ups, strict=True):
            if not concat:
                h = h + skips.pop()
            for block, attention in level.pairs():
                h = attention(block(h, emb, draws, skips.pop() if concat else None))
            if self.pyramid is not None and i > 0:
                skip_outputs.append(self.pyramid.output(i - 1, h))
            h = level.resize(h)
        return h, skip_outputs


class ProgressiveSkips(nn.Module):
    """Skips at every image size: downsampled inputs to the smaller levels, and outputs from them.

    The "progressive" input and output of NCSN++ (Song et al. 2021, appendix H), after StyleGAN2
    (Karras et al. 2020). At high noise only means over large areas carry information. A small
    network takes long to learn such means through strided convolutions.
    """

    def __init__(
        self, in_widths: list[int], out_widths: list[int], first_factor: int,
        image_channels: int, outputs: int,
    ):  # fmt: skip
        """Set up for smaller levels that begin with `in_widths` and end with `out_widths` channels.

        The first is `first_factor` times smaller than the image, each further one twice as small.
        """
        super().__init__()
        self.factors = [first_factor << i for i in range(len(in_widths))]
        self.feeds = nn.ModuleList(nn.Conv2d(image_channels, w, 3, padding=1) for w in in_widths)
        self.says = nn.ModuleList(  # named so in checkpoints
            nn.Sequential(group_norm(w), nn.SiLU(), zeroed(nn.Conv2d(w, outputs, 3, padding=1)))
            for w in out_widths
        )

    def input(self, level: int, x: Tensor) -> Tensor:
        """Return features of a level from the image x [B, C, H, W]."""
        factor = self.factors[level]
        # A mean over factor^2 pixels divides the deviation of white noise by `factor`, but keeps
        # large shapes; multiplying by factor / 2 leaves both in a range that layers can use.
        return cast(Tensor, self.feeds[level](functional.avg_pool2d(x, factor) * (factor / 2)))

    def output(self, level: int, h: Tensor) -> Tensor:
        """Return the output of a level, upsampled to the image's size."""
        factor = self.factors[level]
        return functional.interpolate(self.says[level](h), scale_factor=factor, mode="bilinear")


def _check(config: UNetConfig, image_size: int) -> None:
    levels = len(config.channel_mult)
    if len(config.num_blocks) != levels:
        raise UserError(
            f"model.num_blocks {config.num_blocks} has {len(config.num_blocks)} entries: "
            f"give {levels}, one for each of model.channel_mult {config.channel_mult}"
        )
    if levels == 0:
        raise UserError("model.channel_mult is []: give at least one level, such as [1]")
    check_range(config, "model.", "num_blocks", min=1, max=100)
    check_range(config, "model.", "channel_mult", "attention_at", "patch_size", min=1)
    if config.channels < 4 or config.channels % 4:
        raise UserError(f"model.channels is {config.channels}: choose a multiple of 4")
    if not 0 <= config.dropout < 1:
        raise UserError(f"model.dropout is {config.dropout}: choose 0 or more, less than 1")
    factor = config.patch_size * 2 ** (levels - 1)
    if image_size % factor:
        raise UserError(
            f"the image side {image_size} is not divisible by {factor} (model.patch_size "
            f"{config.patch_size}, {levels} levels of model.channel_mult): resize the images or "
            "use fewer levels"
        )
    sizes = [image_size // config.patch_size >> level for level in range(levels)]
    if unused := [size for size in config.attention_at if size not in sizes]:
        warnings.warn(
            f"model.attention_at names {unused}, but the levels are of size {sizes}: "
            "choose from these",
            stacklevel=3,
        )
    for width in (config.channels * m for m in config.channel_mult):
        if config.num_heads < 1 or width % config.num_heads:
            raise UserError(
                f"model.num_heads {config.num_heads} does not divide the width {width}: "
                "change it or model.channels"
            )
