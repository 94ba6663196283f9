"""The U-Net with this project's kernels, differentiated twice and in forward mode.

Source: the same U-Net of torch's own operators, in float64.
"""

from __future__ import annotations

import copy

import pytest
import torch
from derivatives import assert_derivatives_close
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dgm.diffusion.unet import UNet, UNetConfig
from dgm.nn.kernels import native
from dgm.nn.layers import recompute_activations, use_kernels
from dgm.rng import Draws

# About twenty convolutions and norms one after the other round by 1e-5 of the largest number each
# in fp32, at random.
TOLERANCE = 2e-4


@pytest.fixture(autouse=True)
def compiled() -> None:
    assert native.library() is not None, "without a compiler nothing would be tested"


def make_net(scale_shift: bool) -> UNet:
    config = UNetConfig(
        channels=32, channel_mult=[1, 2], num_blocks=[1, 1], attention_at=[8], dropout=0.1,
        scale_shift=scale_shift,
    )  # fmt: skip
    torch.manual_seed(0)
    net = UNet(config, 16, num_classes=5)
    with torch.no_grad():  # move what starts at zero, and would hide what lies behind it
        for parameter in net.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return net


def both(scale_shift: bool) -> tuple[nn.Module, nn.Module]:
    exact = make_net(scale_shift)
    fast = copy.deepcopy(exact)
    use_kernels(fast)
    return fast.to(memory_format=torch.channels_last), exact.double()


def given(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    x, move = torch.randn(2, 2, 3, 16, 16, dtype=torch.float64).to(dtype)
    return x, move, torch.tensor([3.0, 7.0]).to(dtype), torch.tensor([1.0, -2.0]).to(dtype)


@pytest.mark.parametrize("scale_shift", [False, True])
def test_forward_mode_and_reverse_through_it(scale_shift: bool):
    fast, exact = both(scale_shift)
    assert any(getattr(module, "kernels", None) for module in fast.modules())
    found = []
    for net, dtype in ((fast, torch.float32), (exact, torch.float64)):
        x, x_move, t, t_move = given(dtype)
        draws = Draws.of(0, torch.arange(2))
        labels = torch.tensor([0, 4])
        primal, tangent = torch.func.jvp(
            lambda x, t, net=net, draws=draws, labels=labels: net(x, t, labels, draws),
            (x, t), (x_move, t_move),
        )  # fmt: skip
        # MeanFlow's loss: the tangent is part of the target, which has no gradient.
        loss = (primal - tangent.detach()).square().sum()
        slopes = torch.autograd.grad(loss, list(net.parameters()))
        found.append([primal.detach(), tangent.detach(), *slopes])
    assert found[0][1].abs().max() > 0.1
    assert_derivatives_close(*found, TOLERANCE)


def test_forward_mode_with_activations_computed_again():
    net, _ = both(False)
    again = copy.deepcopy(net)
    assert recompute_activations(again) > 0
    found = []
    for each in (net, again):
        x, x_move, t, t_move = given(torch.float32)
        primal, tangent = torch.func.jvp(
            lambda x, t, each=each: each(x, t, torch.tensor([0, 4])), (x, t), (x_move, t_move)
        )
        slopes = torch.autograd.grad((primal - tangent).square().sum(), list(each.parameters()))
        found.append([primal, tangent, *slopes])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("scale_shift", [False, True])
def test_gradient_penalty(scale_shift: bool):
    fast, exact = both(scale_shift)
    found = []
    for net, dtype in ((fast, torch.float32), (exact, torch.float64)):
        x, _, t, _ = given(dtype)
        x.requires_grad_()
        with sdpa_kernel(SDPBackend.MATH):  # the fused one has no second derivatives
            y = net(x, t, torch.tensor([0, 4]), Draws.of(0, torch.arange(2)))
        (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        slopes = torch.autograd.grad(
            slope.square().sum(), [x, *net.parameters()], materialize_grads=True
        )
        found.append([slope.detach(), *slopes])
    assert_derivatives_close(*found, TOLERANCE)
