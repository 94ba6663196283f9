"""The kernel of the gradient's norm, AdamW and the moving average, against torch's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from dgm.nn.kernels import adamw, native
from dgm.training.ema import Ema
from dgm.training.optimizer import AdamW, OptimConfig

CONFIG = OptimConfig(lr=1e-2, betas=(0.8, 0.99), eps=1e-6, weight_decay=0.1)


@pytest.fixture(autouse=True)
def compiled() -> None:
    assert native.library() is not None, "without a compiler nothing would be tested"


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def make_net() -> nn.Module:
    """Return weights of one element, of exactly one part, of more, and in channels_last."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(40, 50, 3), nn.Linear(128, 128), nn.Linear(1, 1, bias=False)]
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def give_gradients(net: nn.Module, step: int) -> None:
    torch.manual_seed(step)
    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter) * 10.0 ** (step % 3 - 2)


def train(kernels: bool, steps: int = 5) -> tuple[dict[str, Tensor], list[bool]]:
    """Take steps; return weights, moments and averages, and whether the average was fused."""
    net = make_net()
    made, ema = AdamW(net.parameters(), CONFIG, kernels), Ema({"net": net}, 1000.0)
    fused = []
    for step in range(steps):
        give_gradients(net, step)
        seen = 16 * (step + 1)
        taken = made.step(CONFIG.lr / (1 + step), ema=ema.fused_update("net", seen, 16))
        ema.update({"net": net}, seen, 16, {"net": taken})
        fused.append(taken)
    found = {f"weight {name}": value.detach() for name, value in net.named_parameters()}
    found |= {f"average {name}": value for name, value in ema.nets["net"].named_parameters()}
    for name, parameter in net.named_parameters():
        found |= {f"{kind} {name}": value for kind, value in made.state[parameter].items()}
    return found, fused


def test_steps_and_averages_are_torchs_to_rounding(threads: int):
    (ours, fused), (theirs, separate) = train(True), train(False)
    assert fused == [True] * 5 and separate == [False] * 5
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=2e-6, atol=1e-8, msg=name)


def test_the_number_of_threads_changes_no_bit():
    found = []
    before = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(train(True)[0])
    torch.set_num_threads(before)
    for name, value in found[0].items():
        assert all(torch.equal(value, other[name]) for other in found[1:]), name


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_norm_is_that_of_all_numbers(threads: int, size: float):
    grads = [p.detach() * size for p in make_net().parameters()]
    expected = torch.cat([g.flatten() for g in grads]).double().norm()
    found = adamw.gradient_norm(grads)
    assert found.shape == ()
    torch.testing.assert_close(found.double(), expected, rtol=2e-7, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_norm_of_what_is_not_finite_is_not(value: float):
    grads = [torch.ones(3), torch.full((100,), value)]
    assert not torch.isfinite(adamw.gradient_norm(grads))


def test_average_waits_where_a_weight_has_no_gradient():
    net = make_net()
    made, ema = AdamW(net.parameters(), CONFIG, True), Ema({"net": net}, 1000.0)
    give_gradients(net, 0)
    next(iter(net.parameters())).grad = None
    before = [value.clone() for value in ema.nets["net"].parameters()]
    assert not made.step(0.1, ema=ema.fused_update("net", 16, 16))
    assert all(map(torch.equal, before, ema.nets["net"].parameters()))


def test_average_waits_where_it_lies_otherwise_in_memory():
    net = make_net()
    made, ema = AdamW(net.parameters(), CONFIG, True), Ema({"net": net}, 1000.0)
    ema.nets["net"].to(memory_format=torch.contiguous_format)
    give_gradients(net, 0)
    assert not made.step(0.1, ema=ema.fused_update("net", 16, 16))


def test_double_precision_is_torchs():
    net = make_net().double()
    made = AdamW(net.parameters(), CONFIG, True)
    give_gradients(net, 0)
    assert not made.native and not made.step(0.1)
