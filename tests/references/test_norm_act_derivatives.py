"""Derivatives of GroupNorm, scale and shift, SiLU and dropout in one kernel: three orders, and
forward mode.

Source: torch.nn.functional.group_norm and silu in float64, whose derivatives are torch's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import pytest
import torch
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


def close(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    # Of what cancels to zero, such as the derivative by a shift that GroupNorm takes away, only the
    # rounding is left; it is measured against the largest of all results.
    largest = max(float(exact.abs().max()) for exact in expected)
    for number, (mine, exact) in enumerate(zip(found, expected, strict=True)):
        error = (mine.double() - exact).abs().max()
        size = max(float(exact.abs().max()), 0.01 * largest)
        assert error < TOLERANCE * size, f"{number}: {error:.1e} of {size:.1e}"


def orders(case: Case, device: str, dtype: torch.dtype, kernels: Kernels | None) -> list:
    """Return the gradients of the first three orders, each of a function of those before."""
    given = [part.requires_grad_() for part in numbers(case, 0, device, dtype)]
    value = (apply(case, given, kernels).sin() * numbers(case, 1, device, dtype)[0]).sum()
    found = []
    for _ in range(3):
        slopes = torch.autograd.grad(value, given, create_graph=True)
        found.append([slope.detach() for slope in slopes])
        value = sum((slope.square().mean() for slope in slopes), torch.zeros((), device=device))
    return found


@every_kernel
@every_case
def test_gradients_of_three_orders_are_torchs(name: str, kernels: Kernels, kernel_device: str):
    device = kernel_device if kernels == "triton" else "cpu"
    found = orders(CASES[name], device, torch.float32, kernels)
    expected = orders(CASES[name], device, torch.float64, None)
    for mine, exact in zip(found, expected, strict=True):
        close(mine, exact)


@pytest.mark.parametrize("frozen", [(0,), (1, 2), (0, 1), (3,)])
def test_gradient_penalty_where_some_inputs_have_no_gradient(frozen: tuple[int, ...]):
    case = CASES["with an embedding added"]

    def slopes(dtype: torch.dtype, kernels: Kernels | None) -> list[Tensor]:
        given = numbers(case, 0, "cpu", dtype)
        asked = [part.requires_grad_() for i, part in enumerate(given) if i not in frozen]
        y = apply(case, given, kernels).sin().sum()
        first = torch.autograd.grad(y, asked, create_graph=True)
        penalty = sum((part.square().sum() for part in first), torch.zeros((), dtype=dtype))
        return list(torch.autograd.grad(penalty, asked))

    close(slopes(torch.float32, "native"), slopes(torch.float64, None))


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


def forward_mode(case: Case, dtype: torch.dtype, kernels: Kernels | None) -> list[Tensor]:
    """Return a value, its tangent, and the gradients of a loss of each (as MeanFlow takes)."""
    given = [part.requires_grad_() for part in numbers(case, 0, "cpu", dtype)]
    moves = numbers(case, 1, "cpu", dtype)
    primal, tangent = torch.func.jvp(
        lambda *g: apply(case, list(g), kernels).sin(), tuple(given), tuple(moves)
    )
    by_primal = torch.autograd.grad(primal.square().sum(), given, retain_graph=True)
    by_tangent = torch.autograd.grad(tangent.square().sum(), given)
    return [primal.detach(), tangent.detach(), *by_primal, *by_tangent]


@every_case
def test_forward_mode_and_reverse_through_it_are_torchs(name: str):
    case = CASES[name]
    close(forward_mode(case, torch.float32, "native"), forward_mode(case, torch.float64, None))


@every_case
def test_hessian_times_vector_in_forward_over_reverse_is_torchs(name: str):
    case = CASES[name]

    def product(dtype: torch.dtype, kernels: Kernels | None) -> list[Tensor]:
        given, moves = numbers(case, 0, "cpu", dtype), numbers(case, 1, "cpu", dtype)
        places = tuple(range(len(given)))
        slope = torch.func.grad(lambda *g: apply(case, list(g), kernels).sin().sum(), places)
        return list(torch.func.jvp(slope, tuple(given), tuple(moves))[1])

    close(product(torch.float32, "native"), product(torch.float64, None))


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
