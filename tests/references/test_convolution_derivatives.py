"""Derivatives of our 3x3 convolution: three orders in reverse mode, and forward mode.

Source: torch.nn.functional.conv2d in float64, whose derivatives of any order are torch's own.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional

from dgm.nn.kernels import native, winograd

# The filter F(4x4, 3x3) rounds like sums of numbers a few times larger, 1e-5 of the largest result
# in fp32 (dgm/nn/kernels/winograd.py); each order of derivatives passes through it once more.
TOLERANCE = 5e-5
BATCH, INPUTS, OUTPUTS, SIDE = 2, 32, 64, 8

Convolve = Callable[[Tensor, Tensor, Tensor], Tensor]


@pytest.fixture(autouse=True)
def compiled() -> None:
    assert native.library() is not None, "without a compiler nothing would be tested"


def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    layer = nn.Conv2d(INPUTS, OUTPUTS, 3, padding=1)
    del layer.weight, layer.bias
    layer.weight, layer.bias = weight, bias  # type: ignore[assignment]
    return winograd.convolve(layer, x)


def theirs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return functional.conv2d(x, weight, bias, padding=1)


def numbers(seed: int, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(seed)
    made = [
        torch.randn(BATCH, INPUTS, SIDE, SIDE, dtype=torch.float64),
        torch.randn(OUTPUTS, INPUTS, 3, 3, dtype=torch.float64) / (9 * INPUTS) ** 0.5,
        torch.randn(OUTPUTS, dtype=torch.float64),
    ]
    return [part.to(dtype) for part in made]


def close(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for number, (mine, exact) in enumerate(zip(found, expected, strict=True)):
        error = (mine.double() - exact).abs().max() / exact.abs().max()
        assert error < TOLERANCE, f"{number}: {error:.1e}"


def orders(convolve: Convolve, dtype: torch.dtype) -> list[list[Tensor]]:
    """Return the gradients of the first three orders, each of a function of those before."""
    given = [part.requires_grad_() for part in numbers(0, dtype)]
    value = (convolve(*given).sin() * numbers(1, dtype)[0].sum((1, 2, 3), keepdim=True)).sum()
    found = []
    for _ in range(3):
        slopes = torch.autograd.grad(value, given, create_graph=True)
        found.append([slope.detach() for slope in slopes])
        value = sum((slope.square().sum() for slope in slopes), torch.zeros((), dtype=dtype))
    return found


def test_gradients_of_three_orders_are_those_of_a_direct_convolution():
    found, expected = orders(ours, torch.float32), orders(theirs, torch.float64)
    for mine, exact in zip(found, expected, strict=True):
        close(mine, exact)


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (1, 2), (0, 2)])
def test_gradient_penalty_where_some_inputs_have_no_gradient(frozen: tuple[int, ...]):
    def slopes(convolve: Convolve, dtype: torch.dtype) -> list[Tensor]:
        given = numbers(0, dtype)
        asked = [part.requires_grad_() for i, part in enumerate(given) if i not in frozen]
        first = torch.autograd.grad(convolve(*given).sin().sum(), asked, create_graph=True)
        penalty = sum((part.square().sum() for part in first), torch.zeros((), dtype=dtype))
        return list(torch.autograd.grad(penalty, asked))

    close(slopes(ours, torch.float32), slopes(theirs, torch.float64))


def forward_mode(convolve: Convolve, dtype: torch.dtype) -> list[Tensor]:
    """Return a value, its tangent, and the gradients of a loss of each (as MeanFlow takes)."""
    given, moves = numbers(0, dtype), numbers(1, dtype)
    given = [part.requires_grad_() for part in given]
    primal, tangent = torch.func.jvp(lambda *g: convolve(*g).sin(), tuple(given), tuple(moves))
    by_primal = torch.autograd.grad(primal.square().sum(), given, retain_graph=True)
    by_tangent = torch.autograd.grad(tangent.square().sum(), given)
    return [primal.detach(), tangent.detach(), *by_primal, *by_tangent]


def test_forward_mode_and_reverse_through_it_are_those_of_a_direct_convolution():
    close(forward_mode(ours, torch.float32), forward_mode(theirs, torch.float64))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_dual_numbers_have_the_tangent_of_a_direct_convolution(requires_grad: bool):
    def tangent(convolve: Convolve, dtype: torch.dtype) -> list[Tensor]:
        given = [part.requires_grad_(requires_grad) for part in numbers(0, dtype)]
        with forward_ad.dual_level():
            moved = [
                forward_ad.make_dual(*pair) for pair in zip(given, numbers(1, dtype), strict=True)
            ]
            return [part.detach() for part in forward_ad.unpack_dual(convolve(*moved))]

    close(tangent(ours, torch.float32), tangent(theirs, torch.float64))


def test_hessian_times_vector_in_forward_over_reverse():
    def product(convolve: Convolve, dtype: torch.dtype) -> list[Tensor]:
        given, moves = tuple(numbers(0, dtype)), tuple(numbers(1, dtype))
        slope = torch.func.grad(lambda *g: convolve(*g).sin().sum(), argnums=(0, 1, 2))
        return list(torch.func.jvp(slope, given, moves)[1])

    close(product(ours, torch.float32), product(theirs, torch.float64))


def test_functional_gradient_is_that_of_a_direct_convolution():
    def slopes(convolve: Convolve, dtype: torch.dtype) -> list[Tensor]:
        slope = torch.func.grad(lambda *g: convolve(*g).sin().sum(), argnums=(0, 1, 2))
        return list(slope(*numbers(0, dtype)))

    close(slopes(ours, torch.float32), slopes(theirs, torch.float64))


def test_operators_themselves_refuse_forward_mode():
    given = numbers(0, torch.float32)
    grad = torch.randn(BATCH, OUTPUTS, SIDE, SIDE)
    with forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match="conv3x3 has no forward-mode derivative"):
            torch.ops.dgm.conv3x3(forward_ad.make_dual(given[0], given[0]), *given[1:])
        with pytest.raises(NotImplementedError, match="conv3x3_backward has no forward-mode"):
            torch.ops.dgm.conv3x3_backward(grad, *given[:2], True, True)


def test_without_images_the_gradient_of_the_weights_is_zero():
    x, weight, bias = numbers(0, torch.float32)
    held = torch.full((64, OUTPUTS, 3, 3, INPUTS), 7.0)  # memory that comes back full of sevens
    del held
    weight.requires_grad_()
    bias.requires_grad_()
    made = ours(x[:0].requires_grad_(), weight, bias)
    made.sum().backward()
    assert made.shape == (0, OUTPUTS, SIDE, SIDE)
    assert not weight.grad.any() and not bias.grad.any()


def test_compiled_it_is_one_graph_and_the_same():
    torch._dynamo.reset()
    layer = nn.Conv2d(INPUTS, OUTPUTS, 3, padding=1)
    winograd.use_in(layer)
    fast = torch.compile(layer, backend="aot_eager", fullgraph=True)
    given = [numbers(0, torch.float32)[0].requires_grad_(), *layer.parameters()]
    made, plain = fast(given[0]), layer(given[0])
    assert torch.equal(made, plain)
    slopes = (torch.autograd.grad(y.sin().sum(), given) for y in (made, plain))
    assert all(map(torch.equal, *slopes))
