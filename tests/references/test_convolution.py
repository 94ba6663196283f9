"""3x3 convolutions by Winograd's filtering: outputs, three orders of derivatives, forward mode.

Source: torch.nn.functional.conv2d in float64, whose derivatives of any order are torch's own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from derivatives import (
    assert_derivatives_close,
    forward_mode,
    functional_gradient,
    gradient_penalty,
    hessian_vector_product,
    three_orders,
)
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from dgm.nn.kernels import native, winograd

# The filter F(4x4, 3x3) rounds like sums of numbers a few times larger, 1e-5 of the largest result
# in fp32 (dgm/nn/kernels/winograd.py); each order of derivatives passes through it once more.
TOLERANCE = 5e-5
SMALL = (2, 32, 64, 8, 8)  # batch, channels in and out, height, width
# Several groups of tiles, and tiles that fill none.
SIZES = [(3, *SMALL[1:]), (1, 96, 32, 16, 12), (5, 64, 96, 8, 20), (40, 64, 64, 16, 16),
         (2, 256, 128, 16, 16)]  # fmt: skip
LAST = torch.channels_last

Convolve = Callable[[Tensor, Tensor, Tensor], Tensor]


@pytest.fixture(autouse=True)
def compiled() -> None:
    assert native.library() is not None, "without a compiler nothing would be tested"


def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    outputs, inputs = weight.shape[:2]
    layer = nn.Conv2d(inputs, outputs, 3, padding=1)
    del layer.weight, layer.bias
    layer.weight, layer.bias = weight, bias  # type: ignore[assignment]
    return winograd.convolve(layer, x)


def theirs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return functional.conv2d(x, weight, bias, padding=1)


def numbers(seed: int, dtype: torch.dtype, size: tuple[int, ...] = SMALL) -> list[Tensor]:
    batch, inputs, outputs, height, width = size
    torch.manual_seed(seed)
    x = torch.randn(batch, inputs, height, width, dtype=torch.float64)
    weight = torch.randn(outputs, inputs, 3, 3, dtype=torch.float64) / (9 * inputs) ** 0.5
    bias = torch.randn(outputs, dtype=torch.float64)
    made = (x.contiguous(memory_format=LAST), weight.contiguous(memory_format=LAST), bias)
    return [part.to(dtype) for part in made]


def outputs_and_gradients(convolve: Convolve, inputs: list[Tensor]) -> list[Tensor]:
    leaves = [part.requires_grad_() for part in inputs]
    y = convolve(*leaves)
    torch.manual_seed(1)
    grad = torch.randn(y.shape, dtype=torch.float64).to(y.dtype)  # contiguous, not channels_last
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def same(derive: Callable[[Convolve, torch.dtype], list[Tensor]]) -> None:
    """Compare what `derive` makes of our convolution with what it makes of torch's in float64."""
    found, expected = derive(ours, torch.float32), derive(theirs, torch.float64)
    assert_derivatives_close(found, expected, TOLERANCE, floor=0.0)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_result_and_gradients_are_those_of_a_direct_convolution(size: tuple[int, ...]):
    found = outputs_and_gradients(ours, numbers(0, torch.float32, size))
    direct = outputs_and_gradients(theirs, numbers(0, torch.float64, size))
    assert all(image.is_contiguous(memory_format=LAST) for image in found[:2])
    assert_derivatives_close(found, direct, TOLERANCE, floor=0.0)
    for mine, exact in zip(found, direct, strict=True):
        assert (mine - exact).square().mean().sqrt() < 1e-5 * exact.square().mean().sqrt()


def test_gradients_of_three_orders_are_those_of_a_direct_convolution():
    def derive(convolve: Convolve, dtype: torch.dtype) -> list[Tensor]:
        weights = numbers(1, dtype)[0].sum((1, 2, 3), keepdim=True)
        return three_orders(convolve, numbers(0, dtype), weights)

    same(derive)


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (1, 2), (0, 2)])
def test_gradient_penalty_where_some_inputs_have_no_gradient(frozen: tuple[int, ...]):
    same(lambda convolve, dtype: gradient_penalty(convolve, numbers(0, dtype), frozen))


@pytest.mark.parametrize("derivative", [forward_mode, hessian_vector_product])
def test_forward_mode_is_that_of_a_direct_convolution(derivative: Callable[..., list[Tensor]]):
    same(lambda convolve, dtype: derivative(convolve, numbers(0, dtype), numbers(1, dtype)))


def test_functional_gradient_is_that_of_a_direct_convolution():
    same(lambda convolve, dtype: functional_gradient(convolve, numbers(0, dtype)))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_dual_numbers_have_the_tangent_of_a_direct_convolution(requires_grad: bool):
    def tangent(convolve: Convolve, dtype: torch.dtype) -> list[Tensor]:
        given = [part.requires_grad_(requires_grad) for part in numbers(0, dtype)]
        with forward_ad.dual_level():
            moved = [
                forward_ad.make_dual(*pair) for pair in zip(given, numbers(1, dtype), strict=True)
            ]
            return [part.detach() for part in forward_ad.unpack_dual(convolve(*moved))]

    same(tangent)


