"""GroupNorm and what follows it in one kernel, each way, against float64 step by step."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from dgm.kernels.norm import Dropout
from dgm.layers import NormAct, use_kernels
from dgm.rng import Draws


@dataclass(frozen=True)
class Case:
    """What a block asks for."""

    channels: int
    groups: int
    size: int
    batch: int = 2
    added: bool = False
    scale_shift: bool = False
    silu: bool = True
    drop: float = 0.0


CASES = {
    "plain": Case(32, 8, 4),
    "one group of an odd size": Case(6, 1, 4, silu=False),
    "groups that are no power of two": Case(60, 10, 4, added=True, scale_shift=True, silu=False),
    "told by adding": Case(64, 16, 8, batch=3, added=True, drop=0.1),
    "told by scaling": Case(48, 12, 4, scale_shift=True, drop=0.5),
    "as DDPM": Case(128, 32, 16, added=True, drop=0.1),
    "places that eight does not divide": Case(16, 4, 3, added=True, drop=0.1),
}


def results(case: Case, device: str, dtype: torch.dtype, fused: bool) -> dict[str, Tensor]:
    """Give y and the gradients of all that goes in, from the same numbers each time."""
    torch.manual_seed(0)
    shape = (case.batch, case.channels)
    x = torch.randn(*shape, case.size, case.size).to(memory_format=torch.channels_last)
    weights = torch.randn_like(x).to(device, dtype)
    given = {"x": 2 * x + 3}
    if case.added:
        given["added"] = torch.randn(shape)
    if case.scale_shift:
        given |= {"scale": torch.randn(shape), "shift": torch.randn(shape)}
    layer = NormAct(case.groups, case.channels, case.silu)
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    layer = copy.deepcopy(layer).to(device, dtype)
    if fused:
        use_kernels(layer)
    leaves = {name: part.to(device, dtype).requires_grad_() for name, part in given.items()}
    index = torch.arange(case.batch, device=device)
    dropout = Dropout(case.drop, Draws.of(2**40 + 7, index + 3, index), "dropout/down0.0")
    scale_shift = (leaves["scale"], leaves["shift"]) if case.scale_shift else None
    y = layer(leaves["x"], leaves.get("added"), scale_shift, dropout)
    (y * weights).sum().backward()
    assert y.is_contiguous(memory_format=torch.channels_last)
    found = {"y": y.detach(), "weight": layer.weight.grad, "bias": layer.bias.grad}
    found |= {name: leaf.grad for name, leaf in leaves.items()}
    assert all(part is not None for part in found.values())
    return found


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_of_float64(name: str, kernel_device: str):
    made = results(CASES[name], kernel_device, torch.float32, fused=True)
    expected = results(CASES[name], kernel_device, torch.float64, fused=False)
    for part, value in expected.items():
        error = (made[part].double() - value).abs().max() / value.abs().max()
        assert error < 3e-6, part  # sums over up to 16 x 16 x 4 numbers in fp32


def test_half_precision_goes_in_and_out(kernel_device: str):
    case = Case(32, 8, 4, added=True, drop=0.1)
    made = results(case, kernel_device, torch.bfloat16, fused=True)
    expected = results(case, kernel_device, torch.float64, fused=False)
    for part, value in expected.items():
        assert made[part].dtype == torch.bfloat16, part
        error = (made[part].double() - value).norm() / value.norm()
        assert error < 0.02, part  # a few roundings to 8 bits


def test_the_kernel_is_one_operation_to_a_compiler():
    """Traced with nothing but shapes, as torch.compile does; checks fakes against the kernels."""
    x = torch.randn(2, 8, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
    weight, bias = torch.randn(8, requires_grad=True), torch.randn(8, requires_grad=True)
    nothing = (None,) * 6
    arguments = (x, nothing[0], weight, bias, *nothing[1:], 2, 1e-6, True, 0.0, 0)
    torch.library.opcheck(torch.ops.dgm.norm_act.default, arguments)
