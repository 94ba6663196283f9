"""Derivatives of GroupNorm, scale and shift, SiLU and dropout in one kernel: three orders, and
forward mode.

Source: torch.nn.functional.group_norm and silu in float64, whose derivatives are torch's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import pytest
import torch
from derivatives import (
    assert_derivatives_close,
    forward_mode,
    gradient_penalty,
    hessian_vector_product,
    three_orders,
)
from torch import Tensor
from torch.autograd import forward_ad

from dgm.nn.kernels.dispatch import Kernels
from dgm.nn.kernels.norm import Dropout, norm_act
from dgm.rng import Draws

# Each order of derivatives multiplies the rounding of fp32 by factors of the one before it, here by
# scales up to 3: torch's own operators in fp32 were off by up to 2.2e-5 in the third order and in
# forward mode, the kernels by up to 7.4e-5.
TOLERANCE = 2e-4


@dataclass(frozen=True)
class Case:
    """What a block asks for."""

    channels: int = 16
    groups: int = 4
    added: bool = False
    scaled: bool = False
    silu: bool = True
    drop: float = 0.0
    skip: int = 0


CASES = {
    "plain": Case(),
    "without silu": Case(silu=False),
    "of odd groups": Case(channels=6, groups=1),
    "with an embedding added": Case(added=True, drop=0.1),
    "scaled and shifted": Case(scaled=True, drop=0.5),
    "with everything": Case(added=True, scaled=True, silu=False, drop=0.1),
    "of two tensors": Case(added=True, drop=0.1, skip=6),
}

every_case = pytest.mark.parametrize("name", CASES)
every_kernel = pytest.mark.parametrize("kernels", get_args(Kernels))


def numbers(case: Case, seed: int, device: str, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(seed)
    image, each = (2, case.channels, 4, 4), (2, case.channels)
    shapes = [image, each[1:], each[1:], *[each] * (case.added + 2 * case.scaled)]
    made = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    made[0] = made[0].contiguous(memory_format=torch.channels_last)
    return [part.to(device, dtype) for part in made]


def function(case: Case, kernels: Kernels | None) -> Callable[..., Tensor]:
    return lambda *given: apply(case, list(given), kernels)


def apply(case: Case, given: list[Tensor], kernels: Kernels | None) -> Tensor:
    x, weight, bias = given[:3]
    added = given[3] if case.added else None
    rest = given[4:] if case.added else given[3:]
    index = torch.arange(2, device=x.device)
    dropout = Dropout(case.drop, Draws.of(7, index, index), "dropout") if case.drop else None
    scale_shift = (rest[0], rest[1]) if case.scaled else None
    x, skip = (x[:, : -case.skip], x[:, -case.skip :]) if case.skip else (x, None)
    return norm_act(
        x, weight, bias, case.groups, 1e-6, added, scale_shift, case.silu, dropout, kernels, skip
    )


def same(
    derive: Callable[[torch.dtype, Kernels | None], list[Tensor]], kernels: Kernels = "native"
) -> None:
    """Compare what `derive` makes of the kernels with what it makes of torch in float64."""
    found, expected = derive(torch.float32, kernels), derive(torch.float64, None)
    assert_derivatives_close(found, expected, TOLERANCE)


@every_kernel
@every_case
def test_gradients_of_three_orders_are_torchs(name: str, kernels: Kernels, kernel_device: str):
    case, device = CASES[name], kernel_device if kernels == "triton" else "cpu"

    def derive(dtype: torch.dtype, kernels: Kernels | None) -> list[Tensor]:
        weights = numbers(case, 1, device, dtype)[0]
        return three_orders(function(case, kernels), numbers(case, 0, device, dtype), weights)

    same(derive, kernels)


@pytest.mark.parametrize("frozen", [(0,), (1, 2), (0, 1), (3,)])
def test_gradient_penalty_where_some_inputs_have_no_gradient(frozen: tuple[int, ...]):
    case = CASES["with an embedding added"]

    def derive(dtype: torch.dtype, kernels: Kernels | None) -> list[Tensor]:
        return gradient_penalty(function(case, kernels), numbers(case, 0, "cpu", dtype), frozen)

    same(derive)


def test_half_precision_keeps_its_type_in_second_derivatives(kernel_device: str):
    case = CASES["with an embedding added"]

    def slopes(dtype: torch.dtype, kernels: Kernels | None) -> list[Tensor]:
        rounded = [part.bfloat16().to(dtype) for part in numbers(case, 0, kernel_device, dtype)]
        given = [part.requires_grad_() for part in rounded]
        y = apply(case, given, kernels).sin().sum()
        (first,) = torch.autograd.grad(y, given[0], create_graph=True)
        return list(torch.autograd.grad(first.square().sum(), given))

    found, expected = slopes(torch.bfloat16, "triton"), slopes(torch.float64, None)
    for mine, exact in zip(found, expected, strict=True):
        assert mine.dtype == torch.bfloat16
        assert (
            mine.double() - exact
        ).norm() < 0.1 * exact.norm()  # y, its sine and slopes have 8 bits


@pytest.mark.parametrize("derivative", [forward_mode, hessian_vector_product])
@every_case
def test_forward_mode_is_torchs(name: str, derivative: Callable[..., list[Tensor]]):
    case = CASES[name]

    def derive(dtype: torch.dtype, kernels: Kernels | None) -> list[Tensor]:
        inputs, tangents = (numbers(case, seed, "cpu", dtype) for seed in (0, 1))
        return derivative(function(case, kernels), inputs, tangents)

    same(derive)


def test_operators_themselves_refuse_forward_mode():
    x, weight, bias = numbers(CASES["plain"], 0, "cpu", torch.float32)
    with forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match="norm_act has no forward-mode derivative"):
            torch.ops.dgm.norm_act(
                forward_ad.make_dual(x, x), None, None, weight, bias, *[None] * 5,
                4, 1e-6, True, 0.0, 0, "native",
            )  # fmt: skip


@every_kernel
def test_without_images_all_gradients_are_zero(kernels: Kernels, kernel_device: str):
    case = CASES["with everything"]
    device = kernel_device if kernels == "triton" else "cpu"
    x, weight, bias, *rest = numbers(case, 0, device, torch.float32)
    given = [x[:0], weight, bias, *(part[:0] for part in rest)]
    given = [part.requires_grad_() for part in given]
    index = torch.arange(0, device=device)
    dropout = Dropout(0.1, Draws.of(7, index, index), "dropout")
    y = norm_act(*given[:3], 4, 1e-6, given[3], (given[4], given[5]), True, dropout, kernels)
    slopes = torch.autograd.grad(y.sum(), given)
    assert y.shape == (0, 16, 4, 4)
    assert not any(slope.any() for slope in slopes)


def test_compiled_it_is_one_graph_and_the_same():
    torch._dynamo.reset()
    case = CASES["with everything"]
    fast = torch.compile(
        lambda given: apply(case, given, "native"), backend="aot_eager", fullgraph=True
    )
    given = [part.requires_grad_() for part in numbers(case, 0, "cpu", torch.float32)]
    made, plain = fast(given), apply(case, given, "native")
    assert torch.equal(made, plain)
    slopes = (torch.autograd.grad(y.sin().sum(), given) for y in (made, plain))
    assert all(map(torch.equal, *slopes))