def test_results_do_not_depend_on_the_number_of_threads_or_the_batch():
    found = []
    for count in (1, 3):
        torch.set_num_threads(count)
        inputs = numbers(0, torch.float32, (13, 64, 32, 16, 16))
        found.append(outputs_and_gradients(ours, inputs))
    assert all(map(torch.equal, *found))
    x, weight, bias = inputs
    for part in (slice(0, 1), slice(4, 9)):
        assert torch.equal(ours(x[part], weight, bias), found[0][0][part])


def test_gradient_of_the_weights_is_zero_for_an_empty_batch():
    x, weight, bias = numbers(0, torch.float32)
    held = torch.full((64, *weight.shape), 7.0)  # freed memory that may be reused
    del held
    found = outputs_and_gradients(ours, [x[:0], weight, bias])
    assert found[0].shape == (0, 64, 8, 8)
    assert not found[2].any() and not found[3].any()


def test_operators_keep_torchs_rules():
    inputs = numbers(0, torch.float32, (2, 32, 32, 8, 8))
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    leaves = tuple(part.clone().requires_grad_() for part in inputs)
    torch.library.opcheck(winograd._forward, leaves, test_utils=tests)
    x, weight, _ = inputs
    grad = torch.randn(2, 32, 8, 8)
    for needed in ((True, True), (False, True), (True, False)):
        torch.library.opcheck(winograd._backward, (grad, x, weight, *needed), test_utils=tests[:2])


def test_operators_refuse_forward_mode():
    given = numbers(0, torch.float32)
    grad = torch.randn(2, 64, 8, 8)
    with forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match="conv3x3 has no forward-mode derivative"):
            torch.ops.dgm.conv3x3(forward_ad.make_dual(given[0], given[0]), *given[1:])
        with pytest.raises(NotImplementedError, match="conv3x3_backward has no forward-mode"):
            torch.ops.dgm.conv3x3_backward(grad, *given[:2], True, True)


def test_compiled_code_is_one_graph_with_the_same_results():
    torch._dynamo.reset()
    layer = nn.Conv2d(32, 64, 3, padding=1)
    winograd.use_in(layer)
    fast = torch.compile(layer, backend="aot_eager", fullgraph=True)
    given = [numbers(0, torch.float32)[0].requires_grad_(), *layer.parameters()]
    outputs = fast(given[0]), layer(given[0])
    assert torch.equal(*outputs)
    assert all(map(torch.equal, *(torch.autograd.grad(y.sin().sum(), given) for y in outputs)))


class Net(nn.Module):
    """Convolutions of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.entry = nn.Conv2d(3, 32, 3, padding=1)
        self.body = nn.Conv2d(32, 32, 3, padding=1, bias=False)
        self.smaller = nn.Conv2d(32, 32, 3, padding=1, stride=2)
        self.exit = nn.Conv2d(32, 64, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.exit(self.smaller(self.body(self.entry(x))))


def test_supported_layers_use_the_kernel_and_others_torchs(monkeypatch: pytest.MonkeyPatch):
    plain = Net().to(memory_format=LAST)
    net = copy.deepcopy(plain)
    winograd.use_in(net)
    layers = {name: m for name, m in net.named_modules() if isinstance(m, nn.Conv2d)}
    assert [n for n, m in layers.items() if winograd.is_supported(m)] == ["body", "exit"]
    seen: list[torch.Size] = []
    compute = winograd._forward

    def see(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        seen.append(x.shape)
        return compute(x, weight, bias)

    monkeypatch.setattr(winograd, "_forward", see)
    for size, ours in ((16, 2), (8, 1), (12, 1), (10, 0)):
        seen.clear()
        x = torch.randn(2, 3, size, size).contiguous(memory_format=LAST)
        torch.testing.assert_close(net(x), plain(x), rtol=1e-4, atol=1e-5)
        assert len(seen) == ours, size
    twin = copy.deepcopy(net)
    with torch.no_grad():
        twin.body.weight.zero_()
    assert not torch.allclose(twin(x), net(x))  # a copy computes with its own weights
    assert list(net.state_dict()) == list(plain.state_dict())


def test_work_is_counted_as_that_of_a_direct_convolution():
    x = torch.zeros(2, 3, 16, 16)
    plain = Net()
    net = copy.deepcopy(plain)
    winograd.use_in(net)
    found = []
    for one in (plain, net):
        with FlopCounterMode(display=False) as counter:
            one(x)
        found.append(counter.get_total_flops())
    assert found[0] == found[1] > 0
