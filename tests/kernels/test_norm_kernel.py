"""GroupNorm and what follows it in one kernel, each way, against float64 step by step."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import get_args

import pytest
import torch
from torch import Tensor

from dgm.nn.kernels.dispatch import Kernels
from dgm.nn.kernels.norm import Dropout
from dgm.nn.layers import NormAct, group_norm
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
    skip: int = 0  # channels that come as a second tensor


CASES = {
    "plain": Case(32, 8, 4),
    "one group of an odd size": Case(6, 1, 4, silu=False),
    "groups that are no power of two": Case(60, 10, 4, added=True, scale_shift=True, silu=False),
    "embedding added": Case(64, 16, 8, batch=3, added=True, drop=0.1),
    "embedding scales": Case(48, 12, 4, scale_shift=True, drop=0.5),
    "as DDPM": Case(128, 32, 16, added=True, drop=0.1),
    "positions that eight does not divide": Case(16, 4, 3, added=True, drop=0.1),
    "of two tensors": Case(48, 12, 4, added=True, drop=0.1, skip=16),
    "of two tensors that share a group": Case(60, 5, 4, drop=0.1, skip=20),
    "more positions than a tile": Case(32, 8, 24, batch=1, added=True, drop=0.1),
    "more positions than a tile, of two": Case(24, 6, 24, batch=1, scale_shift=True, skip=8),
    "groups of more channels than a tile": Case(80, 1, 4, added=True, drop=0.1, skip=16),
}
LARGE_MEAN = {
    "in one tile": Case(16, 4, 8, added=True),
    "in several": Case(16, 4, 24, batch=1, added=True),
}


def results(
    case: Case, device: str, dtype: torch.dtype, kernels: Kernels | None = None,
    scale: float = 2.0, mean: float = 3.0,
) -> dict[str, Tensor]:  # fmt: skip
    """Return y and the gradients of all inputs, from the same numbers each time."""
    torch.manual_seed(0)
    shape = (case.batch, case.channels)
    x = torch.randn(*shape, case.size, case.size).to(memory_format=torch.channels_last)
    weights = torch.randn_like(x).to(device, dtype)
    given = {"x": scale * x + mean}
    if case.skip:
        parts = given["x"].split([case.channels - case.skip, case.skip], dim=1)
        names = "x", "skip"
        given = {
            name: part.contiguous(memory_format=torch.channels_last)
            for name, part in zip(names, parts, strict=True)
        }
    if case.added:
        given["added"] = torch.randn(shape)
    if case.scale_shift:
        given |= {"scale": torch.randn(shape), "shift": torch.randn(shape)}
    layer = NormAct(case.groups, case.channels, case.silu)
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    layer = copy.deepcopy(layer).to(device, dtype)
    layer.kernels = kernels
    leaves = {name: part.to(device, dtype).requires_grad_() for name, part in given.items()}
    index = torch.arange(case.batch, device=device)
    dropout = Dropout(case.drop, Draws.of(2**40 + 7, index + 3, index), "dropout/down0.0")
    scale_shift = (leaves["scale"], leaves["shift"]) if case.scale_shift else None
    y = layer(leaves["x"], leaves.get("added"), scale_shift, dropout, leaves.get("skip"))
    (y * weights).sum().backward()
    assert y.is_contiguous(memory_format=torch.channels_last)
    found = {"y": y.detach(), "weight": layer.weight.grad, "bias": layer.bias.grad}
    found |= {name: leaf.grad for name, leaf in leaves.items()}
    assert all(part is not None for part in found.values())
    return found


def device_of(kernels: Kernels) -> str:
    """Return the device of the kernels: Triton's without a GPU run on the CPU, interpreted."""
    return "cuda" if kernels == "triton" and torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("kernels", get_args(Kernels))
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_of_float64(name: str, kernels: Kernels):
    device = device_of(kernels)
    made = results(CASES[name], device, torch.float32, kernels)
    expected = results(CASES[name], device, torch.float64)
    for part, value in expected.items():
        error = (made[part].double() - value).abs().max() / value.abs().max()
        assert error < 3e-6, part  # sums over up to 16 x 16 x 4 numbers in fp32


@pytest.mark.parametrize("name", LARGE_MEAN)
def test_a_mean_far_from_zero_takes_no_digits_beyond_those_of_x(name: str):
    """Of x = 1000 + N(0, 1) fp32 holds 6e-5 of the deviation: sums of squares would lose all."""
    case, device = LARGE_MEAN[name], device_of("triton")
    made = results(case, device, torch.float32, "triton", scale=1.0, mean=1000.0)
    expected = results(case, device, torch.float64, scale=1.0, mean=1000.0)
    for part, value in expected.items():
        error = (made[part].double() - value).abs().max() / value.abs().max()
        assert error < 5e-4, part


def test_half_precision_goes_in_and_out():
    case, device = Case(32, 8, 4, added=True, drop=0.1), device_of("triton")
    made = results(case, device, torch.bfloat16, "triton")
    expected = results(case, device, torch.float64)
    for part, value in expected.items():
        assert made[part].dtype == torch.bfloat16, part
        error = (made[part].double() - value).norm() / value.norm()
        assert error < 0.02, part  # a few roundings to 8 bits


def test_in_cpp_only_fp32_is_taken_and_the_rest_done_step_by_step():
    case = Case(32, 8, 4, added=True)
    for dtype in (torch.bfloat16, torch.float64):
        made, plain = (results(case, "cpu", dtype, kernels) for kernels in ("native", None))
        assert all(torch.equal(made[part], plain[part]) for part in plain)


def test_numbers_of_threads_and_images_change_no_bit():
    case = Case(160, 32, 16, batch=5, added=True, drop=0.1)  # of several parts an image
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = results(case, "cpu", torch.float32, "native")
        torch.set_num_threads(3)
        several = results(case, "cpu", torch.float32, "native")
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one[part], several[part]) for part in one)


def test_an_image_is_the_same_in_any_batch():
    layer = group_norm(96, silu=True)
    layer.kernels = "native"
    x = torch.randn(5, 96, 16, 16).contiguous(memory_format=torch.channels_last)
    assert torch.equal(layer(x)[2:3], layer(x[2:3]))


@pytest.mark.parametrize("kernels", get_args(Kernels))
def test_the_kernel_is_one_operation_to_a_compiler(kernels: Kernels):
    """Traced with nothing but shapes, as torch.compile does; checks fakes against the kernels."""
    x = torch.randn(2, 8, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
    weight, bias = torch.randn(8, requires_grad=True), torch.randn(8, requires_grad=True)
    arguments = (x, None, None, weight, bias, *[None] * 5, 2, 1e-6, True, 0.0, 0, kernels)
    torch.library.opcheck(torch.ops.dgm.norm_act.default, arguments)
