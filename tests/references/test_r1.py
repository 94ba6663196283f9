"""The R1 penalty against its closed form and against finite differences.

Source: R1 = gamma / 2 E |grad D(x)|^2 over real images (Mescheder, Geiger and Nowozin 2018, "Which
training methods for GANs do actually converge?", section 4.1), every k-th step k times (Karras et
al. 2020, "Analyzing and improving the image quality of StyleGAN", appendix B). For D linear or
quadratic in x the gradient is known; for a residual net it is estimated by central differences.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from small_gan import batch, loss, nets, objective
from torch import Tensor, nn

from dgm.gan.losses import r1_penalty
from dgm.nn.compiling import uncompiled
from dgm.preprocessing import STANDARD

GAMMA, COUNT, NUMBERS = 10.0, 6, 3 * 8 * 8


class Quadratic(nn.Module):
    """D(x) = x A x / 2 + b x; linear if `scale`, that of A, is 0."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.matrix = nn.Parameter(scale * torch.randn(NUMBERS, NUMBERS, dtype=torch.float64))
        self.weight = nn.Parameter(torch.randn(NUMBERS, dtype=torch.float64) / 10)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        x = x.flatten(1)
        return 0.5 * (x @ self.matrix * x).sum(1) + x @ self.weight


def gradients(net: nn.Module, value: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(value, list(net.parameters()), allow_unused=True))


def penalty_of(net: nn.Module, **config: Any) -> tuple[Tensor, list[Tensor], Tensor]:
    """Return the logged penalty, what it adds to the gradient of the loss, and the real images."""
    pair, given = {**nets(), "discriminator": net}, batch(COUNT)
    config = {"flip": False, "loss": "least_squares", "sees_batch": False, **config}
    found = loss(objective(r1=GAMMA, **config), pair, given, 0)
    rest = found["loss_real"] + found["loss_fake"]
    return (
        found["r1"],
        gradients(net, found["loss"] - rest),
        STANDARD.scale(given[0].images, torch.float64),
    )


@pytest.mark.parametrize("interval", [1, 16])
def test_r1_of_a_linear_discriminator_is_the_squared_weight(interval: int):
    net = Quadratic(0.0)
    found, (_, slope), _ = penalty_of(net, r1_interval=interval)
    torch.testing.assert_close(found, net.weight.square().sum())
    torch.testing.assert_close(slope, interval * GAMMA * net.weight.detach())


def test_r1_is_of_the_images_before_augmentation():
    """If D is linear and sees M x + b, its gradient in x is M^T w; each image draws its own M."""
    net = Quadratic(0.0)
    found, _, _ = penalty_of(net, augment=["color"])
    drawn = batch(COUNT)[1].uniform("discriminator/augment_real/color", (3,), torch.float64)
    weight, slopes = net.weight.detach().view(3, -1), []
    for _, saturation, contrast in drawn:
        # Contrast about the image's mean, then saturation about each pixel's: both symmetric.
        slope = (contrast + 0.5) * weight + (0.5 - contrast) * weight.mean()
        slope = 2 * saturation * slope + (1 - 2 * saturation) * slope.mean(0, keepdim=True)
        slopes.append(slope.square().sum())
    torch.testing.assert_close(found.detach(), torch.stack(slopes).mean())


def test_r1_of_a_quadratic_discriminator_is_the_squared_affine_slope():
    net = Quadratic(0.01)
    found, (of_matrix, of_weight), real = penalty_of(net)
    x = real.flatten(1)
    slope = x @ (0.5 * (net.matrix + net.matrix.T)).detach() + net.weight.detach()
    torch.testing.assert_close(found.detach(), slope.square().sum(1).mean())
    # d |s|^2 = 2 s ds, where ds = (dA + dA^T) x / 2 + db
    torch.testing.assert_close(of_weight, GAMMA * slope.mean(0))
    outer = slope[:, :, None] * x[:, None, :]
    expected = 0.5 * GAMMA * (outer + outer.mT).mean(0)
    torch.testing.assert_close(of_matrix, expected)


def test_r1_of_a_residual_net_is_that_of_finite_differences():
    net = nets("residual")["discriminator"]
    found, slopes, real = penalty_of(net)
    net.eval()  # no power iteration, as in the penalty itself

    @torch.no_grad()
    def slope_by_differences(image: Tensor, step: float = 1e-5) -> Tensor:
        moves = step * torch.eye(NUMBERS, dtype=torch.float64).view(NUMBERS, *image.shape)
        return (net(image + moves) - net(image - moves)) / (2 * step)

    expected = torch.stack([slope_by_differences(image) for image in real]).square().sum(1)
    # Central differences are off by step^2 / 6 of the third derivative, which between the kinks of
    # a ReLU net is zero, and by 1e-16 / step of rounding.
    torch.testing.assert_close(found.detach(), expected.mean(), rtol=1e-7, atol=0)

    def penalty_at(move: float) -> Tensor:
        moved = copy.deepcopy(net)
        with torch.no_grad():
            for parameter, part in zip(moved.parameters(), direction, strict=True):
                parameter.add_(part, alpha=move)
        images = real.clone().requires_grad_()
        return 0.5 * GAMMA * r1_penalty(moved(images), images).mean().detach()

    torch.manual_seed(1)
    direction = [torch.randn_like(parameter) for parameter in net.parameters()]
    projected = sum(
        (part * slope).sum()
        for part, slope in zip(direction, slopes, strict=True)
        if slope is not None
    )
    step = 1e-6
    by_differences = (penalty_at(step) - penalty_at(-step)) / (2 * step)
    torch.testing.assert_close(projected, by_differences, rtol=1e-5, atol=0)


@pytest.mark.slow
def test_compiled_nets_have_the_same_penalty_and_gradients():
    torch._dynamo.reset()
    made, plain = objective(r1=GAMMA, sees_batch=False), nets("residual")
    compiled = copy.deepcopy(plain)
    for net in compiled.values():
        # A hook like the one that makes outputs float32 under autocast.
        net.register_forward_hook(lambda net, inputs, outputs: 2 * outputs)
        net.compile(backend="aot_eager")
    for net in plain.values():
        net.register_forward_hook(lambda net, inputs, outputs: 2 * outputs)
    found, expected = (loss(made, pair, batch(8), 0) for pair in (compiled, plain))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)
    slopes = (
        gradients(pair["discriminator"], values["loss"])
        for pair, values in ((compiled, found), (plain, expected))
    )
    for mine, other in zip(*slopes, strict=True):
        torch.testing.assert_close(mine, other)


def test_uncompiled_runs_a_net_in_eager_mode_with_its_hooks():
    torch._dynamo.reset()
    net = nn.Sequential(nn.Linear(3, 1))
    ran: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        ran.append("compiled")
        return graph.forward

    net.register_forward_hook(lambda net, inputs, outputs: 2 * outputs)
    net.compile(backend=backend)
    with uncompiled():
        x = torch.randn(2, 3, requires_grad=True)
        (slope,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        slope.square().sum().backward()
    assert not ran
    torch.testing.assert_close(net[0].weight.grad, 2 * 2 * 4 * net[0].weight.detach())
    net(x)
    assert ran == ["compiled"]
