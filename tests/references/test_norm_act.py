"""GroupNorm, scale and shift, SiLU and dropout in one kernel: outputs and derivatives.

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
from dgm.nn.layers import group_norm
from dgm.rng import Draws

# Each order of derivatives multiplies the rounding of fp32 by factors of the one before it, here by
# scales up to 3: torch's own operators in fp32 were off by up to 2.2e-5 in the third order and in
# forward mode, the kernels by up to 7.4e-5.
TOLERANCE = 2e-4


@dataclass(frozen=True)
class Case:
    """Shape and options of a call; the last `skip` channels are a second tensor."""

    channels: int = 16
    groups: int = 4
    size: int = 4
    batch: int = 2
    added: bool = False
    scaled: bool = False
    silu: bool = True
    drop: float = 0.0
    skip: int = 0


CASES = {
    "plain": Case(),
    "without SiLU": Case(silu=False),
    "one group of 6 channels": Case(6, 1),
    "embedding added": Case(added=True, drop=0.1),
    "scaled and shifted": Case(scaled=True, drop=0.5),
    "all options": Case(added=True, scaled=True, silu=False, drop=0.1),
    "two tensors": Case(added=True, drop=0.1, skip=6),
}
SHAPES = {
    "plain": Case(32, 8),
    "one group of 6 channels": Case(6, 1, silu=False),
    "groups of 6 channels": Case(60, 10, added=True, scaled=True, silu=False),
    "embedding added": Case(64, 16, 8, batch=3, added=True, drop=0.1),
    "embedding scales": Case(48, 12, scaled=True, drop=0.5),
    "as DDPM": Case(128, 32, 16, added=True, drop=0.1),
    "9 positions, which no kernel supports": Case(16, 4, 3, added=True, drop=0.1),
    "two tensors": Case(48, 12, added=True, drop=0.1, skip=16),
    "two tensors that share a group": Case(60, 5, drop=0.1, skip=20),
    "several tiles": Case(32, 8, 24, batch=1, added=True, drop=0.1),
    "several tiles of two tensors": Case(24, 6, 24, batch=1, scaled=True, skip=8),
    "a group larger than a tile": Case(80, 1, added=True, drop=0.1, skip=16),
}

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
every_kernel = pytest.mark.parametrize("kernels", get_args(Kernels))
Derive = Callable[[torch.dtype, Kernels | None], list[Tensor]]


def numbers(
    case: Case, seed: int, device: str, dtype: torch.dtype, scale: float = 1.0, mean: float = 0.0
) -> list[Tensor]:
    """Return x, weight, bias and the optional tensors, whose values fp32 holds exactly."""
    torch.manual_seed(seed)
    image, each = (case.batch, case.channels, case.size, case.size), (case.batch, case.channels)
    shapes = [image, each[1:], each[1:], *[each] * (case.added + 2 * case.scaled)]
    made = [torch.randn(shape) for shape in shapes]
    made[0] = (scale * made[0] + mean).contiguous(memory_format=torch.channels_last)
    return [part.to(device, dtype) for part in made]


def function(case: Case, kernels: Kernels | None) -> Callable[..., Tensor]:
    def apply(x: Tensor, weight: Tensor, bias: Tensor, *rest: Tensor) -> Tensor:
        added, scale_shift = rest[0] if case.added else None, rest[int(case.added) :]
        index = torch.arange(len(x), device=x.device)
        draws = Draws.of(2**40 + 7, index + 3, index)
        dropout = Dropout(case.drop, draws, "dropout") if case.drop else None
        parts = x.split([case.channels - case.skip, case.skip], dim=1) if case.skip else (x,)
        x, skip = (*(p.contiguous(memory_format=torch.channels_last) for p in parts), None)[:2]
        return norm_act(
            x, weight, bias, case.groups, 1e-6, added, scale_shift or None, case.silu, dropout,
            kernels, skip,
        )  # fmt: skip

    return apply


def outputs_and_gradients(
    case: Case, kernels: Kernels | None, device: str, dtype: torch.dtype, **of_x: float
) -> list[Tensor]:
    inputs = [part.requires_grad_() for part in numbers(case, 0, device, dtype, **of_x)]
    y = function(case, kernels)(*inputs)
    assert y.is_contiguous(memory_format=torch.channels_last)
    weights = numbers(case, 1, device, dtype)[0]
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), inputs)]


def same(derive: Derive, kernels: Kernels = "native") -> None:
    """Compare what `derive` makes of the kernels with what it makes of torch in float64."""
    found, expected = derive(torch.float32, kernels), derive(torch.float64, None)
    assert_derivatives_close(found, expected, TOLERANCE)


def device_of(kernels: Kernels, kernel_device: str) -> str:
    return kernel_device if kernels == "triton" else "cpu"


@every_kernel
@pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES)
def test_outputs_and_gradients_are_those_of_float64(
    case: Case, kernels: Kernels, kernel_device: str
):
    device = device_of(kernels, kernel_device)
    of_x = {"scale": 2.0, "mean": 3.0}
    found = outputs_and_gradients(case, kernels, device, torch.float32, **of_x)
    expected = outputs_and_gradients(case, None, device, torch.float64, **of_x)
    # Sums over up to 16 x 16 x 4 numbers in fp32.
    assert_derivatives_close(found, expected, 3e-6, floor=0.0)


@pytest.mark.parametrize("size", [8, 24], ids=["one tile", "several tiles"])
def test_a_large_mean_costs_no_digits(size: int, kernel_device: str):
    """Of x = 1000 + N(0, 1) fp32 holds 6e-5 of the deviation: sums of squares would lose all."""
    case = Case(size=size, batch=1, added=True)
    found = outputs_and_gradients(case, "triton", kernel_device, torch.float32, mean=1000.0)
    expected = outputs_and_gradients(case, None, kernel_device, torch.float64, mean=1000.0)
    assert_derivatives_close(found, expected, 5e-4, floor=0.0)


@every_kernel
@every_case
def test_gradients_of_three_orders_are_torchs(case: Case, kernels: Kernels, kernel_device: str):
    device = device_of(kernels, kernel_device)

    def derive(dtype: torch.dtype, kernels: Kernels | None) -> list[Tensor]:
        weights = numbers(case, 1, device, dtype)[0]
        return three_orders(function(case, kernels), numbers(case, 0, device, dtype), weights)

    same(derive, kernels)


@pytest.mark.parametrize("frozen", [(0,), (1, 2), (0, 1), (3,)])
def test_gradient_penalty_where_some_inputs_have_no_gradient(frozen: tuple[int, ...]):
    case = CASES["embedding added"]
    same(
        lambda dtype, kernels: gradient_penalty(
            function(case, kernels), numbers(case, 0, "cpu", dtype), frozen
        )
    )


@pytest.mark.parametrize("derivative", [forward_mode, hessian_vector_product])
@every_case
def test_forward_mode_is_torchs(case: Case, derivative: Callable[..., list[Tensor]]):
    def derive(dtype: torch.dtype, kernels: Kernels | None) -> list[Tensor]:
        inputs, tangents = (numbers(case, seed, "cpu", dtype) for seed in (0, 1))
        return derivative(function(case, kernels), inputs, tangents)

    same(derive)


def test_half_precision_is_kept_in_outputs_and_in_second_derivatives(kernel_device: str):
    case = CASES["embedding added"]

    def derive(dtype: torch.dtype, kernels: Kernels | None) -> list[Tensor]:
        rounded = [part.bfloat16().to(dtype) for part in numbers(case, 0, kernel_device, dtype)]
        inputs = [part.requires_grad_() for part in rounded]
        y = function(case, kernels)(*inputs)
        first = torch.autograd.grad(y.sin().sum(), inputs, create_graph=True)
        return [y, *first, *torch.autograd.grad(first[0].square().sum(), inputs)]

    found, expected = derive(torch.bfloat16, "triton"), derive(torch.float64, None)
    for number, (mine, exact) in enumerate(zip(found, expected, strict=True)):
        assert mine.dtype == torch.bfloat16
        tolerance = 0.02 if number < 5 else 0.1  # y, its sine and the gradients have 8 bits each
        assert (mine.double() - exact).norm() < tolerance * exact.norm(), number


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_than_fp32_are_torchs_operators_on_a_cpu(dtype: torch.dtype):
    case = Case(32, 8, added=True)
    made, plain = (outputs_and_gradients(case, k, "cpu", dtype) for k in ("native", None))
    assert all(map(torch.equal, made, plain))


def test_results_do_not_depend_on_the_number_of_threads():
    case = Case(160, 32, 16, batch=5, added=True, drop=0.1)  # several parts for each image
    found = []
    for count in (1, 3):
        torch.set_num_threads(count)
        found.append(outputs_and_gradients(case, "native", "cpu", torch.float32))
    assert all(map(torch.equal, *found))


def test_an_image_is_the_same_in_any_batch():
    layer = group_norm(96, silu=True)
    layer.kernels = "native"
    x = torch.randn(5, 96, 16, 16).contiguous(memory_format=torch.channels_last)
    assert torch.equal(layer(x)[2:3], layer(x[2:3]))


@every_kernel
def test_gradients_of_an_empty_batch_are_zero(kernels: Kernels, kernel_device: str):
    case, device = CASES["all options"], device_of(kernels, kernel_device)
    x, weight, bias, *rest = numbers(case, 0, device, torch.float32)
    given = [x[:0], weight, bias, *(part[:0] for part in rest)]
    y = function(case, kernels)(*(part.requires_grad_() for part in given))
    assert y.shape == (0, 16, 4, 4)
    assert not any(slope.any() for slope in torch.autograd.grad(y.sum(), given))


@every_kernel
def test_operator_keeps_torchs_rules(kernels: Kernels, kernel_device: str):
    """Shapes and strides without data, on which torch.compile relies, are those of the kernels."""
    x = torch.randn(2, 8, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
    weight, bias = torch.randn(8, requires_grad=True), torch.randn(8, requires_grad=True)
    arguments = (x, None, None, weight, bias, *[None] * 5, 2, 1e-6, True, 0.0, 0, kernels)
    torch.library.opcheck(torch.ops.dgm.norm_act.default, arguments)


def test_operator_refuses_forward_mode():
    x, weight, bias = numbers(CASES["plain"], 0, "cpu", torch.float32)
    with forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match="norm_act has no forward-mode derivative"):
            torch.ops.dgm.norm_act(
                forward_ad.make_dual(x, x), None, None, weight, bias, *[None] * 5,
                4, 1e-6, True, 0.0, 0, "native",
            )  # fmt: skip


def test_compiled_code_is_one_graph_with_the_same_results():
    torch._dynamo.reset()
    case = CASES["all options"]
    plain = function(case, "native")
    fast = torch.compile(plain, backend="aot_eager", fullgraph=True)
    given = [part.requires_grad_() for part in numbers(case, 0, "cpu", torch.float32)]
    outputs = fast(*given), plain(*given)
    assert torch.equal(*outputs)
    assert all(map(torch.equal, *(torch.autograd.grad(y.sin().sum(), given) for y in outputs)))
