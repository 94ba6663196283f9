"""Small flows with perturbed weights, and batches for them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dgm.flow.networks import Flow, FlowNetConfig
from dgm.flow.objective import FlowConfig, FlowObjective, FlowSampleConfig
from dgm.objective import Batch
from dgm.rng import Draws

SHAPE = (8, 8, 3)
GLOW = FlowNetConfig(levels=2, steps=2, hidden=8)
REALNVP = FlowNetConfig("realnvp", levels=2, steps=2, hidden=8, blocks=1, logit=0.05)
BOTH = {"glow": GLOW, "realnvp": REALNVP}
PLAIN = FlowConfig()
SAMPLE = FlowSampleConfig(batch=3)


def moved(net: nn.Module, by: float = 0.1, seed: int = 1) -> nn.Module:
    """Perturb every weight, so that no layer is the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=generator))
    return net


def flow(
    config: FlowNetConfig = GLOW,
    shape: tuple[int, int, int] = SHAPE,
    dtype: torch.dtype = torch.float32,
    by: float = 0.1,
) -> Flow:
    torch.manual_seed(0)
    net = Flow(config, shape)
    if by:
        moved(net, by)
    return net.to(dtype)


def objective(
    config: FlowConfig = PLAIN,
    sample: FlowSampleConfig = SAMPLE,
    dtype: torch.dtype = torch.float32,
) -> FlowObjective:
    return FlowObjective(config, sample, SHAPE, dtype)


def batch(count: int, epoch: int = 0) -> tuple[Batch, Draws]:
    """Return images with smooth colours, different in each half, and their draws."""
    index = torch.arange(count)
    halves = Draws.of(9, index).uniform("colours", (2, 1, 3)).repeat_interleave(4, 1)
    ramp = torch.linspace(0.3, 1, 8)[:, None]
    images = (halves.expand(-1, -1, 8, -1) * ramp * 255).byte()
    return Batch(images.contiguous(), index % 5), Draws.of(0, index, epoch)


def loss(made: FlowObjective, net: nn.Module, given: tuple[Batch, Draws]) -> dict[str, Tensor]:
    return made.loss({"flow": net}, given[0], made.phases[0], given[1])


def train(made: FlowObjective, net: nn.Module, steps: int, count: int = 16) -> list[float]:
    """Take steps of Adam on the same images, with fresh noise at each; return the losses."""
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    losses = []
    for step in range(steps):
        value = loss(made, net, batch(count, epoch=step))["loss"]
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(float(value.detach()))
    return losses
