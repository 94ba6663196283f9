"""A small diffusion objective, nets and batches for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dgm.diffusion.objective import DiffusionConfig, DiffusionObjective, DiffusionSampleConfig
from dgm.diffusion.unet import UNet, UNetConfig
from dgm.objective import Batch
from dgm.rng import Draws

NUM_CLASSES = 5
TINY = UNetConfig(channels=8, channel_mult=[1, 2], num_blocks=[1, 1], attention_at=[], dropout=0.1)
SMALL = DiffusionConfig(num_timesteps=50)
SAMPLE = DiffusionSampleConfig(steps=5)


def objective(
    config: DiffusionConfig = SMALL,
    sample: DiffusionSampleConfig = SAMPLE,
    dtype: torch.dtype = torch.float64,
) -> DiffusionObjective:
    return DiffusionObjective(config, sample, (8, 8, 3), NUM_CLASSES, dtype=dtype)


def batch(count: int) -> tuple[Batch, Draws]:
    index = torch.arange(count)
    images = Draws.of(9, index).uniform("noise", (8, 8, 3)).mul(256).byte()
    return Batch(images, index % NUM_CLASSES), Draws.of(0, index)


class RecordingNet(nn.Module):
    """A net that records its inputs and whose output depends on x and the class only."""

    def __init__(self, outputs: int = 3):
        super().__init__()
        self.outputs = outputs
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.calls: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def forward(
        self, x: Tensor, t: Tensor, labels: Tensor | None = None, draws: Draws | None = None
    ) -> Tensor:
        self.calls.append((x, t, labels))
        out = 0.5 * x.tanh() * self.weight
        if labels is not None:
            out = out + 0.1 * labels[:, None, None, None]
        return torch.cat([out] * (self.outputs // 3), dim=1).to(x.dtype)


def unet(config: DiffusionConfig = SMALL) -> UNet:
    net = UNet(
        TINY,
        8,
        output_channels=6 if config.learned_variance else 3,
        num_classes=NUM_CLASSES if config.class_conditional else None,
    )
    with torch.no_grad():  # some weights start at zero and would hide others
        for parameter in net.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return net.double()


def loss(made: DiffusionObjective, net: nn.Module, given: tuple[Batch, Draws]) -> dict[str, Tensor]:
    return made.loss({"net": net}, given[0], made.phases[0], given[1])
