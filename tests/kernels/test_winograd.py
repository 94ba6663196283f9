"""Convolutions by Winograd's filtering, beside torch's in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from dgm.nn.kernels import winograd

LAST = torch.channels_last
# Batch, channels in and out, height and width: several groups of tiles, and tiles that fill none.
SIZES = [
    (3, 32, 64, 8, 8),
    (1, 96, 32, 16, 12),
    (5, 64, 96, 8, 20),
    (40, 64, 64, 16, 16),
    (2, 256, 128, 16, 16),
]


def given(size: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    batch, inputs, outputs, height, width = size
    torch.manual_seed(0)
    x = torch.randn(batch, inputs, height, width, dtype=torch.float64)
    weight = torch.randn(outputs, inputs, 3, 3, dtype=torch.float64) / (9 * inputs) ** 0.5
    bias = torch.randn(outputs, dtype=torch.float64)
    made = (x.contiguous(memory_format=LAST), weight.contiguous(memory_format=LAST), bias)
    return tuple(part.to(dtype).requires_grad_() for part in made)


def all_of(y: Tensor, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    torch.manual_seed(1)
    grad = torch.randn(y.shape, dtype=torch.float64).to(y.dtype)  # in no layout of ours
    return [y.detach(), *torch.autograd.grad(y, inputs, grad)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_result_and_gradients_are_those_of_a_direct_convolution(size: tuple[int, ...]):
    inputs, exact = given(size), given(size, torch.float64)
    ours = all_of(winograd._forward(*inputs), inputs)
    direct = all_of(functional.conv2d(*exact, padding=1), exact)
    assert ours[0].is_contiguous(memory_format=LAST)
    assert ours[1].is_contiguous(memory_format=LAST)
    for mine, theirs in zip(ours, direct, strict=True):
        assert (mine - theirs).abs().max() < 5e-5 * theirs.abs().max()
        assert (mine - theirs).square().mean().sqrt() < 1e-5 * theirs.square().mean().sqrt()


def test_numbers_of_threads_and_images_change_no_bit():
    inputs = given((13, 64, 32, 16, 16))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = all_of(winograd._forward(*inputs), inputs)
        torch.set_num_threads(3)
        several = all_of(winograd._forward(*inputs), inputs)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, several, strict=True))
    x, weight, bias = inputs
    for part in (slice(0, 1), slice(4, 9)):
        assert torch.equal(winograd._forward(x[part], weight, bias), one[0][part])


def test_operator_keeps_torchs_rules():
    inputs = given((2, 32, 32, 8, 8))
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(winograd._forward, inputs, test_utils=tests)
    x, weight, _ = (part.detach() for part in inputs)
    grad = torch.randn(2, 32, 8, 8)
    for needed in ((True, True), (False, True), (True, False)):
        torch.library.opcheck(winograd._backward, (grad, x, weight, *needed), test_utils=tests[:2])


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
